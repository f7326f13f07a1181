"""The named actors: one for each shard of a bot, found by name in Ray's namespace `fsm_ray`.

Shard 0 is made first, so whoever makes it decides the bot's options; all others follow it. The functions
here call Ray and block; a caller on an event loop runs them in a thread.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from fsm_ray.channel.handshake import Endpoint
from fsm_ray.errors import (
    ConfigurationError,
    FsmRayError,
    NamespaceUnavailable,
    OptionsConflict,
    ProtocolMismatch,
    UnknownBot,
)
from fsm_ray.hosting import ShardDescription, ShardHost, ShardRotation
from fsm_ray.notes import (
    Version,
    find_mark,
    note_options,
    note_version,
    noted_options,
    noted_version,
    remove_mark,
    remove_notes,
)
from fsm_ray.options import BotOptions, redacted

logger = logging.getLogger(__name__)

RAY_NAMESPACE = "fsm_ray"

ACTOR_OPTIONS: dict[str, Any] = {
    "namespace": RAY_NAMESPACE,
    "lifetime": "detached",
    "get_if_exists": True,
    "num_cpus": 0,
    "max_restarts": -1,
    # Ray makes calls again as soon as an actor is back. Without, it tells of failures alone, and those come a
    # second apart. `exchange` is the exception.
    "max_task_retries": -1,
    # Calls that wait for a commit must not keep others out.
    "max_concurrency": 10_000,
}
"""What `ray.remote(...).options` gets for every shard, beside its name."""

_KILL_PAUSE_S = 0.01
"""How long before Ray is asked again whether killed actors are gone."""


class NamespaceActor:
    """One shard in an actor of its own. A plain class: `create_shard` makes it a Ray actor.

    Clients of other versions load this class, as Ray exported it, and look for each of its methods in their
    own: one that they lack would keep them from the whole actor. So it has these methods for good and no
    others, private ones neither; what a later version adds is asked for by `perform`.
    """

    def __init__(self, bot_name: str, shard: int, options: BotOptions) -> None:
        self._host = ShardHost(bot_name, shard, options)
        actor_id = ray.get_runtime_context().get_actor_id() or ""
        note_version(bot_name, shard, actor_id)
        if shard == 0:
            note_options(bot_name, actor_id, options)

    async def options(self) -> BotOptions:
        """What the bot was made with."""
        return self._host.options

    async def open(self) -> None:
        """See `ShardHost.open`."""
        await self._host.open()

    async def was_opened(self) -> bool:
        """See `ShardHost.was_opened`."""
        return self._host.was_opened()

    async def endpoint(self, node_id: str) -> Endpoint:
        """See `ShardHost.endpoint`."""
        return await self._host.endpoint(node_id)

    # Retries of operations are the routing's, which numbers its writes; Ray would not know them apart.
    @ray.method(max_task_retries=0)
    async def exchange(self, request: bytes) -> bytes:
        """See `ShardHost.exchange`."""
        return await self._host.exchange(request)

    async def describe(self) -> ShardDescription:
        """See `ShardHost.describe`."""
        return await self._host.describe()

    async def stop(self) -> None:
        """See `ShardHost.stop`."""
        await self._host.stop()

    async def perform(self, name: str, *arguments: Any) -> Any:
        """What one of `ShardHost.PERFORMED` returns.

        Raises:
            ProtocolMismatch: this version has none of that name.
        """
        if name not in ShardHost.PERFORMED:
            raise ProtocolMismatch(
                f"a shard that runs {Version()} cannot {name}: upgrade the bot with `fsm-ray upgrade BOT`"
            )
        return await getattr(self._host, name)(*arguments)


def create_shards(bot_name: str, options: BotOptions, timeout_s: float) -> None:
    """Make the bot's actors unless they are there.

    Raises:
        OptionsConflict: the bot, or a shard of it, runs with other options, or is being upgraded with others.
        NamespaceUnavailable: an actor did not come up within `timeout_s`; a retry is safe.
    """
    _check_mark(bot_name, options)
    first = create_shard(bot_name, 0, options)
    # Again: if there was no first shard since an upgrade had begun meanwhile, its mark was there before that.
    _check_mark(bot_name, options)
    _check_options(bot_name, call(first.options.remote(), bot_name, timeout_s), options)
    others = [create_shard(bot_name, shard, options) for shard in range(1, options.shards)]
    for shard, actor in enumerate(others, start=1):
        _check_options(bot_name, call(actor.options.remote(), bot_name, timeout_s), options, shard)


def _check_mark(bot_name: str, options: BotOptions) -> None:
    mark = find_mark(bot_name)
    if mark is not None:
        _check_options(bot_name, mark.options, options)


def _check_options(bot_name: str, running: BotOptions, options: BotOptions, shard: int = 0) -> None:
    if running == options:
        return
    differences = {
        name: (_shown(value), _shown(getattr(options, name)))
        for name, value in running
        if value != getattr(options, name, value)  # one of another version has options of its own
    }
    told = ", ".join(f"{name} is {old!r}, not {new!r}" for name, (old, new) in differences.items())
    who, cure = f"bot {bot_name!r}", "Nothing was changed: init it with its own options, or drop it first"
    if shard:
        who, cure = f"shard {shard} of {who}", "Upgrade the bot, which replaces that shard, or drop it first"
    raise OptionsConflict(
        f"{who} already runs with other options: {told}. {cure}",
        bot=bot_name,
        differences=differences,
    )


def create_shard(
    bot_name: str, shard: int, options: BotOptions, *, get_if_exists: bool = True
) -> ActorHandle[NamespaceActor]:
    """The shard's actor, made unless it is there.

    Raises:
        ValueError: it is there, and not to be had.
    """
    # Not by the node's id, which changes when the node starts anew: the actor waits for its directory.
    resources = {} if options.store_node is None else {options.store_node: 0.0001}
    actor_class: Any = ray.remote(NamespaceActor).options(
        **ACTOR_OPTIONS
        | {"name": _name(bot_name, shard), "resources": resources, "get_if_exists": get_if_exists}
    )
    actor: ActorHandle[NamespaceActor] = actor_class.remote(bot_name, shard, options)
    return actor


def open_shards(bot_name: str, options: BotOptions, timeout_s: float) -> None:
    """Open the stores of all shards, at the same time.

    Raises:
        NamespaceUnavailable: one is not open yet; a retry is safe.
        FsmRayError: one cannot be opened, see `ShardHost.open`.
    """
    calls: list[Any] = [find_shard(bot_name, shard).open.remote() for shard in range(options.shards)]
    for each in calls:
        call(each, bot_name, timeout_s)


def remove_unopened(bot_name: str, options: BotOptions, error: FsmRayError, timeout_s: float) -> None:
    """End the bot's actors if `error` kept them from ever opening their stores.

    So that an `init` with mended options does not find a bot that runs with others. A bot that is being
    upgraded has its own, and its other shards serve on.
    """
    if find_mark(bot_name) is not None:
        return
    actors = [find_shard(bot_name, shard) for shard in range(options.shards)]
    calls: list[Any] = [each.was_opened.remote() for each in actors]
    opened = [call(each, bot_name, timeout_s) for each in calls]
    # With wrong options, some shards may have found nothing to disagree with; a bot that ran has none wrong.
    ran = all(opened) if isinstance(error, ConfigurationError) else any(opened)
    if not ran:
        kill_shards(bot_name, timeout_s)


def find_shard(bot_name: str, shard: int) -> ActorHandle[NamespaceActor]:
    """The actor's handle.

    Raises:
        UnknownBot: there is no such bot.
        NamespaceUnavailable: the bot is there, but not this shard of it.
    """
    actor = find_actor(bot_name, shard)
    if actor is None and find_mark(bot_name):
        raise NamespaceUnavailable(
            f"shard {shard} of bot {bot_name!r} is being replaced by an upgrade, or an upgrade was "
            "interrupted: if so, upgrade the bot again",
            bot=bot_name,
        )
    # Asked once more, for an upgrade may have ended between the questions.
    actor = actor or find_actor(bot_name, shard)
    if actor is None:
        if shard == 0:
            raise UnknownBot(
                f"no bot {bot_name!r} on this Ray cluster: call storage.init({bot_name!r}) first",
                bot=bot_name,
            )
        find_shard(bot_name, 0)
        raise NamespaceUnavailable(
            f"shard {shard} of bot {bot_name!r} is not there, as its init was interrupted: call init again",
            bot=bot_name,
        )
    return actor


def find_actor(bot_name: str, shard: int) -> ActorHandle[NamespaceActor] | None:
    """The handle of the actor that has the shard's name at this moment."""
    try:
        return ray.get_actor(_name(bot_name, shard), namespace=RAY_NAMESPACE)
    except ValueError:
        return None


