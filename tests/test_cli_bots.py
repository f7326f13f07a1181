"""The commands on a running cluster: what they print, what they change, and how they end."""

from __future__ import annotations

import importlib.metadata
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import services
from rich.text import Text

import fsm_ray
from fsm_ray import AsyncStorage, State, Storage, cli
from fsm_ray.bench.servers import ValkeyServer, temporary_directory
from fsm_ray.cli import bot_checks, doctor, looks
from fsm_ray.cli.texts import key_text, read_data, read_key, read_position
from fsm_ray.codec import wire
from fsm_ray.errors import (
    EncryptionKeysUnusable,
    FsmRayError,
    InvalidData,
    InvalidInput,
    InvalidKey,
    NamespaceUnavailable,
    PickleNotAllowed,
    StoreUnavailable,
    UnknownBot,
)
from fsm_ray.notes import Version
from fsm_ray.routing import directory
from fsm_ray.transfer import typed_json

from . import test_transfer
from .conftest import DEADLINE_S, RayCluster
from .test_transfer import DATA, KEYS, Colour, Point

COMMAND = str(Path(sys.executable).with_name("fsm-ray"))

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process: its exit code, and what it printed on stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fsm-ray", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        code = stopped.value.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def bot(cluster: RayCluster) -> Iterator[str]:
    """A bot of two shards, for all tests of this file: each has keys of its own."""
    name = f"cli-{uuid.uuid4().hex[:8]}"
    with Storage() as storage:
        storage.init(name, shards=2)
        yield name
        with suppress(UnknownBot):
            storage.drop(name)


@pytest.fixture
def storage(bot: str) -> Iterator[Storage]:
    with Storage() as storage:
        yield storage


@pytest.fixture
def key() -> str:
    """A key that no other test has."""
    return uuid.uuid4().hex


def objects(out: str) -> list[Any]:
    return [json.loads(line) for line in out.splitlines()]


# Keys and data on the command line


@pytest.mark.parametrize("key", KEYS)
def test_every_key_can_be_given_as_it_is_shown(key: Any) -> None:
    found = read_key(key_text(key))

    assert (type(found), found) == (type(key), key)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("42", 42),
        (" -100", -100),
        ("(-100, 42)", (-100, 42)),
        ("[-100, [42, null]]", (-100, (42, None))),
        ('"42"', "42"),
        ("b'x'", b"x"),
        ('("a", {"$int": "9"})', ("a", 9)),
        ("null", None),
        ("None", None),
        ("true", True),
    ],
)
def test_a_key_is_a_literal(text: str, key: Any) -> None:
    found = read_key(text)

    assert (type(found), found) == (type(key), key)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc",
        "__import__('os')",
        "{1}",
        '{"a": 1}',
        '{"$pickle": "gA=="}',
        "nan",
        "NaN",
        "(" * 3_000,
        "1+2j",
        "{1: 2}",
        '{"$dataclass": [1]}',
    ],
)
def test_what_is_no_key_is_refused_and_what_is_accepted_told(text: str) -> None:
    with pytest.raises(InvalidKey, match="a key is written as a literal of Python or JSON: 42, "):
        read_key(text)


def test_data_keeps_its_types_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"n": 1.0}'))

    assert read_data('{"a": {"$tuple": [1, "x"]}}') == {"a": (1, "x")}
    assert read_data("-") == {"n": 1.0}
    with pytest.raises(PickleNotAllowed):
        read_data('{"a": {"$pickle": "gASVAAA="}}')
    assert read_data(f'{{"a": {10**30}}}') == {"a": 10**30}
    for text in ("[1]", "{", "[" * 3_000, '{"a": {"$date": "x"}}', '{"a": {"$enum": ["none", "C", "A"]}}'):
        with pytest.raises(InvalidData, match=r"is none|is no value here|is a JSON object"):
            read_data(text)


@pytest.mark.parametrize("text", ["[]", "[-1]", "[1.0]", "7", "x", "[" * 3_000])
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="is no position: --since takes"):
        read_position(text)


# Conversations


@pytest.mark.ray
def test_what_set_writes_get_prints(run: Run, bot: str, storage: Storage, key: str) -> None:
    code, out, _ = run(
        *("set", bot, repr(key), "--flow", "order", "--state", "pay", "--data", '{"at": {"$tuple": [1]}}')
    )
    state = storage.get_state(bot, key)

    assert state == State(flow="order", state="pay", data={"at": (1,)})
    assert (code, out) == (
        0,
        f"{bot} '{key}' is in order:pay with 1 field of data, version {state.version}\n",
    )
    code, out, _ = run("get", bot, repr(key), "--json")
    assert code == 0
    assert objects(out) == [
        {
            "key": key,
            "flow": "order",
            "state": "pay",
            "data": {"at": {"$tuple": [1]}},
            "version": state.version,
            "expires_at": None,
        }
    ]


@pytest.mark.ray
def test_set_without_merge_replaces_the_record_and_with_it_keeps_the_rest(
    run: Run, bot: str, storage: Storage, key: str
) -> None:
    storage.set_state(bot, key, State(flow="order", state="pay", data={"a": 1, "b": 2}))
    run("set", bot, repr(key), "--merge", "--data", '{"b": 3, "c": 4}', "--ttl", "60")
    merged = storage.get_state(bot, key)
    run("set", bot, repr(key), "--merge", "--state", "done")
    moved = storage.get_state(bot, key)
    run("set", bot, repr(key), "--state", "new")

    assert merged == State(flow="order", state="pay", data={"a": 1, "b": 3, "c": 4})
    assert merged.expires_at is not None
    assert moved == State(flow="order", state="done", data={"a": 1, "b": 3, "c": 4})
    assert storage.get_state(bot, key) == State(state="new")


