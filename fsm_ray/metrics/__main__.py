"""Prints the Grafana dashboard."""

from __future__ import annotations

import sys
from pathlib import Path

DASHBOARD = Path(__file__).with_name("dashboard.json")

if __name__ == "__main__":
    sys.stdout.write(DASHBOARD.read_text())
