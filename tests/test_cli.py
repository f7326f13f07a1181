"""The command: what it prints, and the exit code that it ends with."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import services
from rich.console import Console

import fsm_ray
from fsm_ray import State, bench, cli
from fsm_ray.bench import BenchConfig
from fsm_ray.bench.figures import Figure
from fsm_ray.bench.results import Cell, Kills, Machine, Race, Report, from_json
from fsm_ray.demo import run as demo_run
from fsm_ray.demo.report import Difference, to_json
from fsm_ray.demo.report import Report as DemoReport
from fsm_ray.demo.updates import generate_updates, write_updates
from fsm_ray.errors import ConfigurationError, FsmRayError, NamespaceUnavailable, UnknownBot

from .conftest import DEADLINE_S, RayCluster, eventually

COMMAND = str(Path(sys.executable).with_name("fsm-ray"))


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
        env=os.environ | {"COLUMNS": "120", "NO_COLOR": "1"} | environment,
    )


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["fsm-ray", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


class TestCommand:
    def test_version_is_printed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = run_here(monkeypatch, "--version")

        assert (code, capsys.readouterr().out) == (0, f"fsm-ray {fsm_ray.__version__}\n")

    @pytest.mark.parametrize("command", [(), ("demo",), ("bench",)])
    def test_help_tells_the_exit_codes(
        self, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = run_here(monkeypatch, *command, "--help")
        told = " ".join(capsys.readouterr().out.split())

        assert code == 0
        assert "0 all is well; 1 the result is not what it must be; 2 wrong options or setup; 3 Ray" in told

    def test_help_imports_no_framework_and_no_benchmark(self) -> None:
        result = subprocess.run(
            [sys.executable, "-X", "importtime", COMMAND, "demo", "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}

        assert "fsm_ray.demo.config" in imported
        assert not imported & {"aiogram", "telegram", "telebot", "fsm_ray.bench.session", "matplotlib"}

    def test_an_error_commands_no_terminal(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(_: BenchConfig, **__: Any) -> None:
            raise FsmRayError("it \x1b[2J failed")

        monkeypatch.setattr(bench, "run", fail)
        run_here(monkeypatch, "bench")

        assert capsys.readouterr().err == "fsm-ray: it \\u001b[2J failed\n"

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (FsmRayError("it failed"), 1),
            (UnknownBot("it failed"), 1),
            (ConfigurationError("it failed"), 2),
            (NamespaceUnavailable("it failed"), 3),
        ],
    )
    def test_an_error_becomes_one_line_and_its_exit_code(
        self,
        error: FsmRayError,
        code: int,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(_: BenchConfig, **__: Any) -> None:
            raise error

        monkeypatch.setattr(bench, "run", fail)

        assert run_here(monkeypatch, "bench") == code
        assert capsys.readouterr().err == "fsm-ray: it failed\n"


def remember_configs(monkeypatch: pytest.MonkeyPatch, **found: Any) -> list[BenchConfig]:
    """Let the benchmark remember what it was to measure, and report what was found."""
    configs: list[BenchConfig] = []

    def run(config: BenchConfig, console: Console) -> Report:
        configs.append(config)
        console.print("tables")
        machine = Machine("A CPU", 2, "Linux", "CPython", {}, "now", 0.0, 0.0)
        return Report(config, machine, {}, (), **found)

    monkeypatch.setattr(bench, "run", run)
    return configs


class TestBench:
    def test_options_reach_the_benchmark(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        configs = remember_configs(monkeypatch)
        options = (
            "--contenders echo,fsm-ray --tasks 1,8 --seconds 0.5 --rounds 2 --shards 3 --conversations 0"
            " --store redis,rocksdb --turns 1,2 --race 3 --scan 4 --recovery 1000 --kills 100"
        )
        code = run_here(
            monkeypatch,
            "bench",
            *options.split(),
            *("--sizes", "", "--plot", str(tmp_path / "a.png")),
        )

        assert code == 0
        assert configs == [
            BenchConfig(
                contenders=("echo", "fsm-ray"),
                stores=("redis", "rocksdb"),
                tasks=(1, 8),
                seconds=0.5,
                rounds=2,
                shards=3,
                memory_conversations=0,
                sizes=(),
                turn_tasks=(1, 2),
                race_rounds=3,
                scan_conversations=4,
                recovery_conversations=1_000,
                kills=100,
                plot_path=tmp_path / "a.png",
            )
        ]

    def test_without_options_the_benchmark_has_its_own_defaults(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        configs = remember_configs(monkeypatch)
        run_here(monkeypatch, "bench")

        assert configs == [BenchConfig()]

    def test_the_report_is_a_line_of_json_and_the_tables_go_to_stderr(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        remember_configs(monkeypatch)
        run_here(monkeypatch, "bench", "--json")
        out, err = capsys.readouterr()

        assert (out.count("\n"), err) == (1, "tables\n")
        assert from_json(out.encode()).config == BenchConfig()

    def test_all_stores_are_meant_by_one_word(self, monkeypatch: pytest.MonkeyPatch) -> None:
        configs = remember_configs(monkeypatch)
        run_here(monkeypatch, "bench", "--store", "all")

        assert configs == [BenchConfig(stores=bench.STORES)]

    def test_an_adapter_is_measured_alone_at_its_own_numbers_of_tasks(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        configs = remember_configs(monkeypatch)
        run_here(monkeypatch, "bench", "--adapter", "aiogram")
        options = "--adapter aiogram --tasks 1,8 --store redis --rounds 2"
        run_here(monkeypatch, "bench", *options.split())

        assert configs == [
            BenchConfig(tasks=(1, 64)).with_adapter_alone("aiogram"),
            BenchConfig(tasks=(1, 8), stores=("redis",), rounds=2).with_adapter_alone("aiogram"),
        ]

    @pytest.mark.parametrize(
        ("contender", "code"), [("fsm-ray", 1), ("fsm-ray-turn", 1), ("aiogram-redis", 0)]
    )
    def test_an_update_of_ours_that_a_dispatcher_lost_is_a_failure(
        self, contender: str, code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        remember_configs(monkeypatch, adapter=(Cell(contender, 1, failure="WrongData: it is gone"),))

        assert run_here(monkeypatch, "bench", "--adapter", "aiogram") == code

    @pytest.mark.parametrize(("lost", "applied_twice", "code"), [(0, 0, 0), (1, 0, 1), (0, 1, 1)])
    def test_a_write_that_was_lost_or_applied_twice_is_a_failure(
        self, lost: int, applied_twice: int, code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        figure = Figure((1.0,))
        kills = Kills(figure, figure, figure, 1, 0, lost, applied_twice)
        remember_configs(monkeypatch, kills=kills)

        assert run_here(monkeypatch, "bench", "--kills", "1") == code

    @pytest.mark.parametrize(("contender", "code"), [("fsm-ray", 1), ("aiogram-redis", 0)])
    def test_an_update_of_ours_that_the_race_lost_is_a_failure(
        self, contender: str, code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        remember_configs(monkeypatch, race=(Race(contender, 640, 1),))

        assert run_here(monkeypatch, "bench") == code

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--tasks", "many"),
            ("--turns", "0"),
            ("--race", "-1"),
            ("--scan", "-1"),
            ("--contenders", "nobody"),
            ("--store", "memcached"),
            ("--adapter", "telebot"),
            ("--adapter", "aiogram", "--store", "all"),
            ("--rounds", "0"),
            ("--seconds", "-1"),
        ],
    )
    def test_what_cannot_be_measured_is_wrong_usage(
        self, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert run_here(monkeypatch, "bench", *arguments) == cli.EXIT_USAGE


class TestDemoUsage:
    @pytest.mark.parametrize(
        "arguments",
        [("--updates", "0"), ("--workers", "0"), ("--shards", "0"), ("--file", "/nowhere"), ("--speed", "1")],
    )
    def test_wrong_options_are_wrong_usage(
        self, arguments: tuple[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert run_here(monkeypatch, "demo", *arguments) == cli.EXIT_USAGE

    def test_a_file_that_holds_no_update_is_wrong_usage(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        path = tmp_path / "updates.jsonl"
        path.write_text("hello\n")

        assert run_here(monkeypatch, "demo", "--file", str(path)) == cli.EXIT_USAGE
        assert capsys.readouterr().err.startswith(f"fsm-ray: {path}, line 1: ")

    def test_without_aiogram_the_extra_is_named(self) -> None:
        code = """
