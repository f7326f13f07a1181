"""The demo: updates that are Telegram's, a bot that takes them, workers that die, a check that can fail."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import telebot.types
import telegram
from aiogram.dispatcher.middlewares.user_context import UserContextMiddleware
from aiogram.fsm.storage.memory import MemoryStorage
from aiogram.types import Update
from rich.console import Console

from fsm_ray import State, Storage
from fsm_ray.adapters.aiogram import record_key
from fsm_ray.demo import crew as demo_crew
from fsm_ray.demo import worker as demo_worker
from fsm_ray.demo.config import DemoConfig
from fsm_ray.demo.crowd import JSON
from fsm_ray.demo.dialogue import handle_in_order, make_bot, make_dispatcher
from fsm_ray.demo.display import print_report
from fsm_ray.demo.feeder import Batch, Feeder
from fsm_ray.demo.people import CHANGE, CONFIRM
from fsm_ray.demo.reference import reference_records
from fsm_ray.demo.report import Report, find_differences
from fsm_ray.demo.run import run
from fsm_ray.demo.updates import BOT, Conversation, generate_updates, read_updates, write_updates
from fsm_ray.errors import ConfigurationError, InvalidInput, InvalidUpdate
from fsm_ray.keys import ChatTopicUser

from .conftest import RayCluster

UPDATES = list(generate_updates(3_000, seed=1))
ANN: JSON = {"id": 7, "is_bot": False, "first_name": "Ann"}
CHAT: JSON = {"id": 7, "first_name": "Ann", "type": "private"}
KEY = (BOT["id"], 7, 7, None, None, "default")


def kind_of(update: JSON) -> str:
    return next(name for name in update if name != "update_id")


class TestUpdates:
    def test_there_are_as_many_as_were_asked_for(self) -> None:
        assert [len(list(generate_updates(count))) for count in (1, 2, 100)] == [1, 2, 100]

    def test_the_same_seed_gives_the_same_updates_in_another_process(self) -> None:
        code = (
            "import json; from fsm_ray.demo.updates import *; print(json.dumps([*generate_updates(300, 1)]))"
        )
        environment = os.environ | {"PYTHONHASHSEED": "1"}
        output = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, env=environment
        )

        assert json.loads(output.stdout) == list(generate_updates(300, 1))

    def test_another_seed_gives_other_updates(self) -> None:
        assert list(generate_updates(10, 1)) != list(generate_updates(10, 2))

    def test_all_kinds_are_there(self) -> None:
        messages = [update["message"] for update in UPDATES if "message" in update]
        pressed = {update["callback_query"]["data"] for update in UPDATES if "callback_query" in update}
        texts = {message["text"].partition("@fsm_ray")[0] for message in messages}
        types = {message["chat"]["type"] for message in messages}

        assert {kind_of(update) for update in UPDATES} == {
            "message",
            "edited_message",
            "callback_query",
            "channel_post",
        }
        assert types == {"private", "group", "supergroup"}
        assert pressed == {CONFIRM, *(f"{CHANGE}{field}" for field in ("name", "age", "email"))}
        assert {"/start", "/cancel", "twenty"} <= texts

    def test_topics_and_threads_of_replies_are_there_and_told_apart(self) -> None:
        messages = [
            update["message"] for update in UPDATES if "message_thread_id" in update.get("message", {})
        ]
        are_topics = Counter(message.get("is_topic_message", False) for message in messages)

        assert are_topics[True] > 100
        assert are_topics[False] > 100

    def test_messages_that_the_bot_can_no_longer_see_are_there(self) -> None:
        queries = [update["callback_query"] for update in UPDATES if "callback_query" in update]

        assert any(query["message"]["date"] == 0 for query in queries)

    def test_several_hundred_people_talk_at_once(self) -> None:
        keys = [key for key in map(ChatTopicUser().extract, UPDATES) if key]
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        last = {key: place for place, key in enumerate(keys)}
        middle = len(keys) // 2

        assert len({user_id for _, _, user_id in keys}) > 300
        assert sum(first[key] < middle < last[key] for key in first) > 30

    def test_some_people_talk_in_several_places(self) -> None:
        keys = {key for key in map(ChatTopicUser().extract, UPDATES) if key}
        places = Counter(user_id for _, _, user_id in keys)

        assert sum(count > 1 for count in places.values()) > 30

    def test_ids_and_dates_only_grow(self) -> None:
        update_ids = [update["update_id"] for update in UPDATES]
        messages = [update["message"] for update in UPDATES if "message" in update]
        dates = [message["date"] for message in messages]
        message_ids = [(message["chat"]["id"], message["message_id"]) for message in messages]

        assert update_ids == list(range(update_ids[0], update_ids[0] + len(UPDATES)))
        assert dates == sorted(dates)
        assert len(set(message_ids)) == len(message_ids)

    def test_an_edited_message_is_one_that_was_sent_before(self) -> None:
        sent = set()
        for update in UPDATES:
            message = update.get("message") or update.get("edited_message")
            if message:
                place = (message["chat"]["id"], message["message_id"], message["from"]["id"])

                assert place in sent or "message" in update
                sent.add(place)

    def test_aiogram_takes_them_and_knows_every_field(self) -> None:
        for update in UPDATES:
            taken = Update.model_validate(update)
            event = getattr(taken, kind_of(update))

            assert not unknown_fields(event)

    def test_python_telegram_bot_takes_them_and_knows_every_field(self) -> None:
        take: Any = telegram.Update.de_json
        for update in UPDATES:
            taken = take(json.loads(json.dumps(update)), None)

            assert taken.to_dict().keys() == update.keys()
            assert not taken.effective_message or not taken.effective_message.api_kwargs

    def test_pytelegrambotapi_takes_them(self) -> None:
        take: Any = telebot.types.Update.de_json
        for update in UPDATES:
            taken = take(json.loads(json.dumps(update)))

            assert getattr(taken, kind_of(update)) is not None

    def test_the_key_is_that_under_which_aiogram_keeps_the_conversation(self) -> None:
        fsm = make_dispatcher(MemoryStorage()).fsm
        bot = make_bot()
        for update in UPDATES:
            context = UserContextMiddleware.resolve_event_context(Update.model_validate(update))
            state = fsm.resolve_context(bot, context.chat_id, context.user_id, context.thread_id)

            assert Conversation().extract(update) == (record_key(state.key) if state else None)


def unknown_fields(part: Any) -> set[str]:
    """Fields of the Bot API's objects that aiogram took without knowing them."""
    if not hasattr(part, "model_fields_set"):
        return set()
    unknown = set(part.model_extra or ())
    for name in part.model_fields_set - unknown:
        unknown |= unknown_fields(getattr(part, name))
    return unknown


