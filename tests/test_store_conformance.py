"""The kit for stores passes one that keeps its promises, and fails those that break them, where they do."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, ClassVar

import pytest

from fsm_ray.errors import StoreMismatch
from fsm_ray.stores.base import Batch, Contents, OwnedStore, Place
from fsm_ray.testing import MakeStore, SharedStoreConformance, StoreConformance
from fsm_ray.testing.batches import kept_of

PAUSE_S = 0.03
"""Longer than all else that a store here does, so that the kit cannot but kill it in this pause."""


class FileStore(OwnedStore):
    """Keeps its promises: a log of files with consecutive numbers, each an owner or a batch.

    A file comes into being whole and only where there is none, by link(2). An owner appends right behind what
    it knows, so whatever another one put there keeps it out.
    """

    is_shared: ClassVar[bool] = True

    def __init__(self, place: Place, **clocks: Any) -> None:
        super().__init__(place, **clocks)
        self.directory = Path(place.url.partition("://")[2]) / self.folder
        self._is_open = False
        self._end = 0
        """The number of the file that this object wrote last."""

    @property
    def folder(self) -> str:
        return f"{self.place.bot_name}/{self.place.shard}"

    def commit(self, batch: Batch) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._is_open and self.append(batch):
            done.set_result(None)
        else:
            done.set_exception(self._not_owner())
        return done

    async def confirm(self) -> None:
        if self.owner is None or self._epoch() != self.owner.epoch:
            raise self._not_owner()

    def append(self, entry: Batch | tuple[int, bytes]) -> bool:
        """Append to the log; tell whether nobody else was there before."""
        whole = self.directory / f"new-{uuid.uuid4().hex}"
        whole.write_bytes(pickle.dumps(entry))
        try:
            os.link(whole, self.directory / str(self._end + 1))
        except FileExistsError:
            return False
        finally:
            whole.unlink()
        self._end += 1
        return True

    async def _connect(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._is_open = True

    async def _disconnect(self) -> None:
        self._is_open = False

    async def _read_owner(self) -> bytes | None:
        owners = [entry for entry in self._log() if isinstance(entry, tuple)]
        return owners[-1][1] if owners else None

    async def _replace_owner(self, last_epoch: int, epoch: int, owner: bytes) -> bool:
        while self._epoch() == last_epoch:
            self._end = len(self._log())
            if self.append((epoch, owner)):
                return True
        return False

    async def _load(self) -> Contents:
        return kept_of(entry for entry in self._log() if isinstance(entry, Batch))

    def _epoch(self) -> int:
        return max((entry[0] for entry in self._log() if isinstance(entry, tuple)), default=0)

    def _log(self) -> list[Any]:
        numbers = sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())
        return [pickle.loads((self.directory / str(number)).read_bytes()) for number in numbers]


class LosesTheLastBatch(FileStore):
    """Acknowledges a batch before it is written, which is with the next one, or on closing."""

    def __init__(self, place: Place, **clocks: Any) -> None:
        super().__init__(place, **clocks)
        self._unwritten: Batch | None = None

    def append(self, entry: Batch | tuple[int, bytes]) -> bool:
        last, self._unwritten = self._unwritten, None
        is_last_written = last is None or super().append(last)
        if isinstance(entry, tuple):
            return is_last_written and super().append(entry)
        self._unwritten = entry
        return is_last_written


class TearsBatches(FileStore):
    """Writes a batch in two steps: its records, then the rest."""

    def append(self, entry: Batch | tuple[int, bytes]) -> bool:
        if isinstance(entry, tuple):
            return super().append(entry)
        is_written = super().append(Batch(entry.version, entry.records, {}))
        time.sleep(PAUSE_S)
        return is_written and super().append(entry)


class LetsTwoOwnersIn(FileStore):
    """Appends to the log wherever its end is, whoever owns it."""

    async def confirm(self) -> None:
        """Nobody is asked."""

    def append(self, entry: Batch | tuple[int, bytes]) -> bool:
        while not super().append(entry):
            self._end += 1
        return True


class ForgetsNothing(FileStore):
    """Goes on remembering sessions that it was told to forget."""

    def append(self, entry: Batch | tuple[int, bytes]) -> bool:
        if isinstance(entry, Batch):
            entry = Batch(entry.version, entry.records, entry.sessions)
        return super().append(entry)


class ClearsNothing(FileStore):
    """Goes on keeping records that were cleared."""

    def append(self, entry: Batch | tuple[int, bytes]) -> bool:
        if isinstance(entry, Batch):
            records = {key: blob for key, blob in entry.records.items() if blob is not None}
            entry = Batch(entry.version, records, entry.sessions, entry.forgotten)
        return super().append(entry)


class MixesShards(FileStore):
    """Puts all shards of a bot in one place."""

    @property
    def folder(self) -> str:
        return self.place.bot_name

    def _checked(self, found: bytes) -> Any:
        return super()._checked(re.sub(rb'"shard":\d+', b'"shard":%d' % self.place.shard, found))


class IgnoresLeases(FileStore):
    """Answers at once, while the last owner may still answer reads."""

    def __init__(self, place: Place, **clocks: Any) -> None:
        super().__init__(place, sleep=lambda _: asyncio.sleep(0))


class EndsOutOfOrder(FileStore):
    """Takes two commits at a time, and tells of every second one before the one that came first."""

    max_commits: ClassVar[int] = 2

    def commit(self, batch: Batch) -> asyncio.Future[None]:
        kept = super().commit(batch)
        return kept if batch.version % 2 == 0 else asyncio.get_running_loop().create_task(self._late(kept))

    @staticmethod
    async def _late(kept: asyncio.Future[None]) -> None:
        await asyncio.sleep(PAUSE_S)
        await kept


class TakesAHalfMadeStoreForForeign(FileStore):
    """Makes a new store in two steps, and cannot go on from the first one."""

    async def _read_owner(self) -> bytes | None:
        made = self.directory.with_suffix(".made")
        owner = await super()._read_owner()
        if owner is None:
            if made.exists():
                raise StoreMismatch("somebody else's")
            made.touch()
            time.sleep(PAUSE_S)  # noqa: ASYNC251 - the whole process shall be found here
        return owner


class LetsASecondProcessIn(FileStore):
    """Says that only one process can open it."""

    is_shared: ClassVar[bool] = False


class TestFileStore(SharedStoreConformance, StoreConformance):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        return FileStore

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"log://{tmp_path}"


HEAD = """
import hypothesis
import pytest

