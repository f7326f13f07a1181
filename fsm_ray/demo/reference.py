"""What one worker makes of the same updates, one after the other, over aiogram's MemoryStorage."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

from aiogram.fsm.storage.memory import MemoryStorage

from fsm_ray.adapters.aiogram import record_key
from fsm_ray.demo.crowd import JSON
from fsm_ray.demo.dialogue import handle_in_order, make_bot, make_dispatcher
from fsm_ray.state import State

Records = dict[Hashable, State]


async def reference_records(updates: Iterable[JSON], on_handled: Callable[[int], None]) -> Records:
    """The records that there must be in the end, by their keys; `on_handled` hears of each update."""
    storage = MemoryStorage()
    bot, dispatcher = make_bot(), make_dispatcher(storage)
    for update in updates:
        await handle_in_order(dispatcher, bot, (update,))
        on_handled(1)
    return {
        record_key(key): State(state=record.state, data=record.data)
        for key, record in storage.storage.items()
        if record.state is not None or record.data  # MemoryStorage makes an empty record of every read
    }
