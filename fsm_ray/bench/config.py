"""BenchConfig: what one run of the benchmark measures, and for how long."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
"""Names of all contenders that need no durable store, in the order in which they are measured and shown."""

STORES = ("rocksdb", "redis", "postgres")
"""The durable stores that fsm_ray can be measured on; each is a contender, `fsm-ray-rocksdb` and so on."""

SYNCED_PEER = "aiogram-redis-synced"
"""What takes part with them."""

ADAPTERS = ("aiogram",)
"""The frameworks whose dispatcher can be measured over fsm_ray."""

ADAPTER_TASKS = (1, 64)
"""Numbers of concurrent tasks that feed a dispatcher."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure; the defaults are those of `fsm-ray bench`.

    >>> BenchConfig(rounds=1, tasks=(1,)).seconds
    1.0
    """

    contenders: tuple[str, ...] = CONTENDERS
    """Which contenders take part, out of `CONTENDERS`; none skips the comparison."""
    stores: tuple[str, ...] = ()
    """Durable stores that fsm_ray is measured on besides, out of `STORES`."""
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
    turn_tasks: tuple[int, ...] = (1, 64)
    """Numbers of concurrent tasks that handle whole updates; none skips the part."""
    race_rounds: int = 20
    """How often many update one conversation at once; 0 skips the part."""
    scan_conversations: int = 1_000_000
    """Conversations that are counted and scanned; 0 skips the part."""
    recovery_conversations: int = 0
    """Conversations that a bot has which is brought back after a crash; 0 skips the part."""
    kills: int = 0
    """How often an actor is killed in mid-write; 0 skips the part."""
    adapter: str | None = None
    """A framework, out of `ADAPTERS`: its dispatcher is fed updates by so many `tasks`, over its own storage
    and over fsm_ray, on the one store in `stores` if there is one. See `with_adapter_alone`."""
    plot_path: Path | None = None
    """Where to write the picture, a PNG."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigurationError: a contender, store or adapter is unknown, or a number is too small; or there
                is an adapter, and more than one store.
        """
        _check_known("contender", self.contenders, CONTENDERS)
        _check_known("store", self.stores, STORES)
        if self.adapter is not None:
            _check_known("adapter", (self.adapter,), ADAPTERS)
            if len(self.stores) > 1:
                raise ConfigurationError("an adapter is measured on one store at a time")
        tasks = (*self.tasks, *self.size_tasks, *self.turn_tasks)
        positive = (*tasks, self.seconds, self.rounds, self.shards, *self.sizes)
        if any(number <= 0 for number in positive):
            raise ConfigurationError("tasks, seconds, rounds, shards and sizes must be above 0")
        conversations = self.memory_conversations, self.scan_conversations, self.recovery_conversations
        if min(*conversations, self.race_rounds, self.kills) < 0:
            raise ConfigurationError("conversations, races and kills must not be below 0")

    def with_adapter_alone(self, adapter: str) -> BenchConfig:
        """This with the adapter, and with no other part.

        >>> BenchConfig(tasks=(1,)).with_adapter_alone("aiogram").contenders
        ()
        """
        return replace(
            self,
            adapter=adapter,
            contenders=(),
            memory_conversations=0,
            sizes=(),
            turn_tasks=(),
            race_rounds=0,
            scan_conversations=0,
            recovery_conversations=0,
            kills=0,
        )

    @property
    def all_contenders(self) -> tuple[str, ...]:
        """The contenders, and those that the stores add; with an adapter, the store is the adapter's."""
        if not self.stores or self.adapter is not None:
            return self.contenders
        return (*self.contenders, *(f"fsm-ray-{store}" for store in self.stores), SYNCED_PEER)

    @property
    def has_more_parts(self) -> bool:
        """Whether anything is measured beside the comparison; all of it is about fsm_ray."""
        return bool(
            self.memory_conversations
            or self.sizes
            or self.turn_tasks
            or self.race_rounds
            or self.scan_conversations
            or self.recovery_conversations
            or self.kills
            or self.adapter
        )

    @property
    def uses_disk(self) -> bool:
        """Whether any part depends on what a synced write costs here."""
        return bool(self.stores or self.recovery_conversations or self.kills)


def _check_known(kind: str, names: tuple[str, ...], known: tuple[str, ...]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigurationError(f"no {kind} is called {', '.join(unknown)}; there are: {', '.join(known)}")