def version_of(
    actor: ActorHandle[NamespaceActor], bot_name: str, shard: int, timeout_s: float
) -> Version | None:
    """What the shard's actor runs; None: it cannot tell, was told to stop, or does not answer in time."""
    try:
        call(actor.options.remote(), bot_name, timeout_s)  # until it was made, or made again
    except NamespaceUnavailable:
        return None
    return version_noted_by(actor, bot_name, shard)


def version_noted_by(actor: ActorHandle[NamespaceActor], bot_name: str, shard: int) -> Version | None:
    """What the shard's actor noted that it runs; None: nothing, or it was told to stop."""
    return noted_version(bot_name, shard, _id_of(actor))


def running_bots() -> list[str]:
    """The names of all bots on this cluster, sorted."""
    names = [name.rpartition("/") for name in _actor_names()]
    return sorted(bot_name for bot_name, _, shard in names if shard == "0")


def running_options(bot_name: str, timeout_s: float) -> BotOptions:
    """The options that the bot was made with.

    Raises:
        UnknownBot: there is no such bot.
        NamespaceUnavailable: its first shard did not answer within `timeout_s`.
    """
    options: BotOptions = call(find_shard(bot_name, 0).options.remote(), bot_name, timeout_s)
    return options


def first_noted_options(bot_name: str) -> BotOptions | None:
    """The options that the bot's first shard noted, though it does not answer; None: it did not."""
    first = find_actor(bot_name, 0)
    return None if first is None else noted_options(bot_name, _id_of(first))