class TestFiles:
    def test_updates_are_read_as_they_were_written(self, tmp_path: Path) -> None:
        write_updates(tmp_path / "updates.jsonl", UPDATES[:100])

        assert read_updates(tmp_path / "updates.jsonl") == UPDATES[:100]

    @pytest.mark.parametrize("line", ["hello", "1", "{}", '{"update_id": 2, "message": 1}', "\\ud800"])
    def test_a_line_that_is_no_update_is_refused_with_its_number(self, tmp_path: Path, line: str) -> None:
        path = tmp_path / "updates.jsonl"
        path.write_text(f'{{"update_id": 1}}\n\n{line}\n', encoding="utf-8")

        with pytest.raises(InvalidUpdate, match=r"updates\.jsonl, line 3: "):
            read_updates(path)

    def test_a_file_without_updates_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "updates.jsonl"
        path.write_text("\n")

        with pytest.raises(InvalidInput, match="holds no updates"):
            run(DemoConfig(file=path), Console(file=io.StringIO()))

    def test_an_update_that_aiogram_does_not_take_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "updates.jsonl"
        write_updates(path, [message("hi") | {"update_id": 17}])
        path.write_text(path.read_text().replace('"private"', "null"))

        with pytest.raises(InvalidUpdate, match=r"update 17: message\.chat\.type: "):
            run(DemoConfig(file=path), Console(file=io.StringIO()))


def message(text: str, message_id: int = 1, *, kind: str = "message") -> JSON:
    return {
        "update_id": message_id,
        kind: {"message_id": message_id, "date": 1, "from": ANN, "chat": CHAT, "text": text},
    }


def press(data: str) -> JSON:
    query = {"id": "1", "from": ANN, "chat_instance": "1", "data": data, "message": message("?")["message"]}
    return {"update_id": 1, "callback_query": query}


