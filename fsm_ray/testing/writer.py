"""Writer: a process of its own that commits to a store and says what it does, to be killed at it."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from fsm_ray.errors import NotOwner, StoreUnavailable
from fsm_ray.stores.base import Place, Store
from fsm_ray.testing.batches import numbered_batch

DEADLINE_S = 60.0
"""Within this, whatever a test waits for must have happened."""

MakeStore = Callable[..., Store]
"""A store's class, or a function that makes one: `make_store(place, **clocks)`."""

_processes = multiprocessing.get_context("forkserver")
# Forked from a process that has imported all this, and nothing else, a writer is there in no time.
_processes.set_forkserver_preload(["fsm_ray.testing"])


class Writer:
    """Opens the store, commits numbered batches, as many at a time as it takes, and keeps it open.

    Its numbers go on from the version that it found. As a context manager it is killed in the end.
    """

    def __init__(self, make_store: MakeStore, place: Place, batches: int = 1 << 30) -> None:
        """`make_store` must be picklable: something that a fresh process can import by its name."""
        self.found: int | None = None
        """The version that it found when it opened the store; None before."""
        self.begun = 0
        """The last batch that it gave to the store."""
        self.acknowledged = 0
        """The last batch that the store acknowledged to it."""
        self.refused = False
        """Whether the store told it that it is not its owner any more; then it does nothing more."""
        self._acknowledgements = 0
        self._connection, theirs = _processes.Pipe()
        self._process = _processes.Process(
            target=_write, args=(theirs, make_store, place, batches), daemon=True
        )
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Take in what it says until the condition holds.

        Raises:
            TimeoutError: that takes longer than DEADLINE_S.
            EOFError: it ended, with an error of its own that it printed.
        """
        end_s = time.monotonic() + DEADLINE_S
        while not condition():
            if not self._connection.poll(max(end_s - time.monotonic(), 0)):
                raise TimeoutError(f"not within {DEADLINE_S} s: {self}")
            self._take_in()

    def wait_until_opened(self) -> None:
        """Wait until it has the store."""
        self.wait_until(lambda: self.found is not None)

    def wait_until_acknowledged(self, batches: int) -> float:
        """Wait for that many further acknowledgements; return the seconds that each took."""
        self.wait_until_opened()
        start_s, last = time.monotonic(), self._acknowledgements
        self.wait_until(lambda: self._acknowledgements >= last + batches)
        return (time.monotonic() - start_s) / batches

    def catch_up(self) -> None:
        """Take in what it has said by now."""
        while self._connection.poll():
            self._take_in()

    def wait_until_refused_or_past(self, version: int) -> None:
        """Wait until the store refuses it, or acknowledges a later batch to it than this one."""
        self.wait_until(lambda: self.refused or self.acknowledged > version)

    def kill(self) -> None:
        """Kill it with SIGKILL, wait until it is gone, and take in its last words."""
        self._process.kill()
        self._process.join()
        try:
            while True:
                self._take_in()
        except (EOFError, OSError):
            self._connection.close()

    def stop(self) -> None:
        """Stop it with SIGSTOP, wherever it is."""
        os.kill(self._pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self._pid, signal.SIGCONT)

    def __repr__(self) -> str:
        return (
            f"<Writer found={self.found} begun={self.begun} acknowledged={self.acknowledged} "
            f"refused={self.refused}>"
        )

    @property
    def _pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def _take_in(self) -> None:
        name, value = self._connection.recv()
        setattr(self, name, value)
        self._acknowledgements += name == "acknowledged"


def _write(connection: Connection, make_store: MakeStore, place: Place, batches: int) -> None:
    """What the process does. It never closes its store: it ends as a killed one does."""
    try:
        asyncio.run(_commit_all(connection, make_store(place), batches))
    except NotOwner:
        connection.send(("refused", True))
    try:
        connection.recv()
    except EOFError:
        os._exit(0)


async def _commit_all(connection: Connection, store: Store, batches: int) -> None:
    number = await _opened(connection, store)
    under_way: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def acknowledge_one() -> None:
        begun, commit = under_way.popleft()
        await commit
        connection.send(("acknowledged", begun))

    for _ in range(batches):
        number += 1
        connection.send(("begun", number))
        under_way.append((number, store.commit(numbered_batch(number))))
        try:
            while len(under_way) == store.max_commits:
                await acknowledge_one()
        except StoreUnavailable:
            # So may end what a stopped process had under way. It is unknown whether that was kept.
            await asyncio.gather(*(commit for _, commit in under_way), return_exceptions=True)
            under_way.clear()
            await store.close()
            number = await _opened(connection, store)
    while under_way:
        await acknowledge_one()
    await asyncio.to_thread(connection.poll, None)


async def _opened(connection: Connection, store: Store) -> int:
    """Open the store, and say which version it has."""
    contents = await store.open()
    connection.send(("found", contents.version))
    return contents.version
