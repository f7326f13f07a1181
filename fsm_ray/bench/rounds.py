"""The comparison: contenders take turns in rounds, so a shared machine's drift hits all of them alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, Generic, Protocol, TypeVar

from fsm_ray.bench.config import BenchConfig
from fsm_ray.bench.contender import Contender
from fsm_ray.bench.figures import Figure, percentile
from fsm_ray.bench.measure import latencies_ns, operations_per_s, quiet_collector
from fsm_ray.bench.results import Cell
from fsm_ray.bench.workload import Workload, make_workload, users_of_level

C = TypeVar("C", bound=Contender[Any])

Progress = Callable[[str], None]
"""Told, now and then, what is being done."""

_WARM_UP_S = 0.25


@dataclass
class Trial(Generic[C]):
    """One contender at one number of tasks, with what was measured so far."""

    contender: C
    tasks: int
    workload: Workload[Any]
    rates: list[float] = field(default_factory=list)
    p50s_us: list[float] = field(default_factory=list)
    p99s_us: list[float] = field(default_factory=list)
    verified_keys: int = 0
    failure: str | None = None

    def attempt(self, step: Callable[[Trial[C]], None]) -> None:
        """Take the step, unless an earlier one failed."""
        if self.failure is not None:
            return
        try:
            step(self)
        except Exception as error:  # noqa: BLE001 - a contender that fails, however it does, is a result
            self.failure = describe_failure(error)

    def cell(self) -> Cell:
        if self.failure is not None:
            return Cell(self.contender.name, self.tasks, failure=self.failure)
        return Cell(
            self.contender.name,
            self.tasks,
            _figure(self.rates),
            _figure(self.p50s_us),
            _figure(self.p99s_us),
            verified_keys=self.verified_keys,
        )


class Pass(Protocol[C]):
    """One measurement of a trial, for so many seconds; what it finds is added to the trial."""

    def __call__(self, trial: Trial[C], seconds: float) -> None: ...


def compare(
    contenders: Sequence[Contender[Any]], config: BenchConfig, progress: Progress
) -> tuple[Cell, ...]:
    """Measure every contender at every number of tasks that it can do."""
    return take_rounds(contenders, config, progress, _measure_throughput, _measure_latency)


def take_rounds(
    contenders: Sequence[C], config: BenchConfig, progress: Progress, *passes: Pass[C]
) -> tuple[Cell, ...]:
    """Let every contender make each pass once a round, at every number of tasks that it can do.

    The first pass, cut short, also warms up. What was written is verified in the end.
    """
    with ExitStack() as stack:
        for contender in contenders:
            progress(f"starting {contender.name}")
            contender.open()
            stack.callback(contender.close)
        trials = _make_trials(contenders, config)
        for trial in trials:
            progress(f"loading and warming up {trial.contender.name}, {trial.tasks} tasks")
            trial.attempt(_load)
            trial.attempt(partial(passes[0], seconds=min(config.seconds, _WARM_UP_S)))
            trial.rates.clear()
        with quiet_collector():
            for number in range(1, config.rounds + 1):
                progress(f"round {number} of {config.rounds}")
                _run_round(trials, config, Random(number), passes)
        for trial in trials:
            progress(f"verifying {trial.contender.name}, {trial.tasks} tasks")
            trial.attempt(_verify)
        return tuple(trial.cell() for trial in trials)


def describe_failure(error: BaseException) -> str:
    """Name the error in a line; of a group the first, for all tasks mostly fail for one reason."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _make_trials(contenders: Sequence[C], config: BenchConfig) -> list[Trial[C]]:
    return [
        Trial(contender, tasks, make_workload(tasks, contender.make_key))
        for tasks in config.tasks
        for contender in contenders
        if tasks == 1 or not contender.blocking
    ]


def _run_round(
    trials: Sequence[Trial[C]], config: BenchConfig, random: Random, passes: Sequence[Pass[C]]
) -> None:
    for tasks in config.tasks:
        level = [trial for trial in trials if trial.tasks == tasks]
        random.shuffle(level)  # nobody has the same neighbour every time
        for measure in passes:
            for trial in level:
                gc.collect()
                trial.attempt(partial(measure, seconds=config.seconds))


def _load(trial: Trial[C]) -> None:
    trial.contender.load(users_of_level(trial.tasks))


def _measure_throughput(trial: Trial[C], seconds: float) -> None:
    trial.rates.append(operations_per_s(trial.contender, trial.workload, seconds))


def _measure_latency(trial: Trial[C], seconds: float) -> None:
    samples = latencies_ns(trial.contender, trial.workload, seconds)
    trial.p50s_us.append(percentile(samples, 0.50) / 1e3)
    trial.p99s_us.append(percentile(samples, 0.99) / 1e3)


def _verify(trial: Trial[C]) -> None:
    trial.verified_keys = trial.contender.verify(trial.workload)


def _figure(rounds: list[float]) -> Figure | None:
    return Figure(tuple(rounds)) if rounds else None
