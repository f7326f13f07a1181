"""cluster_bot's bot, whose actors and workers are killed while you talk with it.

    BOT_TOKEN=... python examples/failover.py

Every few seconds it kills -9, by turns, the actor that holds the conversations and one of the workers, and
says so; the next time when all are back. What you see in the chat: now and then an answer takes a second
longer. The dialogue goes on where it was, no question is left out, and what you answered is known (/status).
An answer may come twice, if its worker was killed between sending it and noting that it did.

How to break it for good: FSM_RAY_STORE=memory://. Then what the actor knew is gone with it, it says so in its
log, and the bot knows nobody. Or kill -9 this process, and start it again: nothing is lost. Or stop Ray too.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import tempfile
from contextlib import suppress

from cluster_bot import BOT, Crew, Telegram, poll
from ray.exceptions import RayActorError

from fsm_ray import AsyncStorage
from fsm_ray.errors import NamespaceUnavailable

logger = logging.getLogger(__name__)


async def kill_by_turns(storage: AsyncStorage, crew: Crew, pause_s: float) -> None:
    """For ever; the processes are on this machine."""
    for number in itertools.count():
        workers = await pids_of(crew)
        await asyncio.sleep(pause_s)
        with suppress(NamespaceUnavailable, ProcessLookupError):  # somebody else has killed it, too
            if number % 2:
                what, pid = "a worker", workers[0]
            else:
                what, pid = "the actor", (await storage.describe(BOT)).shards[0].pid
            logger.info("killing %s, process %d", what, pid)
            os.kill(pid, signal.SIGKILL)


async def pids_of(crew: Crew) -> list[int]:
    """The workers' processes, as soon as the actor and all of them are back."""
    while True:
        with suppress(NamespaceUnavailable, RayActorError):
            return await asyncio.gather(*(worker.pid.remote() for worker in crew.workers))
        await asyncio.sleep(0.1)


async def main() -> None:
    logging.basicConfig(level=logging.INFO)
    token, api_base = os.environ["BOT_TOKEN"], os.environ.get("API_BASE", "https://api.telegram.org")
    store = os.environ.get("FSM_RAY_STORE", f"rocksdb://{tempfile.gettempdir()}/fsm_ray_failover")
    async with AsyncStorage() as storage, asyncio.TaskGroup() as tasks:
        await storage.init(BOT, store=store)
        crew = Crew(3, token, api_base)
        tasks.create_task(poll(Telegram(token, api_base), crew))
        tasks.create_task(kill_by_turns(storage, crew, float(os.environ.get("PAUSE_S", "5"))))


if __name__ == "__main__":
    asyncio.run(main())