async def record_after(*updates: JSON) -> State | None:
    """Ann's record when the bot has handled these."""
    return (await reference_records(updates, lambda _: None)).get(KEY)


REGISTRATION = (message("/start"), message("Ann", 2), message("40", 3), message("ann@example.org", 4))


class TestDialogue:
    async def test_questions_are_asked_one_after_the_other(self) -> None:
        records = [await record_after(*REGISTRATION[:count]) for count in range(5)]

        assert [record and record.state for record in records] == [
            None,
            "Registration:name",
            "Registration:age",
            "Registration:email",
            "Registration:confirm",
        ]

    async def test_confirming_finishes_and_keeps_everything(self) -> None:
        record = await record_after(*REGISTRATION, press(CONFIRM))

        assert record is not None
        assert record.state == "Registration:done"
        assert record.data["log"] == [
            "name is Ann",
            "age is 40",
            "email is ann@example.org",
            "confirmed",
        ]
        assert (record.data["name"], record.data["age"], record.data["mistakes"]) == ("Ann", 40, 0)

    @pytest.mark.parametrize("age", ["forty", "0", "121", "-5", "4e1", " 40"])
    async def test_an_age_that_is_none_counts_as_a_mistake_and_is_asked_again(self, age: str) -> None:
        record = await record_after(*REGISTRATION[:2], message(age, 3))

        assert record is not None
        assert (record.state, record.data["mistakes"]) == ("Registration:age", 1)

    async def test_a_correction_by_button_is_counted_and_asked_for(self) -> None:
        asked = await record_after(*REGISTRATION, press("change:age"))
        answered = await record_after(*REGISTRATION, press("change:age"), message("41", 5))

        assert asked is not None
        assert asked.state == "Registration:age"
        assert answered is not None
        assert (answered.state, answered.data["age"], answered.data["corrections"]) == (
            "Registration:confirm",
            41,
            1,
        )

    async def test_editing_an_answer_corrects_it(self) -> None:
        record = await record_after(*REGISTRATION, message("Anne", 2, kind="edited_message"))

        assert record is not None
        assert (record.data["name"], record.data["corrections"]) == ("Anne", 1)

    async def test_cancelling_leaves_no_record(self) -> None:
        assert await record_after(*REGISTRATION, message("/cancel", 5)) is None

    async def test_beginning_again_keeps_the_number_of_starts_alone(self) -> None:
        record = await record_after(*REGISTRATION, message("/start", 5))

        assert record is not None
        assert record.state == "Registration:name"
        assert record.data["starts"] == 2
        assert "name" not in record.data

    @pytest.mark.parametrize("update", [message("hello"), press(CONFIRM), press("change:shoe size")])
    async def test_what_is_not_for_the_bot_leaves_no_record(self, update: JSON) -> None:
        assert await record_after(update) is None

    async def test_an_error_of_a_handler_is_counted_and_the_next_update_handled(self) -> None:
        storage = MemoryStorage()
        dispatcher, bot = make_dispatcher(storage), make_bot()
        await handle_in_order(dispatcher, bot, REGISTRATION[:1])
        for record in storage.storage.values():
            record.data.clear()

        assert await handle_in_order(dispatcher, bot, (*REGISTRATION[1:2], message("/cancel", 3))) == 1
        assert [record.state for record in storage.storage.values()] == [None]


def by_conversation(updates: list[JSON]) -> dict[Any, list[int]]:
    """Key -> the ids of its updates, as they come."""
    conversations: dict[Any, list[int]] = {}
    for update in updates:
        conversations.setdefault(Conversation().extract(update), []).append(update["update_id"])
    return conversations


