"""One run from start to end: servers and Ray up, all parts measured, everything down again."""

from __future__ import annotations

import asyncio
import io
import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime

import ray
import uvloop
from rich.console import Console

from fsm_ray.bench.config import BenchConfig
from fsm_ray.bench.contender import Surroundings
from fsm_ray.bench.contenders import pick_contenders
from fsm_ray.bench.disk import look_at_disk
from fsm_ray.bench.dispatch import time_dispatchers
from fsm_ray.bench.kills import time_kills
from fsm_ray.bench.machine import load_average, look_at_machine
from fsm_ray.bench.memory import weigh_conversations
from fsm_ray.bench.plot import write_plot
from fsm_ray.bench.race import hold_races
from fsm_ray.bench.recovery import time_recovery
from fsm_ray.bench.report import print_report
from fsm_ray.bench.results import Report
from fsm_ray.bench.rounds import Progress, compare
from fsm_ray.bench.scan import time_scan
from fsm_ray.bench.servers import ValkeyServer, echo_process, temporary_directory
from fsm_ray.bench.sizes import time_sizes
from fsm_ray.bench.turns import time_turns

_LOCAL_RAY_CPUS = 2


def run(config: BenchConfig, console: Console) -> Report:
    """Measure, print, write."""
    # Ray prints on stdout what becomes of actors that are killed; the report says what matters of it.
    with console.status("") as status, redirect_stdout(io.StringIO()):
        report = measure(config, status.update)
    print_report(report, console)
    if config.plot_path is not None:
        write_plot(report, config.plot_path)
    return report


def measure(config: BenchConfig, progress: Progress) -> Report:
    """Measure everything that config asks for."""
    kinds = pick_contenders(config.all_contenders)
    started_at, load_before = datetime.now(UTC), load_average()
    needs_ray = any(kind.needs_ray for kind in kinds) or config.has_more_parts
    with _sigterm_as_interrupt(), surroundings(shards=config.shards) as around, ray_running(needed=needs_ray):
        disk = look_at_disk() if config.uses_disk else None
        cells = compare([kind(around) for kind in kinds], config, progress)
        progress("weighing conversations")
        memory = (
            weigh_conversations(around, config.memory_conversations) if config.memory_conversations else ()
        )
        sizes = time_sizes(around, config, progress) if config.sizes else ()
        turns = time_turns(around, config, progress) if config.turn_tasks else ()
        progress("racing")
        race = hold_races(around, config.race_rounds) if config.race_rounds else ()
        scan = time_scan(around, config, progress) if config.scan_conversations else None
        recovery = time_recovery(around, config, progress) if config.recovery_conversations else ()
        kills = time_kills(around, config.kills, progress) if config.kills else None
        adapter = time_dispatchers(around, config, progress) if config.adapter else ()
    return Report(
        config=config,
        machine=look_at_machine(started_at=started_at, load_before=load_before),
        labels={kind.name: kind.label for kind in kinds},
        cells=cells,
        memory=memory,
        sizes=sizes,
        turns=turns,
        race=race,
        scan=scan,
        disk=disk,
        recovery=recovery,
        kills=kills,
        adapter=adapter,
    )


@contextmanager
def surroundings(*, shards: int) -> Iterator[Surroundings]:
    """Run the servers and an event loop, for contenders."""
    with (
        temporary_directory() as directory,
        ValkeyServer(directory) as valkey,
        echo_process(directory) as echo_socket,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        yield Surroundings(runner, str(valkey.socket_path), echo_socket, shards)


@contextmanager
def ray_running(*, needed: bool) -> Iterator[None]:
    """Start a local Ray unless this process is connected to one, and stop what was started."""
    if not needed or ray.is_initialized():
        yield
        return
    ray.init(
        address="local",
        num_cpus=_LOCAL_RAY_CPUS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, so that no server outlives it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
