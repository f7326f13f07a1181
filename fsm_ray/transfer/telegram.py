"""From python-telegram-bot's pickle files: what PicklePersistence stored, into records of RayPersistence."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from fsm_ray.adapters.telegram import records
from fsm_ray.errors import FsmRayError, InvalidData, MissingExtra
from fsm_ray.state import State
from fsm_ray.storage import AsyncStorage
from fsm_ray.transfer import pickles
from fsm_ray.transfer.loading import Arrival, Progress, Refusal, Report, load

try:
    import telegram
    import telegram.constants
except ModuleNotFoundError as error:
    raise MissingExtra(
        f"the importer needs {error.name!r}, which is not installed: pip install 'fsm-ray[telegram]'"
    ) from error

_KINDS = ("user_data", "chat_data", "bot_data", "callback_data", "conversations")

_Make = Callable[[Any], State | None]


async def import_telegram_pickle(
    path: Path | str,
    storage: AsyncStorage,
    bot_name: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write what a PicklePersistence has stored into a bot, which must have been initialised.

    The file runs no code: it may hold plain values and telegram's own data classes. A user's or a chat's data
    that holds anything else is refused. Telegram's objects come without their bot, and get the new one's.

    Args:
        path: the `filepath` of the PicklePersistence, with `single_file` or without.
        storage: the storage.
        bot_name: the bot.
        overwrite: replace what is there.
        progress: told how far it is.

    Raises:
        InvalidData: a file is damaged, or no such pickle; nothing was changed.
        OSError: there is no such file, or it cannot be read; nothing was changed.
        UnknownBot, NamespaceUnavailable: some were imported; to be called again.
    """
    stored = _read(Path(path))
    return await load(storage, bot_name, _records(stored), overwrite=overwrite, progress=progress)


def _read(path: Path) -> dict[str, Any]:
    """The whole of what the single file, or the several ones, hold."""
    parts = {kind: path.with_name(f"{path.name}_{kind}") for kind in _KINDS}
    found = {kind: part for kind, part in parts.items() if part.exists()}
    if path.exists() or not found:
        stored = pickles.load(path, _find)
    else:
        stored = {kind: pickles.load(part, _find) for kind, part in found.items()}
    if not isinstance(stored, dict) or not stored.keys() & {*_KINDS}:
        raise InvalidData(f"{path} holds nothing that PicklePersistence writes")
    return stored


def _find(module: str, name: str) -> Any:
    """Telegram's own data classes, wherever in the package they were defined as they were pickled."""
    if module == "telegram.ext._picklepersistence" and name == "_reconstruct_to":
        return _reconstruct
    if module == "telegram.constants":
        found = getattr(telegram.constants, name, None) if name in telegram.constants.__all__ else None
        return found if isinstance(found, type) and issubclass(found, Enum) else None
    if module.partition(".")[0] != "telegram" or name not in telegram.__all__:
        return None
    found = getattr(telegram, name)
    return found if _is_data_class(found) else None


def _is_data_class(found: object) -> bool:
    return (
        isinstance(found, type)
        and issubclass(found, telegram.TelegramObject)
        and not issubclass(found, telegram.Bot)
    )


def _reconstruct(cls: Any, fields: dict[str, Any]) -> Any:
    """What `_reconstruct_to` of PicklePersistence does."""
    if issubclass(cls, pickles.NotAllowed) or not _is_data_class(cls):
        return cls if issubclass(cls, pickles.NotAllowed) else None
    new = cls.__new__(cls)
    new.__setstate__(fields)
    return new


async def _records(stored: Mapping[str, Any]) -> AsyncGenerator[Arrival | Refusal | None, None]:
    for key, value, make in _parts(stored):
        where = repr(key)
        try:
            pickles.check((key, value))
            state = make(value)
        except FsmRayError as error:
            yield Refusal(where, str(error))
        else:
            yield None if state is None else Arrival(where, key, state)


def _parts(stored: Mapping[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any, _Make]]:
    """Key of the record, what is stored, and how to make the record of that."""
    for kind in ("user", "chat"):
        for whose, data in (stored.get(f"{kind}_data") or {}).items():
            if data != {}:
                yield (kind, whose), data, _data_of(kind)
    if stored.get("bot_data"):
        yield records.BOT, stored["bot_data"], _data_of("bot")
    if stored.get("callback_data"):
        yield records.CALLBACK, stored["callback_data"], _callback_data
    for name, states in (stored.get("conversations") or {}).items():
        for key, state in states.items():
            yield records.conversation_key(name, key), state, partial(records.conversation_record, name)


def _data_of(kind: str) -> _Make:
    def make(data: Any) -> State | None:
        if not isinstance(data, Mapping):
            raise InvalidData(f"it is no dict: {data!r:.80}")
        return State(flow=kind, data=records.by_encoded_name(data))

    return make


def _callback_data(data: Any) -> State:
    return State(flow="callback", data=records.by_encoded_name(records.callback_fields(data)))