@pytest.mark.ray
@pytest.mark.parametrize("ttl_s", [100.0, math.inf])
def test_a_merge_keeps_the_time_to_live_that_the_record_was_given(
    run: Run, *, bot_name: str, storage: Storage, ttl_s: float
) -> None:
    storage.init(bot_name, ttl_s=7.0)
    storage.set_state(bot_name, 1, State(state="a", data={"n": 1}), ttl_s=ttl_s)

    def left_s() -> float:
        state = storage.get_state(bot_name, 1)
        assert state is not None
        return math.inf if state.expires_at is None else state.expires_at.timestamp() - time.time()

    for given in (("--data", '{"n": 2}'), ("--state", "b"), ("--flow", "f", "--data", '{"m": 3}')):
        assert run("set", bot_name, "1", "--merge", *given)[0] == 0
        assert left_s() > 50
    assert storage.get_state(bot_name, 1) == State(flow="f", state="b", data={"n": 2, "m": 3})
    assert run("set", bot_name, "1", "--merge", "--ttl", "1000")[0] == 0
    assert 900 < left_s() <= 1_000
    code, _, err = run("set", bot_name, "2", "--merge", "--ttl", "1000")
    assert (code, err) == (1, f"{bot_name} has no record of 2\n")
    assert run("set", bot_name, "1", "--ttl", "1000")[0] == cli.EXIT_USAGE


@pytest.mark.ray
def test_the_time_to_live_of_a_record_in_absolute_mode_goes_on_with_a_merge(
    run: Run, bot_name: str, storage: Storage
) -> None:
    storage.init(bot_name, ttl_mode="absolute")
    storage.set_state(bot_name, 1, State(state="a"), ttl_s=100.0)
    first = storage.get_state(bot_name, 1)
    run("set", bot_name, "1", "--merge", "--state", "b")
    then = storage.get_state(bot_name, 1)

    assert first is not None
    assert first.expires_at is not None
    assert then is not None
    assert then.expires_at is not None
    assert abs((then.expires_at - first.expires_at).total_seconds()) < 1


