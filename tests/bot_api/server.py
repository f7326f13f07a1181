"""BotApi: the server, on a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Self, TypeVar

from aiohttp import web

from tests.bot_api.bots import Bot
from tests.bot_api.methods import METHODS, allow
from tests.bot_api.parameters import JSON, ApiError, Parameters, parameters_of
from tests.bot_api.webhooks import deliver

T = TypeVar("T")

DEADLINE_S = 30.0

TOKEN = "1000001:local"
"""Of the bot that there is when no other is named."""

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Held:
    """Calls of one method that are kept from taking effect; see `BotApi.held`."""

    def __init__(self, api: BotApi) -> None:
        self._api = api
        self._is_reached = asyncio.Event()
        self._is_left = asyncio.Event()
        self._is_released = asyncio.Event()

    def wait_until_reached(self) -> None:
        """Return when a call is there, and held."""
        self._api.run(self._is_reached.wait(), "a call to hold")

    def wait_until_left(self) -> None:
        """Return when the client of a held call is gone."""
        self._api.run(self._is_left.wait(), "a held call to be given up")

    def is_left_within(self, deadline_s: float) -> bool:
        """Whether the client of a held call is gone, now or soon."""
        with contextlib.suppress(AssertionError):
            self._api.run(self._is_left.wait(), "a held call to be given up", deadline_s)
        return self._is_left.is_set()

    async def pass_through(self) -> None:
        """What each such call does before anything else."""
        self._is_reached.set()
        try:
            await self._is_released.wait()
        except asyncio.CancelledError:
            self._is_left.set()
            raise

    async def release(self) -> None:
        self._is_released.set()


class BotApi:
    """The Bot API, as a context manager: it serves until the block is left."""

    def __init__(self, *tokens: str, port: int = 0) -> None:
        """Nothing is opened yet.

        Args:
            tokens: of the bots; none: one bot, with `TOKEN`.
            port: where to listen on 127.0.0.1; 0: any free port.
        """
        self.bots = {token: Bot(token) for token in tokens or (TOKEN,)}
        self.calls: list[tuple[str, JSON]] = []
        """Each call of each bot that took effect or was refused, but getUpdates: its method, as the client
        wrote it, and its parameters."""
        self._port = port
        self._failures: dict[str, list[ApiError]] = {}
        self._held: dict[str, Held] = {}
        self._started: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._main, name="bot-api", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event

    def __enter__(self) -> Self:
        self._thread.start()
        self._port = self._started.result(DEADLINE_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the server does not end"

    @property
    def url(self) -> str:
        """What a bot's API_BASE is to be."""
        return f"http://127.0.0.1:{self._port}"

    def bot(self, token: str | None = None) -> Bot:
        """The bot with this token; None: the first one. It is to be used by `run` alone."""
        return self.bots[token] if token else next(iter(self.bots.values()))

    def run(self, work: Awaitable[T], what: str, deadline_s: float = DEADLINE_S) -> T:
        """Have this done on the server's loop, and return its result.

        Raises:
            AssertionError: it was not done in time; `what` says what it was.
        """

        async def within_deadline() -> T:
            async with asyncio.timeout(deadline_s):
                return await work

        try:
            return asyncio.run_coroutine_threadsafe(within_deadline(), self._loop).result()
        except TimeoutError:
            raise AssertionError(f"not within {deadline_s} s: {what}") from None

    def wait_until(self, find: Callable[[], T | None], what: str, *, token: str | None = None) -> T:
        """What `find` returns, asked on the loop after each change of the bot, as soon as it is something."""
        return self.run(self.bot(token).wait_until(find), what)

    def wait_until_confirmed(self, token: str | None = None) -> None:
        """Return when the bot has confirmed every update."""
        bot = self.bot(token)
        self.wait_until(lambda: not bot.updates or None, "all updates confirmed", token=token)

    def wait_until_polled(self, token: str | None = None) -> None:
        """Return when the bot waits in a long poll, with nothing left for it."""
        bot = self.bot(token)
        self.wait_until(lambda: (bot.is_polled and not bot.updates) or None, "a poll", token=token)

    def fail_next(self, method: str, code: int, description: str, **parameters: Any) -> None:
        """Refuse the next call of this method; `retry_after=1` as Telegram's flood control does."""
        self._failures.setdefault(method.lower(), []).append(ApiError(code, description, **parameters))

    @contextlib.contextmanager
    def held(self, method: str) -> Iterator[Held]:
        """While the block lasts, calls of this method reach the server and have no effect, and no answer.

        A client that is killed meanwhile has made the call in vain: it never takes effect.
        """
        held = self._held[method.lower()] = Held(self)
        try:
            yield held
        finally:
            del self._held[method.lower()]
            self.run(held.release(), "released")

    def _main(self) -> None:
        try:
            asyncio.run(self._serve())
        except OSError as error:
            self._started.set_exception(error)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        application = web.Application(middlewares=[in_telegrams_form])
        application.router.add_route("*", "/bot{token}/{method}", self._answer)
        application.cleanup_ctx.append(self._deliveries)
        # A bot that is gone waits for nothing: neither for updates nor to be released.
        runner = web.AppRunner(application, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", self._port)
            await site.start()
            self._started.set_result(runner.addresses[0][1])
            await self._stop.wait()
        finally:
            await runner.cleanup()

    async def _deliveries(self, _: web.Application) -> AsyncIterator[None]:
        deliveries = [asyncio.create_task(deliver(bot)) for bot in self.bots.values()]
        yield
        for delivery in deliveries:
            delivery.cancel()
        await asyncio.wait(deliveries)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        bot = self.bots.get(request.match_info["token"])
        if bot is None:
            raise ApiError(401, "Unauthorized")
        name = request.match_info["method"]
        method = name.lower()
        parameters = await parameters_of(request)
        if method in self._held:
            await self._held[method].pass_through()
        if failures := self._failures.get(method):
            raise failures.pop(0)
        if method == "getupdates":
            return _ok(await _get_updates(bot, parameters))
        if method not in METHODS:
            raise ApiError(404, "Not Found")
        self.calls.append((name, dict(parameters)))
        return _ok(METHODS[method](bot, parameters))


async def _get_updates(bot: Bot, parameters: Parameters) -> list[JSON]:
    if bot.webhook is not None:
        raise ApiError(
            409,
            "Conflict: can't use getUpdates method while webhook is active; use deleteWebhook to delete the "
            "webhook first",
        )
    allow(bot, parameters)
    bot.confirm(parameters.integer("offset", 0))
    await bot.poll(parameters.integer("timeout", 0))
    limit = min(max(parameters.integer("limit", 100), 1), 100)
    return list(bot.updates)[:limit]


@web.middleware
async def in_telegrams_form(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer a refused call, and an unknown path, as Telegram does."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return _refused(ApiError(404, "Not Found"))
    except ApiError as error:
        return _refused(error)


def _ok(result: Any) -> web.Response:
    return web.json_response({"ok": True, "result": result})


def _refused(error: ApiError) -> web.Response:
    body: JSON = {"ok": False, "error_code": error.code, "description": error.description}
    if error.parameters:
        body["parameters"] = error.parameters
    return web.json_response(body, status=error.code)