hypothesis.settings.register_profile("unshrunk", phases=[hypothesis.Phase.generate])
hypothesis.settings.load_profile("unshrunk")

from fsm_ray.testing import ExclusiveStoreConformance, SharedStoreConformance, StoreConformance
from tests import test_store_conformance as stores
"""

SUITE = """
class Test{store}({kit}StoreConformance, StoreConformance):
{without}
    @pytest.fixture
    def make_store(self):
        return stores.{store}

    @pytest.fixture
    def url(self, tmp_path):
        return f"log://{{tmp_path}}"
"""

CRASHES = {
    "a_writer_killed_at_any_point_loses_nothing_acknowledged_and_leaves_no_half_of_a_batch",
    "an_owner_that_was_stopped_in_a_commit_changes_nothing_when_it_wakes",
}
FENCING = {
    "an_owner_that_was_stopped_in_a_commit_changes_nothing_when_it_wakes",
    "contenders_never_overwrite_what_was_acknowledged_to_another",
    "of_two_that_open_the_store_at_once_one_owns_it",
    "who_opened_the_store_before_can_commit_nothing_more",
}
ORDER = "commits_that_are_under_way_together_end_in_their_order"
REMOVAL = {
    "a_batch_of_thousands_is_kept",
    "a_store_can_be_opened_again_without_being_closed",
    "any_series_of_batches_and_openings_leaves_what_a_dict_would_hold",
    ORDER,
    "what_was_committed_is_there_for_another_object",
    "who_opened_the_store_before_can_commit_nothing_more",
}

FAILS: dict[type[FileStore], set[str]] = {
    LosesTheLastBatch: CRASHES
    | FENCING
    | {"an_acknowledged_commit_survives_kill_9", "who_opened_the_store_before_closes_it_for_itself_alone"},
    TearsBatches: CRASHES,
    LetsTwoOwnersIn: FENCING | {"who_opened_the_store_before_is_told_when_it_asks"},
    ForgetsNothing: CRASHES | REMOVAL | {"a_forgotten_session_is_gone"},
    ClearsNothing: CRASHES | REMOVAL | {"a_cleared_record_is_gone"},
    MixesShards: {"shards_and_bots_at_one_url_see_nothing_of_each_other"},
    IgnoresLeases: {
        "open_waits_out_a_lease_that_an_owner_between_gave_up_waiting_for",
        "open_waits_out_the_lease_of_an_owner_whose_process_lives",
        "who_opened_the_store_before_closes_it_for_itself_alone",
    },
    EndsOutOfOrder: {ORDER},
    TakesAHalfMadeStoreForForeign: {
        "a_store_whose_first_owner_is_killed_while_it_opens_it_can_be_opened",
    },
    LetsASecondProcessIn: {
        "a_store_can_be_opened_once_its_owner_is_killed",
        "a_store_that_another_object_has_open_is_refused_and_that_one_goes_on",
        "a_store_that_another_process_has_open_is_refused_and_that_one_goes_on",
    },
}
"""Broken store -> the tests of the kit that fail it, and no others do."""

COSTLY = {
    "a_record_of_the_largest_size_is_kept",
    "any_series_of_batches_and_openings_leaves_what_a_dict_would_hold",
}
"""Half of the time that the kit takes: tried where they are to fail."""


def suite_of(store: type[FileStore]) -> str:
    kit = "Shared" if store.is_shared else "Exclusive"
    without = "".join(f"    test_{name} = None\n" for name in sorted(COSTLY - FAILS[store]))
    return SUITE.format(store=store.__name__, kit=kit, without=without)


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """Each broken store and test of the kit that failed, in a pytest of its own."""
    directory = tmp_path_factory.mktemp("broken")
    suite = directory / "test_broken.py"
    suite.write_text(HEAD + "".join(map(suite_of, FAILS)))
    options = ["-c", os.devnull, f"--rootdir={directory}", f"--basetemp={directory}/tmp", "-W", "ignore"]
    # They mostly wait: for processes, and in the pauses of those that are to be killed there.
    options += ["-n", "3"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", suite, *options, "-p", "no:cacheprovider", "-rfE", "--tb=no"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout + ran.stderr
    return set(re.findall(r"^(?:FAILED|ERROR) .*::Test(\w+)::test_(\w+)", ran.stdout, re.MULTILINE))


@pytest.mark.slow
@pytest.mark.parametrize("store", list(FAILS), ids=lambda store: store.__name__)
def test_a_broken_store_fails_where_it_is_broken(
    store: type[FileStore], failed: set[tuple[str, str]]
) -> None:
    assert {test for name, test in failed if name == store.__name__} == FAILS[store]