import sys
sys.modules["aiogram"] = None
from fsm_ray.cli import main
main()
"""
        result = subprocess.run(
            [sys.executable, "-c", code, "demo"], capture_output=True, text=True, check=False
        )

        assert result.returncode == cli.EXIT_USAGE
        assert result.stderr.endswith("pip install 'fsm-ray[aiogram]'\n")
        assert result.stderr.count("\n") == 1

    @pytest.mark.usefixtures("no_ray")
    def test_an_address_where_nothing_listens_is_told_at_once(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = run_here(monkeypatch, "demo", "--updates", "10", "--address", "127.0.0.1:9")
        told = capsys.readouterr().err

        assert code == cli.EXIT_UNAVAILABLE
        assert told.startswith("fsm-ray: no Ray at 127.0.0.1:9: ")
        assert told.count("\n") == 1

    @pytest.mark.usefixtures("no_ray")
    def test_a_ray_that_is_gone_is_not_looked_for(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One that was killed leaves its address behind; `ray.init` looks for it there for minutes."""
        asked = []

        def init(address: str, **_: Any) -> None:
            asked.append(address)
            raise ConnectionError("not today")

        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.setattr(services, "canonicalize_bootstrap_address", lambda _address: "127.0.0.1:9")
        monkeypatch.setattr(ray, "init", init)
        code = run_here(monkeypatch, "demo", "--updates", "10")

        assert asked == ["local"]
        assert code == cli.EXIT_UNAVAILABLE
        assert "not today" in capsys.readouterr().err

    @pytest.mark.usefixtures("no_ray")
    def test_no_ray_is_started_to_keep_a_bot_on(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code = run_here(monkeypatch, "demo", "--address", "local", "--updates", "10", "--keep")

        assert code == cli.EXIT_USAGE
        assert "there is no Ray to keep the bot on" in capsys.readouterr().err


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is attached to no Ray, and starts none."""

    def init(*_: Any, **__: Any) -> None:
        pytest.fail("Ray was asked")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)


def test_conversations_that_differ_are_told_and_end_the_demo_with_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = Difference("Ann", expected=State(state="Registration:age"), found=None)
    counts = {field.name: 1 for field in dataclasses.fields(DemoReport)} | {"failed_updates": 0}
    facts: dict[str, Any] = counts | {"stray_records": 0, "restarted_empty": (), "states": {"done": 1}}
    report = DemoReport(**facts | {"differences": (lost,)})
    monkeypatch.setattr(demo_run, "run", lambda config, console: report)
    code = run_here(monkeypatch, "demo")
    output = capsys.readouterr().out
    run_here(monkeypatch, "demo", "--json")

    assert capsys.readouterr().out == f"{to_json(report)}\n"
    assert "\n" not in to_json(report)
    assert code == cli.EXIT_FAILED
    assert "1 of 1 conversation differ from one worker over aiogram's MemoryStorage:" in output
    assert "  Ann: no record, expected Registration:age" in output


@pytest.fixture
def ray_directory() -> Iterator[str]:
    """Where a Ray of its own puts its files; short, for the paths of sockets are limited."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as directory:
        yield directory


def processes_of(ray_directory: str) -> list[str]:
    """Command lines of the processes whose Ray has its files there."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"RAY_TMPDIR={ray_directory}\0" in (path / "environ").read_text():
                found.append((path / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has just ended, or is somebody else's
            continue
    return found


@pytest.mark.ray
@pytest.mark.slow
class TestDemo:
    def test_with_a_ray_of_its_own_a_file_is_served_the_report_is_json_and_nothing_is_left(
        self, ray_directory: str, tmp_path: Path
    ) -> None:
        path = tmp_path / "updates.jsonl"
        write_updates(path, generate_updates(123, seed=5))
        few = ("--workers", "1", "--shards", "1")  # each is a process, and imports aiogram
        result = run_command(
            *("demo", "--address", "local", "--file", str(path), *few, "--json"), RAY_TMPDIR=ray_directory
        )
        [line] = result.stdout.splitlines()
        report = json.loads(line)

        assert result.returncode == 0
        assert (report["agrees"], report["updates"], report["differences"]) == (True, 123, [])
        assert report["states"]["Registration:done"] > 0
        assert "conversations agree with one worker over aiogram's MemoryStorage." in result.stderr
        assert "Traceback" not in result.stderr
        eventually(lambda: not processes_of(ray_directory), "the demo's Ray has ended")

    def test_ctrl_c_leaves_no_actors(self, cluster: RayCluster) -> None:
        def bots() -> list[str]:
            names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
            return [name for name in names if name.startswith("demo-")]

        demo = subprocess.Popen(
            [COMMAND, "demo", "--address", cluster.address, "--workers", "1", "--shards", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )
        eventually(lambda: len(bots()) == 1, "the demo has made its bot")
        demo.send_signal(signal.SIGINT)
        try:
            _, told = demo.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            demo.send_signal(signal.SIGABRT)
            pytest.fail(f"it goes on, here: {demo.communicate()[1]}")

        assert demo.returncode == cli.EXIT_INTERRUPTED
        assert bots() == []
        assert "Traceback" not in told