class TestFeeder:
    def test_every_update_is_handed_out_once_and_each_conversation_in_order(self) -> None:
        feeder = Feeder(UPDATES, Conversation(), batch_size=50)
        handed_out: list[JSON] = []
        while batch := feeder.take():
            handed_out += [update for updates in batch.updates.values() for update in updates]
            feeder.finish(batch)
        conversations = by_conversation(handed_out)
        conversations[None].sort()  # updates of no conversation have no order

        assert conversations == by_conversation(UPDATES)

    def test_no_batch_is_larger_than_was_asked_for(self) -> None:
        feeder = Feeder(UPDATES, Conversation(), batch_size=7)
        batches = [feeder.take() for _ in range(20)]

        assert [len(batch or ()) for batch in batches] == [7] * 20

    def test_nobody_is_given_a_conversation_that_another_has(self) -> None:
        feeder = Feeder(
            [message("one", 1), message("two", 2), message("three", 3)], Conversation(), batch_size=1
        )
        first = feeder.take()
        meanwhile = feeder.take()
        assert first is not None
        feeder.finish(first)

        assert meanwhile is None
        assert feeder.take() == Batch({KEY: [message("two", 2)]})

    def test_what_is_put_back_comes_again_before_what_follows(self) -> None:
        feeder = Feeder([message(str(number), number) for number in range(5)], Conversation(), batch_size=2)
        first = feeder.take()
        assert first is not None
        feeder.put_back(first)

        assert feeder.take() == first

    def test_updates_of_no_conversation_go_each_by_itself(self) -> None:
        posts = [update for update in UPDATES if "channel_post" in update]
        batch = Feeder(posts, Conversation(), batch_size=len(posts)).take()

        assert batch is not None
        assert len(batch.updates) == len(posts) == len(batch)


class TestReport:
    def test_equal_records_do_not_differ_whatever_their_versions(self) -> None:
        assert find_differences({1: State(state="a")}, {1: State(state="a", version=7)}) == ()

    @pytest.mark.parametrize(
        ("expected", "found", "told"),
        [
            ({1: State(state="a", data={"x": 1})}, {}, "1: no record, expected a with x"),
            ({}, {1: State(data={"x": 1})}, "1: None with x, expected no record"),
            ({1: State(state="a")}, {1: State(state="b")}, "1: state 'b', expected 'a'"),
            ({1: State(data={"x": [1]})}, {1: State(data={"x": []})}, "1: data['x'] [], expected [1]"),
            ({1: State(data={"x": 1})}, {1: State()}, "1: data['x'] None, expected 1"),
        ],
    )
    def test_a_difference_tells_what_differs(
        self, expected: dict[Any, State], found: dict[Any, State], told: str
    ) -> None:
        assert [str(each) for each in find_differences(expected, found)] == [told]


def run_on(cluster: RayCluster, **changes: Any) -> Report:
    """What a small run on the tests' Ray comes to."""
    config = DemoConfig(address=cluster.address, **({"updates": 600, "workers": 1, "shards": 1} | changes))
    return run(config, Console(file=io.StringIO()))


def bots(cluster: RayCluster) -> set[str]:
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return {name.partition("/")[0] for name in names if name.startswith("demo-")}


def printed(report: Report) -> str:
    output = io.StringIO()
    print_report(report, Console(file=output, width=200))
    return output.getvalue()


def started_once(updates: list[JSON]) -> list[tuple[Any, int]]:
    """Conversations that have a record in the end and began only once, and the updates that began them."""
    records = asyncio.run(reference_records(updates, lambda _: None))
    began_once = {key for key, record in records.items() if record.data["starts"] == 1}
    starts = [update for update in updates if update.get("message", {}).get("text", "").startswith("/start")]
    found = [(Conversation().extract(update), update["update_id"]) for update in starts]
    return [(key, update_id) for key, update_id in found if key in began_once]


# What workers are to call is made in functions, so it travels by value: they need not import this file.


def once(path: Path) -> Callable[[], bool]:
    """True for whoever calls it first, in whatever process."""

    def is_first() -> bool:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    return is_first


def killing_a_shard(path: Path) -> Callable[[str], None]:
    """Kills the first shard of a bot, once."""
    is_first = once(path)

    def kill(bot_name: str) -> None:
        if is_first():
            with Storage() as storage:
                os.kill(storage.describe(bot_name).shards[0].pid, signal.SIGKILL)

    return kill


