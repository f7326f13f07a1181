"""The examples, each in a process of its own, talk to scripted users; processes are killed meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from fsm_ray import Storage
from fsm_ray.errors import NamespaceUnavailable, UnknownBot
from tests.bot_api import BotApi, User
from tests.bot_api.server import TOKEN
from tests.conftest import RayCluster, eventually

pytestmark = [pytest.mark.ray, pytest.mark.slow]

EXAMPLES = Path(__file__).parent.parent / "examples"
FRAMEWORKS = ["aiogram_bot", "telegram_bot", "telebot_bot"]
ALL = [*FRAMEWORKS, "cluster_bot"]

DIALOGUE = [
    "What is your name?",
    "What is your email?",
    "Ann, ann@example.org: is that right?",
    "Welcome, Ann!",
]


class Example:
    """An example's process, and the Bot API that it talks to; what it writes goes to a file."""

    def __init__(self, name: str, api: BotApi, environment: dict[str, str], log: Path) -> None:
        self.name = name
        self.api = api
        self._arguments = [sys.executable, str(EXAMPLES / f"{name}.py")]
        self._environment = environment
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> str:
        return self._log.read_text()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._arguments, env=os.environ | self._environment, stdout=log, stderr=subprocess.STDOUT
            )

    def kill(self) -> None:
        """As kill -9; it must be running."""
        assert self._process is not None
        assert self._process.poll() is None, "it ended by itself"
        self.stop()

    def stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running(name: str, cluster: RayCluster, directory: Path, **more: str) -> Iterator[Example]:
    """Run an example over a store on the disk; it is stopped in the end, and its bot dropped."""
    with BotApi() as api:
        environment = {
            "RAY_ADDRESS": cluster.address,
            "BOT_TOKEN": TOKEN,
            "API_BASE": api.url,
            "FSM_RAY_STORE": f"rocksdb://{directory}/store",
            "NO_PROXY": "127.0.0.1",
        }
        example = Example(name, api, environment | more, directory / "log")
        example.start()
        try:
            yield example
        finally:
            example.stop()
            with Storage() as storage:
                for bot_name in ALL:
                    eventually(partial(is_dropped, storage, bot_name), f"{bot_name} dropped")


@pytest.fixture(scope="module", params=ALL)
def shared(
    request: pytest.FixtureRequest, cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Example]:
    """Each example, for all tests that any of them must pass: starting one takes seconds."""
    with running(request.param, cluster, tmp_path_factory.mktemp(request.param)) as example:
        yield example


@pytest.fixture
def example(shared: Example) -> Iterator[Example]:
    """It is running, and serves other users too: each test has users of its own."""
    yield shared
    sys.stdout.write(shared.output)  # pytest shows it where a test failed


Start = Callable[..., Example]


@pytest.fixture
def start(cluster: RayCluster, tmp_path: Path) -> Iterator[Start]:
    """Starts an example for one test."""
    with contextlib.ExitStack() as stack:

        def start(name: str, **more: str) -> Example:
            example = stack.enter_context(running(name, cluster, tmp_path, **more))
            stack.callback(lambda: sys.stdout.write(example.output))
            return example

        yield start


def is_dropped(storage: Storage, bot_name: str) -> bool:
    """Whether the bot is gone now; not while an actor that was killed is just restarting."""
    try:
        storage.drop(bot_name)
    except UnknownBot:
        return True
    except NamespaceUnavailable:
        return False
    return True


def register(user: User, name: str, email: str) -> Iterator[None]:
    """A whole dialogue, a step at a time."""
    user.send("/start")
    yield
    user.hear("What is your name?")
    user.send(name)
    yield
    user.hear("What is your email?")
    user.send(email)
    yield
    user.hear(f"{name}, {email}: is that right?")
    query = user.press("Yes")
    yield
    user.hear(f"Welcome, {name}!")
    assert user.wait_for_answer(query) == ""


# Before those of all examples: one of the same bot would be running by then.


