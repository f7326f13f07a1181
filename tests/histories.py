"""Clients that record what they do: the load of the fault tests, and the histories that the checker reads.

An operation is recorded when it begins and again when it ends, by a clock that all processes of a machine
share. So of a client that is killed, the operation that was under way is on record, its outcome unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import ray
from ray.exceptions import WorkerCrashedError

from fsm_ray import AsyncStorage, State, Storage
from fsm_ray.errors import NamespaceUnavailable, OutcomeUnknown, VersionConflict

from .linearizability import READS, Method, Operation, Outcome

HOT_KEYS = 3
"""Conversations that all clients of a bot work on at a time."""

ROUND_S = 1.0
"""For how long they do, before they turn to the next ones: short histories are quickly checked."""

THINKING_S = 0.004
"""How long a client waits between its operations, on average."""

WORKER_CLIENTS = 3

FIELDS = ("name", "mail")

Record = Callable[[Operation], None]


class Client:
    """A client's calls, chosen by its seed; every value that it writes is unique."""

    def __init__(self, name: str, seed: int, record: Record) -> None:
        self.chance = random.Random(f"{seed} {name}")
        self._name = name
        self._record = record
        self._number = 0
        self._versions: dict[str, int] = {}

    @contextlib.contextmanager
    def recorded(self) -> Iterator[Recorded]:
        """Record the next operation; within the context the caller carries it out."""
        operation = Recorded(self._next_operation())
        self._record(operation.call)
        try:
            yield operation
        except VersionConflict as error:
            self._end(operation.call, Outcome.CONFLICT, error.actual_version)
        except OutcomeUnknown:
            self._end(operation.call, Outcome.UNKNOWN)
        except NamespaceUnavailable:
            self._end(operation.call, Outcome.FAILED)
        else:
            self._end(operation.call, Outcome.OK, operation.result)

    def _next_operation(self) -> Operation:
        self._number += 1
        method: Method = self.chance.choice(
            ("get_state", "get_data", "set_state", "set_data", "update_data", "update_data", "clear")
        )
        key = f"{time.monotonic_ns() // int(ROUND_S * 1e9)}.{self.chance.randrange(HOT_KEYS)}"
        expects = method not in READS and self.chance.random() < 0.3
        return Operation(
            client=self._name,
            key=key,
            method=method,
            argument=self._argument(method),
            expected_version=self._versions.get(key, 0) if expects else None,
            outcome=Outcome.UNKNOWN,
            invoked_ns=time.monotonic_ns(),
        )

    def _argument(self, method: Method) -> dict[str, Any] | None:
        value = f"{self._name}.{self._number}"
        if method == "set_state":
            return {"flow": None, "state": value, "data": {}}
        if method in ("set_data", "update_data"):
            return {self.chance.choice(FIELDS): value}
        return None

    def _end(self, call: Operation, outcome: Outcome, result: Any = None) -> None:
        returned_ns = time.monotonic_ns()
        if isinstance(result, State):
            result = result.model_dump()
        version = result["version"] if call.method == "get_state" and result else result
        if type(version) is int:
            self._versions[call.key] = version
        self._record(msgspec.structs.replace(call, outcome=outcome, result=result, returned_ns=returned_ns))


@dataclass(slots=True)
class Recorded:
    """An operation that is being recorded."""

    call: Operation
    result: Any = None

    def on(self, storage: Storage | AsyncStorage, bot_name: str) -> Any:
        """Call it: the result, or for an AsyncStorage, the coroutine of it."""
        call = self.call
        method = getattr(storage, call.method)
        if call.method in READS:
            return method(bot_name, call.key)
        arguments = [] if call.argument is None else [call.argument]
        if call.method == "set_state":
            arguments = [State(**call.argument)]
        return method(bot_name, call.key, *arguments, expected_version=call.expected_version)


def run_client(storage: Storage, bot_name: str, client: Client, is_over: Callable[[], bool]) -> None:
    """One operation after the other until it is over."""
    while not is_over():
        with client.recorded() as operation:
            operation.result = operation.on(storage, bot_name)
        time.sleep(client.chance.expovariate(1 / THINKING_S))


async def run_client_async(
    storage: AsyncStorage, bot_name: str, client: Client, is_over: Callable[[], bool]
) -> None:
    """As `run_client`, beside others on the same storage."""
    while not is_over():
        with client.recorded() as operation:
            operation.result = await operation.on(storage, bot_name)
        await asyncio.sleep(client.chance.expovariate(1 / THINKING_S))


