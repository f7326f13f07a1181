"""BenchConfig: what one run of the benchmark measures, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fsm_ray.errors import ConfigurationError

CONTENDERS = (
    "fsm-ray",
    "fsm-ray-blocking",
    "ray-call",
    "ray-call-blocking",
    "aiogram-redis",
    "glide",
    "glide-batched",
    "redis-batched",
    "hiredis",
    "aiogram-memory",
    "echo",
)
"""Names of all contenders, in the order in which they are measured and shown."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure; the defaults are those of `fsm-ray bench`.

    >>> BenchConfig(rounds=1, tasks=(1,)).seconds
    1.0
    """

    contenders: tuple[str, ...] = CONTENDERS
    """Which contenders take part, out of `CONTENDERS`; none skips the comparison."""
    tasks: tuple[int, ...] = (1, 16, 256)
    """Numbers of concurrent tasks in the one worker process."""
    seconds: float = 1.0
    """How long one measurement lasts."""
    rounds: int = 5
    """How often each is measured; the tables show medians over the rounds."""
    shards: int = 1
    """Shards of fsm_ray's bots."""
    memory_conversations: int = 1_000_000
    """Conversations loaded to weigh one; 0 skips the part."""
    sizes: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    """Numbers of conversations for which an operation of fsm_ray is timed; none skips the part."""
    size_tasks: tuple[int, ...] = (1, 64)
    """Numbers of concurrent tasks in the part about sizes."""
    json_path: Path | None = None
    """Where to write everything measured, as JSON."""
    plot_path: Path | None = None
    """Where to write the picture, a PNG."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigurationError: a contender is unknown, or a number is too small.
        """
        unknown = [name for name in self.contenders if name not in CONTENDERS]
        if unknown:
            raise ConfigurationError(
                f"no contender is called {', '.join(unknown)}; there are: {', '.join(CONTENDERS)}"
            )
        positive = (*self.tasks, self.seconds, self.rounds, self.shards, *self.sizes, *self.size_tasks)
        if any(number <= 0 for number in positive) or self.memory_conversations < 0:
            raise ConfigurationError("tasks, seconds, rounds, shards and sizes must be above 0")