@pytest.mark.ray
def test_what_is_looked_at_needs_neither_classes_nor_pickles(
    run: Run, *, bot_name: str, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.init(bot_name)
    position = json.dumps(list(storage.position(bot_name)))
    keys = [Point(1, 2.0), Colour.RED, 10**5_000, (-100, Point(1, 2.0))]
    for key in keys:
        storage.set_state(bot_name, key, State(state="x", data=DATA | {"huge": 10**5_000}))
    shown = [key_text(key) for key in keys]
    forms = [(), ("--json",)]
    commands = [("scan", bot_name), ("watch", bot_name, "--since", position, "--limit", "4")]
    commands += [("get", bot_name, each) for each in shown]
    before = [run(*command, *form)[:2] for command in commands for form in forms]
    for name in ("Colour", "Point", "Place", "Model", "Odd"):
        monkeypatch.delattr(test_transfer, name)

    assert [run(*command, *form)[:2] for command in commands for form in forms] == before
    assert {code for code, _ in before} == {0}
    assert run("set", bot_name, shown[0], "--merge", "--data", '{"new": 1}')[0] == 0
    for each in shown:
        assert run("clear", bot_name, each, "--yes")[1] == f"Cleared {each} of {bot_name}\n"


@pytest.fixture
def of_a_newer_version(bot_name: str, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bot of four conversations, two of which hold what this version does not know."""
    storage.init(bot_name)
    for number in range(3):
        storage.set_state(bot_name, number, State(data={"x": Point(1, 2.0) if number == 1 else 0}))
    storage.set_state(bot_name, Point(1, 2.0), State())
    monkeypatch.delitem(typed_json._NESTED, wire.NAMED_TUPLE)
    return bot_name


@pytest.mark.ray
def test_what_a_newer_version_wrote_is_left_out_of_a_scan_and_named(
    run: Run, of_a_newer_version: str
) -> None:
    code, out, err = run("scan", of_a_newer_version)

    assert (code, len(out.splitlines())) == (1, 2)
    assert min(line.split(" is left out: ")[0] for line in err.splitlines()) == "1"


@pytest.mark.ray
@pytest.mark.parametrize("merge", [(), ("--merge",)])
def test_a_version_that_is_not_the_expected_one_changes_nothing(
    run: Run, bot: str, storage: Storage, key: str, merge: tuple[str, ...]
) -> None:
    version = storage.set_state(bot, key, State(state="old"))
    code, _, err = run(
        *("set", bot, repr(key), "--state", "new", "--expected-version", str(version + 1), *merge)
    )

    assert (code, "expected version" in err) == (cli.EXIT_FAILED, True)
    assert storage.get_state(bot, key) == State(state="old")
    assert run("set", bot, repr(key), "--state", "x", "--expected-version", str(version), *merge)[0] == 0


@pytest.mark.ray
def test_a_negative_number_is_a_key_and_no_option(run: Run, bot: str) -> None:
    assert run("set", bot, "-100", "--state", "x")[0] == 0
    assert run("get", bot, "-100")[1].startswith("key      -100\nflow     -\nstate    x\n")
    assert run("clear", bot, "-100", "--yes")[1] == f"Cleared -100 of {bot}\n"


@pytest.mark.ray
def test_without_a_record_get_fails_and_clear_does_not(run: Run, bot: str, key: str) -> None:
    assert run("get", bot, repr(key), "--json") == (1, "null\n", f"{bot} has no record of '{key}'\n")
    code, out, _ = run("clear", bot, repr(key), "--yes", "--json")
    assert (code, objects(out)) == (0, [{"key": key, "cleared": False}])


@pytest.mark.ray
def test_what_removes_something_is_refused_where_nobody_can_be_asked(
    run: Run, *, bot: str, storage: Storage, key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    storage.set_state(bot, key, State(state="x"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    path = tmp_path / "export"
    path.write_text("mine")
    for arguments in (("clear", bot, repr(key)), ("drop", bot), ("export", bot, str(path))):
        code, _, err = run(*arguments)
        assert (code, "Nobody can be asked here: say --yes" in err) == (cli.EXIT_USAGE, True)

    assert storage.get_state(bot, key) == State(state="x")
    assert path.read_text() == "mine"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.ray
@pytest.mark.parametrize(("answer", "is_cleared"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_on_a_terminal_it_is_asked(
    run: Run,
    *,
    bot: str,
    storage: Storage,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    is_cleared: bool,
) -> None:
    storage.set_state(bot, key, State(state="x"))
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    code, _, _ = run("clear", bot, repr(key))

    assert code == (0 if is_cleared else 1)
    assert (storage.get_state(bot, key) is None) == is_cleared


@pytest.mark.ray
def test_what_is_asked_is_no_longer_than_a_question(
    run: Run, *, bot: str, storage: Storage, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.set_state(bot, key, State(data={"x": "y" * 100_000}))
    for stdin in (io.StringIO(), Terminal("n\n")):
        monkeypatch.setattr(sys, "stdin", stdin)
        code, out, err = run("clear", bot, repr(key))
        assert (code, len(out + err) < 500) == (1 if stdin.isatty() else cli.EXIT_USAGE, True)


class InterruptedTerminal(Terminal):
    def readline(self, *_: object) -> Any:
        raise KeyboardInterrupt


@pytest.mark.ray
def test_ctrl_c_at_a_question_ends_with_130_and_changes_nothing(
    run: Run, *, bot: str, storage: Storage, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.set_state(bot, key, State(state="x"))
    monkeypatch.setattr(sys, "stdin", InterruptedTerminal())

    assert run("clear", bot, repr(key))[0] == cli.EXIT_INTERRUPTED
    assert storage.get_state(bot, key) == State(state="x")


@pytest.mark.ray
def test_nothing_that_users_wrote_commands_the_terminal(
    run: Run, bot: str, storage: Storage, key: str
) -> None:
    storage.set_state(bot, key, State(flow=key, state="\x1b[2J", data={"\x9b": "Zoë\n\x07"}))
    for arguments in (("get", bot, repr(key)), ("scan", bot, "--flow", key), ("count", bot, "--by", "state")):
        for form in ((), ("--json",)):
            code, out, _ = run(*arguments, *form)
            assert code == 0
            assert "\\u001b[2J" in out
            assert out.replace("\n", "").isprintable()


# Across


@pytest.mark.ray
def test_scan_and_count_see_a_flow_a_state_and_pages(run: Run, bot: str, storage: Storage, key: str) -> None:
    for number in range(5):
        storage.set_state(bot, (key, number), State(flow=key, state="odd" if number % 2 else "even"))
    _, out, _ = run("scan", bot, "--flow", key, "--json")
    lines = objects(out)
    _, first, _ = run("scan", bot, "--flow", key, "--json", "--limit", "2")
    _, rest, _ = run("scan", bot, "--flow", key, "--json", "--after", json.dumps(lines[1]["key"]))
    _, counted, _ = run("count", bot, "--by", "state", "--json")
    _, shown, _ = run("count", bot, "--by", "flow")

    assert sorted(line["key"] for line in lines) == [[key, number] for number in range(5)]
    assert objects(first) + objects(rest) == lines
    assert {"flow": key, "state": "even", "count": 3} in objects(counted)
    assert f"         5  {key}\n" in shown
    assert run("count", bot)[1] == f"{storage.count(bot)}\n"


@pytest.mark.ray
def test_a_watch_tells_changes_since_a_position_and_where_to_go_on(
    run: Run, bot: str, storage: Storage, key: str
) -> None:
    position = list(storage.position(bot))
    storage.set_state(bot, key, State(state="a"))
    storage.set_state(bot, key, State(state="b"))
    storage.clear(bot, key)
    code, out, err = run("watch", bot, "--since", json.dumps(position), "--limit", "3", "--json")
    changes = objects(out)
    _, shown, _ = run("watch", bot, "--since", json.dumps(position), "--limit", "3")

    assert code == 0
    assert [change["before"] for change in changes] == [
        None,
        {"flow": None, "state": "a"},
        {"flow": None, "state": "b"},
    ]
    assert [change["now"] and change["now"]["state"] for change in changes] == ["a", "b", None]
    assert err == f"to go on: --since '{changes[-1]['position']}'\n"
    assert [line.split("  ")[1] for line in shown.splitlines()] == ["new -> a", "a -> b", "b -> no record"]
    code, _, err = run("watch", bot, "--since", "[1]")
    assert code == cli.EXIT_USAGE


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_ends_a_watch_with_130_and_a_closed_pipe_ends_one_quietly(
    cluster: RayCluster, bot: str, storage: Storage, key: str
) -> None:
    def watch() -> subprocess.Popen[str]:
        position = json.dumps(list(storage.position(bot)))
        storage.set_state(bot, key, State(state="x"))
        return subprocess.Popen(
            [COMMAND, "watch", bot, "--address", cluster.address, "--since", position],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    interrupted, piped = watch(), watch()
    for process in (interrupted, piped):
        assert process.stdout is not None
        assert process.stdout.readline() != ""
    interrupted.send_signal(signal.SIGINT)
    _, err = interrupted.communicate(timeout=DEADLINE_S)
    assert piped.stdout is not None
    piped.stdout.close()
    for number in range(2):
        storage.set_state(bot, key, State(state=str(number)))
    piped.wait(DEADLINE_S)
    assert piped.stderr is not None
    told = piped.stderr.read()
    piped.stderr.close()

    assert (interrupted.returncode, piped.returncode) == (cli.EXIT_INTERRUPTED, cli.EXIT_UNREAD)
    assert err.startswith("to go on: --since '[")
    assert "Traceback" not in err + told
    assert "BrokenPipe" not in told


@pytest.mark.ray
def test_a_message_commands_no_terminal_and_a_name_is_no_markup(
    run: Run, cluster: RayCluster, tmp_path: Path
) -> None:
    _, _, err = run("import", "bot", str(tmp_path / "\x1b[2J"))
    assert "\\u001b[2J: No such file" in err

    for command in ("describe", "upgrade"):
        code, _, err = run(command, "[/x]")
        assert (code, err.startswith("fsm-ray: bot name '[/x]': ")) == (cli.EXIT_USAGE, True)


# Bots


@pytest.mark.ray
def test_bots_are_listed_and_described_without_passwords(
    run: Run, bot: str, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    description = storage.describe(bot)
    secret = description.options.model_copy(update={"store": "redis://me:s3cret@host/0"})
    code, out, _ = run("bots", "--json")
    assert code == 0
    assert {"bot": bot} in objects(out)
    assert bot in run("bots")[1].splitlines()

    monkeypatch.setattr(
        Storage, "describe", lambda *_: directory.BotDescription(bot, secret, description.shards)
    )
    for form in ((), ("--json",)):
        code, out, _ = run("describe", bot, *form)
        assert code == 0
        assert "redis://me:***@host/0" in out
        assert "s3cret" not in out
    assert json.loads(out)["shards"][1]["statistics"]["records"] == description.shards[1].statistics.records


@pytest.mark.ray
@pytest.mark.parametrize("columns", [40, 80, 200, None])
def test_a_description_can_be_read_at_any_width(
    run: Run, bot: str, storage: Storage, monkeypatch: pytest.MonkeyPatch, columns: int | None
) -> None:
    if columns is not None:
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
        monkeypatch.setenv("COLUMNS", str(columns))
    found = storage.describe(bot)
    shards = found.shards
    store = f"rocksdb:///{'/'.join(['directory'] * 5)}"
    options = found.options.model_copy(update={"store": store})
    monkeypatch.setattr(Storage, "describe", lambda *_: directory.BotDescription(bot, options, shards))
    out = Text.from_ansi(run("describe", bot)[1]).plain
    lines = [line.split() for line in out.splitlines()]

    assert store in "".join(out.split())
    facts = [str(shard.pid) for shard in shards]
    if columns in {40, 80}:
        assert max(map(len, out.splitlines())) <= columns
        assert [["pid", pid] in lines for pid in facts] == [True, True]
        assert [["shard", number] in lines for number in ("0", "1", "all")] == [True] * 3
    else:
        [header] = [line for line in lines if line[:1] == ["shard"]]
        assert header[-1] == "recovery"
        assert [any(pid in line and len(line) > 9 for line in lines) for pid in facts] == [True, True]


@pytest.mark.ray
def test_versions_that_differ_and_where_the_keys_are_is_told(
    run: Run, bot: str, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = storage.describe(bot)
    cure = f"install fsm_ray {fsm_ray.__version__} on all nodes, and run: fsm-ray upgrade {bot}"

    def pretend(versions: list[Version | None], keys: str | None) -> None:
        shards = [
            replace(shard, version=version) for shard, version in zip(found.shards, versions, strict=True)
        ]
        options = found.options.model_copy(update={"encryption_keys": keys})
        description = directory.BotDescription(bot, options, shards)
        monkeypatch.setattr(Storage, "describe", lambda *_: description)

    pretend([Version(), Version()], "env:KEYS")

    def checked() -> looks.Check:
        return next(bot_checks.check_bot(storage, directory.Directory(None, DEADLINE_S), bot))

    for outcome in (run("describe", bot)[1], checked().told):
        assert "env:KEYS" in outcome
        assert "unknown version" not in outcome
        assert "To mend it" not in outcome
    assert checked().outcome == "ok"
    [told] = objects(run("describe", bot, "--json")[1])
    assert (told["is_encrypted"], told["other_versions"]) == (True, None)

    pretend([None, Version("0.0.9", 1)], None)
    others = f"shard 0: an unknown version; shard 1: fsm_ray 0.0.9 (protocol 1); here: {Version()}"
    out = " ".join(run("describe", bot)[1].split())
    assert f"Not all is of one version. {others}. To mend it: {cure}" in out
    assert "encryption_keys - (what its store keeps is not encrypted)" in out
    [told] = objects(run("describe", bot, "--json")[1])
    assert (told["is_encrypted"], told["other_versions"]) == (False, others)
    check = checked()
    assert (check.outcome, check.cure) == ("hint", cure)
    assert others in check.told


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (EncryptionKeysUnusable, "see to the keys on the nodes of its actors; they are not needed here"),
        (StoreUnavailable, "see to the store; the bot comes back by itself when its nodes can reach it"),
    ],
)
def test_what_a_bots_nodes_lack_is_mended_there(
    monkeypatch: pytest.MonkeyPatch, error: type[FsmRayError], cure: str
) -> None:
    def refuse(*_: object) -> None:
        raise error("it cannot be used")

    monkeypatch.setattr(Storage, "describe", refuse)
    with Storage() as storage:
        [check] = bot_checks.check_bot(storage, directory.Directory(None, 1.0), "bot")

    assert (check.outcome, check.cure) == ("problem", cure)


@pytest.mark.ray
def test_a_bot_that_is_not_there_is_told(run: Run, cluster: RayCluster) -> None:
    for command in (("describe",), ("count",), ("scan",), ("drop", "--yes"), ("watch",), ("export",)):
        code, _, err = run(command[0], "nobody", *command[1:])
        assert (code, "no bot 'nobody' on this Ray cluster" in err) == (cli.EXIT_FAILED, True)


@pytest.mark.ray
def test_drop_ends_the_bot_and_says_what_becomes_of_its_records(
    run: Run, bot_name: str, storage: Storage, tmp_path: Path
) -> None:
    storage.init(bot_name)
    code, out, _ = run("drop", bot_name, "--yes")

    assert (code, "lived in its actors alone, and go with them" in out) == (0, True)
    assert bot_name not in storage.bots()


@pytest.mark.ray
def test_upgrade_replaces_actors_of_another_version_and_with_force_of_this_one(
    run: Run, cluster: RayCluster, bot_name: str, storage: Storage, tmp_path: Path
) -> None:
    storage.init(bot_name, store=f"rocksdb://{tmp_path}")
    storage.set_data(bot_name, 1, {"kept": True})
    before = storage.describe(bot_name).shards[0].pid

    same, same_out, _ = run("upgrade", bot_name)
    _, forced_out, _ = run("upgrade", bot_name, "--force", "--json")

    assert (same, same_out) == (0, f"All shards of {bot_name} run fsm_ray {fsm_ray.__version__} already.\n")
    (told,) = objects(forced_out)
    version = {"old_version": fsm_ray.__version__, "new_version": fsm_ray.__version__}
    assert told == {"shard": 0, **version, "away_s": told["away_s"]}
    assert storage.describe(bot_name).shards[0].pid != before
    assert storage.get_data(bot_name, 1) == {"kept": True}
    storage.drop(bot_name)


# Moving


@pytest.mark.ray
def test_an_export_is_imported_once_and_what_is_refused_fails(
    run: Run, *, bot: str, bot_name: str, storage: Storage, key: str, tmp_path: Path
) -> None:
    storage.init(bot_name)
    storage.set_state(bot, key, State(flow="f", data={"pair": (1, 2)}))
    path = tmp_path / "export.jsonl"
    code, _, err = run("export", bot, str(path))
    assert (code, err.startswith("Exported ")) == (0, True)
    assert list(tmp_path.iterdir()) == [path]

    code, out, _ = run("import", bot_name, str(path), "--json")
    again = run("import", bot_name, str(path))
    assert code == 0
    assert storage.get_state(bot_name, key) == State(flow="f", data={"pair": (1, 2)})
    total = storage.count(bot_name)
    assert json.loads(out) == {"written": total, "skipped": 0, "refused": []}
    assert again[1].startswith(f"Imported 0 conversations into {bot_name}; {total} w")
    assert again[1].endswith(" there already, or ended\n")

    path.write_text(path.read_text().splitlines()[0] + "\n{}\n")
    code, _, err = run("import", bot_name, str(path))
    assert (code, "left out line 2: " in err, "left out the end: " in err) == (1, True, True)
    assert run("import", bot_name, str(tmp_path / "none"))[0] == cli.EXIT_USAGE
    assert run("import", bot_name, __file__)[0] == cli.EXIT_USAGE


@pytest.fixture
def one_conversation(bot_name: str, storage: Storage) -> str:
    """A bot of one conversation."""
    storage.init(bot_name)
    storage.set_state(bot_name, 1, State(state="x"))
    return bot_name


@pytest.mark.ray
def test_an_export_replaces_what_a_link_leads_to_with_its_mode_and_leaves_other_files_alone(
    run: Run, one_conversation: str, tmp_path: Path
) -> None:
    target, link, other = tmp_path / "target", tmp_path / "link", tmp_path / "link.part"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    other.write_text("mine")
    new = tmp_path / ("n" * 252)
    told = run("export", one_conversation, str(link), "--yes")
    run("export", one_conversation, str(new))

    assert told == (0, "", f"Exported 1 conversation of {one_conversation}\n")
    assert (link.is_symlink(), target.stat().st_mode & 0o777) == (True, 0o640)
    assert target.read_text() == new.read_text() != "old"
    assert new.stat().st_mode & 0o777 == 0o600
    assert other.read_text() == "mine"
    assert {*tmp_path.iterdir()} == {target, link, other, new}


@pytest.mark.ray
def test_an_export_that_is_not_whole_replaces_nothing_and_says_where_it_is(
    run: Run, of_a_newer_version: str, tmp_path: Path
) -> None:
    path = tmp_path / "export"
    path.write_text("mine")
    code, _, err = run("export", of_a_newer_version, str(path), "--yes")
    [part] = [each for each in tmp_path.iterdir() if each != path]

    assert (code, path.read_text()) == (1, "mine")
    assert f"{path} was left as it was; what could be exported is in {part}" in err
    assert len(part.read_text().splitlines()) == 4


@pytest.mark.ray
def test_an_export_goes_into_what_is_no_regular_file(run: Run, one_conversation: str, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE, text=True)
    code, _, _ = run("export", one_conversation, str(fifo))
    out, _ = reader.communicate(timeout=DEADLINE_S)

    assert (code, len(out.splitlines())) == (0, 3)
    assert fifo.is_fifo()


@pytest.mark.ray
def test_where_no_file_can_be_one_line_tells(run: Run, one_conversation: str, tmp_path: Path) -> None:
    for path in (tmp_path / ("n" * 300), tmp_path, tmp_path / "none" / "export"):
        code, _, err = run("export", one_conversation, str(path), "--yes")
        assert (code, err.count("\n")) == (cli.EXIT_USAGE, 1)


@pytest.mark.ray
@pytest.mark.slow
def test_an_export_whose_reader_goes_away_ends_as_commands_do_then(
    cluster: RayCluster, one_conversation: str, storage: Storage
) -> None:
    storage.set_many(one_conversation, {number: State(data={"x": "y" * 500}) for number in range(1_000)})
    export = subprocess.Popen(
        [COMMAND, "export", one_conversation, "--address", cluster.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert export.stdout is not None
    export.stdout.readline()
    export.stdout.close()
    export.wait(DEADLINE_S)
    assert export.stderr is not None
    told = export.stderr.read()
    export.stderr.close()

    assert (export.returncode, told) == (cli.EXIT_UNREAD, "")


@pytest.mark.ray
def test_an_import_that_is_interrupted_says_how_far_it_was(
    run: Run, bot_name: str, storage: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    storage.init(bot_name)
    path = tmp_path / "export"
    lines = ['{"fsm_ray_export":1,"bot":"b"}', *(f'{{"key":{number}}}' for number in range(600))]
    path.write_text("\n".join([*lines, '{"conversations":600}\n']))
    set_state = AsyncStorage.set_state

    async def interrupted(self: AsyncStorage, bot_name: str, key: Any, *args: Any, **given: Any) -> int:
        if key == 400:
            raise NamespaceUnavailable("it is gone")
        return await set_state(self, bot_name, key, *args, **given)

    monkeypatch.setattr(AsyncStorage, "set_state", interrupted)
    code, _, err = run("import", bot_name, str(path))

    assert code == cli.EXIT_UNAVAILABLE
    assert err == "Gone through 256 conversations: run it again to go on\nfsm-ray: it is gone\n"


@pytest.mark.ray
def test_what_an_import_refuses_is_told_without_commands_for_the_terminal(
    run: Run, one_conversation: str, tmp_path: Path
) -> None:
    path = tmp_path / "export"
    pickled = '{"key":1,"data":{"x":{"$pickle":"gA=="}}}'
    odd = '{"key":2,"\\u001b[2J\\u0007":1}'
    path.write_text(f'{{"fsm_ray_export":1,"bot":"b"}}\n{pickled}\n{odd}\n{{"conversations":2}}\n')
    code, _, err = run("import", one_conversation, str(path))

    assert (code, err.replace("\n", "").isprintable()) == (1, True)
    assert "left out line 2: it holds a pickled value: allow_pickle=True (--allow-pickle) accepts it" in err
    assert "left out line 3: " in err


@pytest.mark.ray
def test_an_importer_without_the_bots_id_names_its_option(run: Run, bot: str) -> None:
    code, _, err = run("import-from", "aiogram-redis", "redis://127.0.0.1:1", bot)

    assert (code, "--bot-id" in err) == (cli.EXIT_USAGE, True)


@pytest.mark.ray
def test_importers_tell_of_a_source_that_cannot_be_read(
    run: Run, bot: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing, nowhere = str(tmp_path / "none"), "redis://:s3cret@127.0.0.1:1"

    for kind in ("telebot-pickle", "telegram-pickle"):
        assert run("import-from", kind, nothing, bot)[0] == cli.EXIT_USAGE
    monkeypatch.setenv("FSM_RAY_SOURCE", nowhere)
    for kind in ("telebot-redis", "aiogram-redis"):
        for source in (nowhere, "env:FSM_RAY_SOURCE"):
            code, _, err = run("import-from", kind, source, bot, "--bot-id", "1")
            assert (code, "s3cret" in err) == (cli.EXIT_UNAVAILABLE, False)
            assert err.startswith("fsm-ray: the Redis at redis://:***@127.0.0.1:1: ")
            assert err.count("\n") == 1
        code, _, err = run("import-from", kind, "http://me:s3cret@h", bot, "--bot-id", "1")
        assert (code, err.count("\n"), "s3cret" in err) == (cli.EXIT_USAGE, 1, False)


# Ray


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is attached to no Ray, starts none, and none is to be found."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("a Ray was started"))
    monkeypatch.setattr(services, "canonicalize_bootstrap_address", lambda _: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    "command",
    [
        "bots",
        "bots --address local",
        "describe bot",
        "count bot",
        "scan bot",
        "watch bot",
        "get bot 1",
        "set bot 1 --state x",
        "clear bot 1 --yes",
        "drop bot --yes",
        "export bot",
        f"import bot {__file__}",
        "import-from aiogram-redis redis://127.0.0.1:9 bot --with-bot-id",
        "import-from telebot-redis redis://127.0.0.1:9 bot",
        f"import-from telebot-pickle {__file__} bot",
        f"import-from telegram-pickle {__file__} bot",
        "upgrade bot",
        "rotate-keys bot",
    ],
)
def test_no_command_starts_a_ray(run: Run, command: str) -> None:
    code, _, err = run(*command.split())

    assert code == cli.EXIT_UNAVAILABLE
    assert err.startswith("fsm-ray: no Ray at ")
    assert "Start one with `ray start --head`, or give the address of a running cluster" in err


@pytest.mark.usefixtures("no_ray")
def test_where_ray_was_looked_for_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("bots")[2].startswith("fsm-ray: no Ray at this machine: none runs here. ")

    monkeypatch.setattr(services, "canonicalize_bootstrap_address", lambda _: "127.0.0.1:9")
    assert "the one that ran at 127.0.0.1:9 is gone" in run("bots")[2]

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert run("bots")[2].startswith("fsm-ray: no Ray at 127.0.0.1:9, which RAY_ADDRESS names: ")
    assert run("bots", "--address", "127.0.0.2:9")[2].startswith("fsm-ray: no Ray at 127.0.0.2:9: ")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_ray_address_may_be_that_of_ray_client(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda address, **_: asked.append(address))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"{scheme}127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        directory.attach(None)

    assert asked == [address]


def test_ray_address_auto_names_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(services, "canonicalize_bootstrap_address", lambda _: None)

    assert directory.find_running(None) is None


@pytest.mark.usefixtures("no_ray")
def test_arguments_that_are_no_text_are_refused(run: Run) -> None:
    code, _, err = run("set", "bot", "5", "--state", "\udcff\udcfe")

    assert (code, err) == (
        cli.EXIT_USAGE,
        r"fsm-ray: '\udcff\udcfe' on the command line is no UTF-8: give text" + "\n",
    )


def test_help_and_version_import_neither_ray_nor_what_needs_it() -> None:
    for arguments in (["--help"], ["--version"], ["set", "--help"]):
        result = subprocess.run(
            [sys.executable, "-X", "importtime", COMMAND, *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}

        assert "fsm_ray.cli.conversations" in imported
        assert not imported & {"ray", "aiogram", "fsm_ray.storage", "fsm_ray.transfer"}


def test_the_package_gives_its_names_when_they_are_used() -> None:
    assert set(fsm_ray._HOMES) == set(fsm_ray.__all__) < set(dir(fsm_ray))
    assert all(getattr(fsm_ray, name).__name__ == name for name in fsm_ray.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Storages'"):
        _ = getattr(fsm_ray, "Storages")  # noqa: B009 - for mypy


def completed(words: str, **environment: str) -> tuple[list[str], str]:
    """What a shell is offered for the last word, and what would be printed beside."""
    asked = {"_FSM_RAY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    result = subprocess.run(
        [COMMAND], env=os.environ | asked | environment, capture_output=True, text=True, check=False
    )
    return result.stdout.split(), result.stderr


def test_completion_of_commands_is_offered() -> None:
    assert completed("fsm-ray ver") == (["verify"], "")


@pytest.mark.ray
def test_completion_of_a_bots_name_is_offered(cluster: RayCluster, bot: str) -> None:
    offered, told = completed(f"fsm-ray describe {bot[:-2]}", RAY_ADDRESS=cluster.address)

    assert (offered, told) == ([bot], "")


def test_where_no_ray_answers_no_name_is_offered_and_nothing_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for words in ("fsm-ray describe --address 127.0.0.1:9 ", f"fsm-ray describe --address {address} "):
            assert completed(words) == ([], "")


# Doctor


@pytest.mark.ray
def test_a_sound_cluster_has_no_problem(run: Run, bot: str, tmp_path: Path) -> None:
    code, out, _ = run("doctor", "--store", f"rocksdb://{tmp_path / 'new'}", "--json")
    checks = objects(out)

    assert [check for check in checks if check["outcome"] == "problem" and check["name"] != "packages"] == []
    names = [check["name"] for check in checks]
    assert sum(name.endswith(": clock") for name in names) == sum(node["Alive"] for node in ray.nodes())
    assert sum(name.startswith("store from ") for name in names) == 1
    assert {f"bot {bot}", f"bot {bot}: connections"} <= set(names)
    assert code == 0
    assert not (tmp_path / "new").exists()


@pytest.mark.ray
def test_what_is_wrong_is_told_with_how_to_mend_it(
    run: Run, cluster: RayCluster, bot: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock = time.time
    monkeypatch.setattr(fsm_ray, "__version__", "9.9")
    monkeypatch.setattr(time, "time", lambda: clock() - 60)
    monkeypatch.setattr(doctor, "read_ray_address", lambda: "127.0.0.1:9")
    monkeypatch.setattr(Storage, "describe", _unanswered)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    file = tmp_path / "file"
    file.touch()
    code, out, _ = run("doctor", "--store", f"rocksdb://{file}")
    told = [line for line in out.splitlines() if line.startswith(("problem", "          "))]

    def cure(of: str) -> str:
        [at] = [number for number, line in enumerate(told) if of in line][:1]
        return told[at + 1].strip()

    assert code == cli.EXIT_FAILED
    assert cure("and this machine 9.9 of ") == "to mend it: pip install fsm-ray==9.9 on all nodes"
    assert cure(": clock: +60.") == "to mend it: run chrony or another NTP client on all machines"
    assert cure("names 127.0.0.1:9, where nobody answers").startswith("to mend it: rm ")
    assert "the store must be reachable" in cure(f"{file} is no directory that Ray's user can write")
    assert "`fsm-ray drop` ends it" in cure(f"bot {bot}: it does not answer: NamespaceUnavailable: too late")
    assert out.endswith(" problems\n")


def _unanswered(*_: object) -> None:
    raise NamespaceUnavailable("too late")


def test_without_ray_the_doctor_says_what_it_can(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    code, out, _ = run("doctor", "--address", "127.0.0.1:9")

    assert code == cli.EXIT_FAILED
    assert "problem  Ray: no Ray at 127.0.0.1:9: " in out
    assert "to mend it: start Ray, or give --address or RAY_ADDRESS" in out


@pytest.mark.ray
@pytest.mark.slow
def test_a_shard_without_its_socket_is_told_and_the_cure_helps(
    run: Run, bot_name: str, storage: Storage, tmp_path: Path
) -> None:
    def connections() -> list[Any]:
        found = objects(run("doctor", "--json")[1])
        return [check for check in found if check["name"] == f"bot {bot_name}: connections"]

    storage.init(bot_name, store=f"rocksdb://{tmp_path}", shards=2)
    bots = directory.Directory(None, DEADLINE_S)
    endpoints = [bots.locate(bot_name, shard) for shard in range(2)]
    # The quickest way there is TCP, where the shard is on another node than this process.
    assert {endpoint.node_id for endpoint in endpoints} == {bots.node_id}
    Path(endpoints[1].unix_path).unlink()
    [missed] = connections()
    run(*missed["cure"].partition("fsm-ray ")[2].split())
    [mended] = connections()

    assert missed["outcome"] == "problem"
    assert f"no connection to shard 1 at {endpoints[1].unix_path}: FileNotFoundError: " in missed["told"]
    assert mended["outcome"] == "ok"


@pytest.mark.ray
@pytest.mark.slow
def test_a_store_that_is_down_is_told_while_the_bot_still_answers(
    run: Run, bot_name: str, storage: Storage
) -> None:
    def check() -> Any:
        found = objects(run("doctor", "--json")[1])
        [check] = [check for check in found if check["name"].startswith(f"bot {bot_name}: store")]
        return check

    with temporary_directory() as directory, ValkeyServer(directory, fsync="always") as server:
        storage.init(bot_name, store=server.url, ownership_lease_s=300.0)
        before = check()
    after = check()

    assert before["outcome"] == "ok"
    assert (after["outcome"], after["cure"].split(";")[0]) == ("problem", "see to the store")
    assert storage.get_state(bot_name, 1) is None


def test_a_doctor_without_colours_has_none(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def told() -> str:
        monkeypatch.setattr(sys, "stdout", terminal := Terminal())
        run("doctor", "--address", "127.0.0.1:9")
        return terminal.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = told()
    monkeypatch.setenv("NO_COLOR", "1")

    assert "\x1b[" in coloured
    assert "\x1b[" not in told()


def test_the_doctor_names_its_own_arguments(run: Run) -> None:
    for arguments, told in (
        (["--store", "nowhere"], "--store: no store is known for 'nowhere'; "),
        (["--store", "env:FSM_RAY_NOWHERE"], "env:FSM_RAY_NOWHERE: the environment variable "),
    ):
        code, _, err = run("doctor", *arguments)
        assert (code, err.startswith(f"fsm-ray: {told}")) == (cli.EXIT_USAGE, True)


def test_packages_are_compared_with_what_is_asked_for() -> None:
    wanted = [
        "ray>=2",
        "rich>=13",
        "redis[hiredis]>=5; extra == 'redis'",
        "slatedb>=1; extra == 'objectstore'",
    ]
    versions = {"ray": "1.0", "redis": "5.1"}

    def version_of(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError
        return versions[name]

    checks = list(doctor.check_packages(lambda _: wanted, version_of))

    assert [tuple(check) for check in checks] == [
        ("packages", "problem", "ray is 1.0, not >=2; rich is not installed", "pip install -U 'fsm-ray'"),
        ("extra redis", "ok", "redis 5.1", ""),
    ]


def test_the_quickest_exchange_tells_the_offset_of_a_clock() -> None:
    offset_s, error_s = doctor.offset_of([(0.0, 107.0, 10.0), (20.0, 120.25, 20.5), (30.0, 135.0, 38.0)])

    assert (offset_s, error_s) == (100.0, 0.25)


@pytest.mark.ray
def test_a_node_without_fsm_ray_or_with_a_socket_directory_of_others_is_told(cluster: RayCluster) -> None:
    node = ray.nodes()[0]
    absent = {"fsm_ray": None, "error": "No module named 'fsm_ray'"}
    look = looks.look_around()()
    blocked = look | {"socket_error": "/tmp/fsm_ray-0 must be a directory", "socket_cure": "mend it"}
    nice = look | {"niceness": 15, "is_root": False}

    [check] = doctor._check_node(node, absent)
    assert (check.outcome, "No module named" in check.told) == ("problem", True)
    assert "problem" in [check.outcome for check in doctor._check_node(node, blocked)]
    assert "hint" in [check.outcome for check in doctor._check_node(node, nice)]
    [check] = doctor._check_node(node, ray.exceptions.RayError("gone"))
    assert check.outcome == "problem"