@pytest.mark.ray
@pytest.mark.slow
class TestRuns:
    """A process that imports aiogram costs seconds: there are few runs, and no more workers than need be."""

    def test_many_workers_arrive_where_one_does_and_a_bot_that_is_to_be_kept_stays(
        self, cluster: RayCluster, tmp_path: Path
    ) -> None:
        report = run_on(cluster, workers=2, shards=2, keep=True, store=f"rocksdb://{tmp_path}")
        with Storage() as storage:
            shards = storage.describe(report.bot_name).shards
            storage.drop(report.bot_name)

        assert report.agrees
        assert (report.updates, report.lost_workers, report.shards) == (600, 0, 2)
        assert report.handovers > 50
        assert sum(report.states.values()) == report.conversations
        assert f"All {report.conversations} conversations agree" in printed(report)
        kept = report.conversations - report.states["no record"]
        assert sum(shard.statistics.records for shard in shards) == kept

    def test_a_killed_worker_and_a_killed_shard_change_nothing(
        self, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        is_first, kill_shard = once(tmp_path / "first"), killing_a_shard(tmp_path / "second")

        def handle_and_kill(bot_name: str, batch: Batch) -> Any:
            if is_first():  # half of each conversation is handled, and nobody hears of it
                demo_worker.handle(bot_name, Batch({key: each[:1] for key, each in batch.updates.items()}))
                os.kill(os.getpid(), signal.SIGKILL)
            done = demo_worker.handle(bot_name, batch)
            kill_shard(bot_name)
            return done

        monkeypatch.setattr(demo_crew, "handle", handle_and_kill)
        report = run_on(cluster)

        assert (tmp_path / "second").exists()
        assert report.lost_workers == 1
        assert report.agrees
        assert report.restarted_empty == ()
        assert "1 worker died" in printed(report)
        assert bots(cluster) == set()

    def test_a_killed_shard_in_memory_is_told_of_and_its_lost_records_too(
        self, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        kill_shard = killing_a_shard(tmp_path / "first")

        def handle_and_kill(bot_name: str, batch: Batch) -> Any:
            done = demo_worker.handle(bot_name, batch)
            kill_shard(bot_name)
            return done

        monkeypatch.setattr(demo_crew, "handle", handle_and_kill)
        report = run_on(cluster, store="memory://")

        assert not report.agrees
        assert report.restarted_empty == (0,)
        assert report.differences
        assert "the actor of shard 0 died and came back empty" in printed(report)

    def test_updates_lost_and_handled_twice_are_found_and_a_record_that_nothing_called_for(
        self, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        is_first = once(tmp_path / "first")
        lost, repeated = started_once(list(generate_updates(600, DemoConfig.seed)))[:2]

        def part_of(batch: Batch, wanted: Callable[[JSON], bool]) -> Batch:
            return Batch({key: [*filter(wanted, updates)] for key, updates in batch.updates.items()})

        def handle_wrongly(bot_name: str, batch: Batch) -> Any:
            done = demo_worker.handle(bot_name, part_of(batch, lambda each: each["update_id"] != lost[1]))
            demo_worker.handle(bot_name, part_of(batch, lambda each: each["update_id"] == repeated[1]))
            if is_first():
                with Storage() as storage:
                    storage.set_state(bot_name, "stray", State(state="stray"))
            return done

        monkeypatch.setattr(demo_crew, "handle", handle_wrongly)
        report = run_on(cluster)

        assert not report.agrees
        assert {difference.key for difference in report.differences} == {lost[0], repeated[0]}
        assert report.stray_records == 1
        assert f"2 of {report.conversations} conversations differ" in printed(report)
        assert "1 record too many" in printed(report)

    def test_workers_that_die_again_and_again_end_the_run(
        self, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def die(bot_name: str, batch: Batch) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(demo_crew, "prepare", lambda sample: None)
        monkeypatch.setattr(demo_crew, "handle", die)
        monkeypatch.setattr(demo_crew, "_MAX_LOST", 2)
        with pytest.raises(ConfigurationError, match="3 workers died"):
            run_on(cluster)

        assert bots(cluster) == set()

    def test_workers_that_cannot_start_end_the_run(
        self, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def prepare(_: list[JSON]) -> None:
            raise ModuleNotFoundError("No module named 'aiogram'")

        monkeypatch.setattr(demo_crew, "prepare", prepare)
        with pytest.raises(ConfigurationError, match=r"no worker could be started: .*'aiogram'"):
            run_on(cluster)

        assert bots(cluster) == set()

    def test_an_interrupted_run_leaves_no_actors(
        self, cluster: RayCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(demo_crew, "prepare", lambda sample: None)
        monkeypatch.setattr(demo_crew, "handle", lambda bot_name, batch: "done")
        monkeypatch.setattr(demo_crew.Crew, "_note", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_on(cluster)

        assert bots(cluster) == set()
