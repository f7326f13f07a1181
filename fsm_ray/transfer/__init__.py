"""Conversations into fsm_ray from elsewhere, and out of it: export, import, and importers for other storages.

All of it may be run while bots work, and again after it was killed: what is there already is left alone, so
nothing is imported twice and no newer conversation is overwritten. Exports and Redis are read bit by bit; a
pickle is loaded into memory as a whole. The importers are in `transfer.aiogram`, `transfer.telegram` and
`transfer.telebot`, and need their framework.
"""

from __future__ import annotations

from fsm_ray.transfer.lines import export, import_
from fsm_ray.transfer.loading import Progress, Refusal, Report
from fsm_ray.transfer.progress import progress_bar

__all__ = ["Progress", "Refusal", "Report", "export", "import_", "progress_bar"]