def test_what_a_killed_worker_had_in_its_hands_goes_to_another_one(start: Start) -> None:
    example = start("cluster_bot", WORKERS="2")
    ann = User(example.api, 7)
    ann.send("/start")
    ann.hear("your name")

    with example.api.held("sendMessage") as held:
        ann.send("Ann")
        held.wait_until_reached()
        for pid in map(int, re.findall(r"a worker is process (\d+)", example.output)):
            os.kill(pid, signal.SIGKILL)
            if held.is_left_within(1.0):
                break
    ann.hear("your email")
    ann.send("ann@example.org")
    ann.hear("is that right?")
    ann.press("Yes")
    ann.hear("Welcome, Ann!")

    assert ann.shown == DIALOGUE
    assert "goes to another worker" in example.output


def test_a_dialogue_outlives_the_actor_and_the_workers(start: Start) -> None:
    example = start("failover", PAUSE_S="1")
    ann = User(example.api, 7)

    for _ in register(ann, "Ann", "ann@example.org"):
        eventually(partial(has_killed, example, example.output.count("killing") + 1), "one more kill")

    assert "killing the actor" in example.output
    assert "killing a worker" in example.output
    # Twice is all right, see the example; left out or out of order is not.
    assert [text for text, _ in itertools.groupby(ann.shown)] == DIALOGUE


def has_killed(example: Example, times: int) -> bool:
    return example.output.count("killing") >= times


def wait_until_stored(bot_name: str, user: User, state: str) -> None:
    """python-telegram-bot's handlers answer first, and return the new state then."""

    def is_stored(storage: Storage) -> bool:
        found = [each.state for each in storage.scan(bot_name) if str(user.chat_id) in str(each.key)]
        return any((each.state or "").endswith(state) for each in found)

    with Storage() as storage:
        eventually(partial(is_stored, storage), f"a conversation of {user.chat_id} in {state}")


def test_two_users_register_at_once_and_are_not_mixed_up(example: Example) -> None:
    ann, bob = User(example.api, 1001), User(example.api, 2002)

    for _ in itertools.zip_longest(
        register(ann, "Ann", "ann@example.org"), register(bob, "Bob", "bob@example.org")
    ):
        pass
    bob.send("/status")
    bob.hear("name: Bob, email: bob@example.org")
    bob.send("/cancel")
    bob.hear("Forgotten")
    bob.send("/status")
    bob.hear("I know nothing about you")

    assert ann.shown == DIALOGUE


def test_a_wrong_answer_is_asked_for_again_and_a_dialogue_can_begin_again(example: Example) -> None:
    ann = User(example.api, 3003)
    ann.send("/start")
    ann.hear("your name")
    ann.send("An")
    ann.hear("your email")
    ann.send("no address")
    ann.hear("That is no email address.")
    ann.send("ann@example.org")
    ann.hear("An, ann@example.org")
    ann.press("Start again")
    ann.hear("your name")
    ann.send("Ann")
    ann.hear("your email")
    ann.send("ann@example.org")
    ann.hear("Ann, ann@example.org")
    first = ann.press("Yes")
    ann.hear("Welcome, Ann!")

    assert ann.wait_for_answer(first) == ""


def test_a_killed_bot_goes_on_where_it_was(example: Example) -> None:
    api, ann = example.api, User(example.api, 4004)
    ann.send("/start")
    ann.hear("your name")
    ann.send("Ann")
    ann.hear("your email")
    api.wait_until_polled()
    # The next update is handled, and never confirmed: Telegram delivers it again after the kill.
    with api.held("getUpdates") as held:
        ann.send("ann@example.org")
        ann.hear("is that right?")
        held.wait_until_reached()
        wait_until_stored(example.name, ann, "confirm")
        example.kill()
        held.wait_until_left()
    ann.press("Yes")
    example.start()
    ann.hear("Welcome, Ann!")

    api.wait_until_confirmed()
    assert ann.shown == DIALOGUE
