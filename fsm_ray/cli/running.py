"""The commands that bring their own bots: `demo` and `bench`."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from fsm_ray import bench as benchmark
from fsm_ray.cli.exits import EXIT_FAILED
from fsm_ray.cli.shared import read_url
from fsm_ray.demo.config import DemoConfig


def _listed(items: Iterable[object]) -> str:
    return ",".join(map(str, items))


ReportAsJson = Annotated[
    bool, typer.Option("--json", help="Print the report as a line of JSON; all else goes to stderr.")
]

_DEMO = DemoConfig()
_BENCH = benchmark.BenchConfig()


def demo(
    *,
    updates: Annotated[int, typer.Option(min=1, help="How many updates to make.")] = _DEMO.updates,
    seed: Annotated[int, typer.Option(help="What the updates are made from.")] = _DEMO.seed,
    file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Read updates from here: JSON, one a line."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="How many workers, each a Ray task.")] = _DEMO.workers,
    shards: Annotated[int, typer.Option(min=1, help="Actors of the bot.")] = _DEMO.shards,
    address: Annotated[
        str | None,
        typer.Option(help='Of the Ray to use. Default: the one here, or a new one; "local": a new one.'),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            callback=read_url,
            help="URL of the store of the bot, or `env:NAME` of a variable that has it. Default: a RocksDB"
            " that is removed in the end.",
        ),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the bot on the Ray that was there.")] = False,
    as_json: ReportAsJson = False,
) -> None:
    """Serve a registration bot with several workers, and check what they arrive at.

    The updates are as Telegram sends them: several hundred people at once, in private chats, groups and
    topics. Each worker is a Ray task with an aiogram dispatcher, which answers without a network.
    Conversations go from worker to worker in the middle of the dialogue. In the end, each must stand where
    one worker alone brings it. You may kill workers meanwhile, and the bot's actors.
    """
    from rich.console import Console

    console = Console(file=sys.stderr if as_json else sys.stdout)
    with console.status("Importing aiogram"):
        from fsm_ray.demo.display import print_report
        from fsm_ray.demo.report import to_json
        from fsm_ray.demo.run import run
    config = DemoConfig(
        updates=updates,
        seed=seed,
        file=file,
        workers=workers,
        shards=shards,
        address=address,
        store=store,
        keep=keep,
    )
    # Ray prints on stdout what becomes of its processes. The report says what matters of it.
    with redirect_stdout(io.StringIO()):
        report = run(config, console)
    print_report(report, console)
    if as_json:
        typer.echo(to_json(report))
    if not report.agrees:
        raise typer.Exit(EXIT_FAILED)


def bench(
    *,
    contenders: Annotated[str, typer.Option(help="Which take part, with commas between.")] = _listed(
        _BENCH.contenders
    ),
    store: Annotated[
        str, typer.Option(help=f'Durable stores to measure besides: {_listed(benchmark.STORES)} or "all".')
    ] = _listed(_BENCH.stores),
    tasks: Annotated[
        str | None,
        typer.Option(
            help=f"Numbers of concurrent tasks, with commas. Default: {_listed(_BENCH.tasks)};"
            f" for an adapter {_listed(benchmark.ADAPTER_TASKS)}."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long one measurement lasts.")] = _BENCH.seconds,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = _BENCH.rounds,
    shards: Annotated[int, typer.Option(min=1, help="Actors of fsm_ray's bots.")] = _BENCH.shards,
    conversations: Annotated[
        int, typer.Option(min=0, help="Loaded to weigh one; 0 skips the part.")
    ] = _BENCH.memory_conversations,
    sizes: Annotated[
        str, typer.Option(help='Numbers of conversations to time operations at; "" skips the part.')
    ] = _listed(_BENCH.sizes),
    turns: Annotated[
        str, typer.Option(help='Numbers of tasks that handle whole updates; "" skips the part.')
    ] = _listed(_BENCH.turn_tasks),
    race: Annotated[
        int, typer.Option(min=0, help="How often many update one conversation at once; 0 skips the part.")
    ] = _BENCH.race_rounds,
    scan: Annotated[
        int, typer.Option(min=0, help="Conversations to count and to scan; 0 skips the part.")
    ] = _BENCH.scan_conversations,
    recovery: Annotated[
        int, typer.Option(min=0, help="Conversations to bring back from a crash; 0 skips the part.")
    ] = _BENCH.recovery_conversations,
    kills: Annotated[
        int, typer.Option(min=0, help="How often to kill an actor in mid-write; 0 skips the part.")
    ] = _BENCH.kills,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Feed updates to this framework's dispatcher, over its own storage and over fsm_ray, and"
            f" measure nothing else: {_listed(benchmark.ADAPTERS)}. One --store at most, for fsm_ray."
        ),
    ] = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", dir_okay=False, help="Write a picture here, a PNG.")
    ] = None,
    as_json: ReportAsJson = False,
) -> None:
    """Measure fsm_ray side by side with its peers, on this machine.

    Servers are real, started here, and stopped in the end. The tables show medians over the rounds.
    Fails if fsm_ray lost a write, or applied one twice, in the race or when actors were killed; or if a
    dispatcher over fsm_ray failed, or lost an update.
    """
    default_tasks = _BENCH.tasks if adapter is None else benchmark.ADAPTER_TASKS
    config = benchmark.BenchConfig(
        contenders=_names(contenders),
        stores=benchmark.STORES if store == "all" else _names(store),
        tasks=default_tasks if tasks is None else _numbers(tasks, "--tasks"),
        seconds=seconds,
        rounds=rounds,
        shards=shards,
        memory_conversations=conversations,
        sizes=_numbers(sizes, "--sizes"),
        turn_tasks=_numbers(turns, "--turns"),
        race_rounds=race,
        scan_conversations=scan,
        recovery_conversations=recovery,
        kills=kills,
        plot_path=plot_path,
    )
    from rich.console import Console

    report = benchmark.run(
        config if adapter is None else config.with_adapter_alone(adapter),
        console=Console(file=sys.stderr if as_json else sys.stdout),
    )
    if as_json:
        from fsm_ray.bench.results import to_json

        typer.echo(to_json(report))
    if not report.is_sound:
        raise typer.Exit(EXIT_FAILED)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(",") if number)
    except ValueError:
        raise typer.BadParameter("give numbers with commas between, as 1,16,256", param_hint=option) from None
