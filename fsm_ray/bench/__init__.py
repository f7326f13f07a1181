"""The side-by-side benchmark behind `fsm-ray bench`: fsm_ray and its peers at the same work, in one run.

Nothing of the extra `bench` is imported before `run` is called, so the command line may import this freely.
"""

from __future__ import annotations

import importlib
import sys

from rich.console import Console

from fsm_ray.bench.config import ADAPTER_TASKS, ADAPTERS, CONTENDERS, STORES, BenchConfig
from fsm_ray.bench.results import Report
from fsm_ray.errors import MissingExtra

__all__ = ["ADAPTERS", "ADAPTER_TASKS", "CONTENDERS", "STORES", "BenchConfig", "Report", "run"]


def run(config: BenchConfig | None = None, *, console: Console | None = None) -> Report:
    """Measure every contender, print the tables, write the plot that config asks for.

    Blocks for about `2 * seconds * rounds` per contender and number of tasks, plus the other parts. Servers
    are real and local, started here and stopped at the end, also on an error, Ctrl-C or SIGTERM. Uses the
    Ray that this process is connected to, or starts a local one for the run. Call it from the main thread,
    outside of any event loop.

    Raises:
        MissingExtra: a package of the extra `bench` is not installed.
        ConfigurationError: config names something that does not exist.
    """
    config = BenchConfig() if config is None else config
    try:
        # The one lazy import: behind it, every module imports what it needs at its top.
        session = importlib.import_module("fsm_ray.bench.session")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fsm_ray":
            raise
        raise MissingExtra(
            f"the benchmark needs {error.name!r}, which is not installed: pip install 'fsm-ray[bench]'"
        ) from error
    report: Report = session.run(config, console or Console(file=sys.stdout))
    return report