class Journal:
    """A file of operations, which outlives the process that writes it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def record(self, operation: Operation) -> None:
        """One write(2), which a signal does not tear."""
        os.write(self._file, msgspec.json.encode(operation) + b"\n")

    def close(self) -> None:
        os.close(self._file)


def read_journal(path: Path) -> list[Operation]:
    """What was recorded; an operation that ended is in it twice."""
    return [msgspec.json.decode(line, type=Operation) for line in path.read_bytes().splitlines()]


def history_of(records: Iterable[Operation]) -> list[Operation]:
    """The operations, each as it was recorded last."""
    return list({(each.client, each.invoked_ns): each for each in records}.values())


def run_worker(name: str, bot_name: str, seed: int, directory: Path, timeout_s: float) -> None:
    """`WORKER_CLIENTS` on one AsyncStorage in this process, until the directory holds a file `over`.

    Their journal is the file `<pid>.<name>`.
    """
    journal = Journal(directory / f"{os.getpid()}.{name}")
    over = directory / "over"

    async def run() -> None:
        async with AsyncStorage(timeout_s=timeout_s) as storage, asyncio.TaskGroup() as tasks:
            for i in range(WORKER_CLIENTS):
                client = Client(f"{name}.{i}", seed, journal.record)
                tasks.create_task(run_client_async(storage, bot_name, client, over.exists))

    asyncio.run(run())
    journal.close()


class Load:
    """Clients at work on one bot, within a context: in threads of this process, and in Ray's workers."""

    def __init__(
        self,
        bot_name: str,
        directory: Path,
        seed: int,
        *,
        threads: int = 4,
        workers: int = 2,
        timeout_s: float = 10.0,
    ) -> None:
        """`workers`: processes of `WORKER_CLIENTS` each. `directory`: an empty one, for their journals."""
        self._bot_name = bot_name
        self._directory = directory
        self._seed = seed
        self._timeout_s = timeout_s
        self._over = threading.Event()
        self._records: list[Operation] = []
        self._pool = ThreadPoolExecutor(threads)
        self._threads = [Client(f"thread-{i}", seed, self._records.append) for i in range(threads)]
        self._running: list[Future[None]] = []
        self.workers = workers
        """Processes at work; those that come for killed ones are not counted."""
        self._tasks: list[Any] = []

    def __enter__(self) -> Self:
        self._running = [self._pool.submit(self._run_thread, client) for client in self._threads]
        for _ in range(self.workers):
            self.add_worker()
        return self

    def __exit__(self, *_: object) -> None:
        """End all clients; raise what one of them met and should not have."""
        self._over.set()
        (self._directory / "over").touch()
        self._pool.shutdown()
        for client in self._running:
            client.result()
        for worker in self._tasks:
            with contextlib.suppress(WorkerCrashedError):
                ray.get(worker, timeout=60)

    def add_worker(self) -> None:
        """Start another process of clients."""
        task: Any = ray.remote(run_worker).options(num_cpus=0, max_retries=0, scheduling_strategy="SPREAD")
        name = f"worker-{len(self._tasks)}"
        self._tasks.append(task.remote(name, self._bot_name, self._seed, self._directory, self._timeout_s))

    def journals(self) -> dict[int, Path]:
        """The journals of the workers that have begun, by process."""
        return {int(path.name.partition(".")[0]): path for path in self._directory.glob("*.worker-*")}

    def has_written_since(self, now_ns: int) -> bool:
        """Whether a write was acknowledged to a thread of this process that was invoked after that time."""
        return any(
            each.outcome is Outcome.OK and each.method not in READS and each.invoked_ns > now_ns
            for each in self._records[-len(self._threads) * 10 :]
        )

    def history(self) -> list[Operation]:
        """All that the clients did, and what they left: every conversation is read once more."""
        records = list(self._records)
        for path in self._directory.glob("*.worker-*"):
            records += read_journal(path)
        with Storage(timeout_s=60) as storage:
            records += read_all(storage, self._bot_name, sorted({each.key for each in records}))
        return history_of(records)

    def _run_thread(self, client: Client) -> None:
        with Storage(timeout_s=self._timeout_s) as storage:
            run_client(storage, self._bot_name, client, self._over.is_set)


def read_all(storage: Storage, bot_name: str, keys: Iterable[str]) -> list[Operation]:
    """A read of each conversation, as operations of one client."""
    reads: list[Operation] = []
    for key in keys:
        call = Operation(client="auditor", key=key, method="get_state", invoked_ns=time.monotonic_ns())
        state = storage.get_state(bot_name, key)
        result = None if state is None else state.model_dump()
        reads.append(msgspec.structs.replace(call, result=result, returned_ns=time.monotonic_ns()))
    return reads


@dataclass(frozen=True, slots=True)
class Counts:
    """The writes of a history against those that the bot's shards made, which give each one a version."""

    acknowledged: int
    unknown: int
    made: int

    @property
    def lost(self) -> int:
        """Acknowledged, and surely not made."""
        return max(0, self.acknowledged - self.made)

    @property
    def made_twice(self) -> int:
        """Made, by one more than could have been asked for."""
        return max(0, self.made - self.acknowledged - self.unknown)


def count(history: Iterable[Operation], versions: int) -> Counts:
    """`versions`: how many the bot's shards have given out meanwhile."""
    writes = [each for each in history if each.method not in READS]
    return Counts(
        acknowledged=sum(each.outcome is Outcome.OK and each.result is not False for each in writes),
        unknown=sum(each.outcome is Outcome.UNKNOWN for each in writes),
        made=versions,
    )