def describe_shards(bot_name: str, shards: int, timeout_s: float) -> list[ShardDescription]:
    """What each shard says of itself. Raises UnknownBot or NamespaceUnavailable."""
    calls: list[Any] = [find_shard(bot_name, shard).describe.remote() for shard in range(shards)]
    return [call(each, bot_name, timeout_s) for each in calls]


def rotate_shards(bot_name: str, shards: int, timeout_s: float) -> list[ShardRotation]:
    """See `ShardHost.rotate_keys`. Raises UnknownBot or NamespaceUnavailable, too."""
    asked = "rotate_keys"
    calls: list[Any] = [find_shard(bot_name, shard).perform.remote(asked) for shard in range(shards)]
    # Every answer is fetched: Ray prints a traceback for each error that nobody asks for.
    answers = [_answer(each, bot_name, timeout_s) for each in calls]
    for answer in answers:
        if isinstance(answer, FsmRayError):
            raise answer
    return answers


def _answer(reference: Any, bot_name: str, timeout_s: float) -> Any:
    """What the actor's method returned, or the error that `call` raises."""
    try:
        return call(reference, bot_name, timeout_s)
    except FsmRayError as error:
        return error


def kill_shards(bot_name: str, timeout_s: float) -> None:
    """End the bot's actors, the first one last, so that an interrupted call can be repeated.

    Raises:
        UnknownBot: it has none.
        NamespaceUnavailable: they are about to end, and Ray still lists them after `timeout_s`.
    """
    mark = find_mark(bot_name)
    # Before the actors are looked for: an upgrade that makes one later finds no mark any more, and ends it.
    remove_mark(bot_name)
    names = [name for name in _actor_names() if name.rpartition("/")[0] == bot_name]
    if not names and mark is None:
        find_shard(bot_name, 0)
    for shard in sorted((int(name.rpartition("/")[2]) for name in names), reverse=True):
        actor = find_actor(bot_name, shard)
        if actor is not None:  # an upgrade may just have ended it
            end_actor(actor, bot_name, timeout_s)
    # Ray returns before its control store has taken note.
    deadline = time.monotonic() + timeout_s
    while not set(names).isdisjoint(_actor_names()):
        if time.monotonic() >= deadline:
            raise NamespaceUnavailable(
                f"the actors of bot {bot_name!r} were told to end, and are still there after {timeout_s} s",
                bot=bot_name,
                timeout_s=timeout_s,
            )
        time.sleep(_KILL_PAUSE_S)
    remove_notes(bot_name)


def end_actor(actor: ActorHandle[NamespaceActor], bot_name: str, timeout_s: float) -> None:
    """Let the actor release its store, and kill it whatever comes of that: what it acknowledged is kept."""
    try:
        call(actor.stop.remote(), bot_name, timeout_s)
    except (FsmRayError, RayTaskError) as error:
        # Not what it says, which may be a user's key.
        logger.warning(
            "bot %r: an actor is killed that did not stop by itself: %s", bot_name, type(error).__name__
        )
    ray.kill(actor, no_restart=True)


def call(reference: Any, bot_name: str, timeout_s: float) -> Any:
    """What the actor's method returned.

    Raises:
        NamespaceUnavailable: it did not answer within `timeout_s`, or is being restarted.
        FsmRayError: whatever of ours the method raised.
    """
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, FsmRayError):
            raise error.cause from None
        raise
    except RayError as error:
        raise NamespaceUnavailable(
            f"bot {bot_name!r} does not answer a Ray call: {error}",
            bot=bot_name,
            timeout_s=timeout_s,
        ) from error


def _name(bot_name: str, shard: int) -> str:
    return f"{bot_name}/{shard}"


def _id_of(actor: ActorHandle[NamespaceActor]) -> str:
    actor_id: str = actor._actor_id.hex()  # noqa: SLF001  # Ray shows it nowhere else
    return actor_id


def _actor_names() -> list[str]:
    """The names of all bots' actors."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == RAY_NAMESPACE]


def _shown(value: Any) -> Any:
    """An option's value, without the password if it is a URL."""
    return redacted(value) if isinstance(value, str) else value
