"""The local Bot API server behaves as Telegram's does, and the frameworks' own clients talk to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiogram
import aiohttp
import pytest
import telebot
import telegram
from aiogram.client.session.aiohttp import AiohttpSession
from aiogram.client.telegram import TelegramAPIServer
from aiogram.exceptions import TelegramRetryAfter
from aiohttp import web
from telebot import apihelper

from tests.bot_api import BotApi, User
from tests.bot_api.server import TOKEN

JSON = dict[str, Any]

OTHER_TOKEN = "1000002:other"

KEYBOARD = {"inline_keyboard": [[{"text": "Yes", "callback_data": "yes"}]]}


@pytest.fixture
def api() -> Iterator[BotApi]:
    with BotApi(TOKEN, OTHER_TOKEN) as api:
        yield api


class Client:
    """Calls methods, and returns whole answers."""

    def __init__(self, api: BotApi, session: aiohttp.ClientSession, token: str = TOKEN) -> None:
        self._base = f"{api.url}/bot{token}"
        self._session = session

    async def __call__(self, method: str, **parameters: Any) -> JSON:
        async with self._session.post(f"{self._base}/{method}", json=parameters) as response:
            answer: JSON = await response.json()
            assert response.status == answer.get("error_code", 200)
            return answer

    async def update_ids(self, **parameters: Any) -> list[int]:
        return [update["update_id"] for update in (await self("getUpdates", **parameters))["result"]]


@pytest.fixture
async def session() -> Any:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def call(api: BotApi, session: aiohttp.ClientSession) -> Client:
    return Client(api, session)


@pytest.fixture
def ann(api: BotApi) -> User:
    return User(api, 7)


def ids(*updates: JSON) -> list[int]:
    return [update["update_id"] for update in updates]


async def test_updates_are_delivered_again_until_an_offset_confirms_them(call: Client, ann: User) -> None:
    first, second, third = ann.send("one"), ann.send("two"), ann.send("three")

    assert await call.update_ids() == ids(first, second, third)
    assert await call.update_ids(limit=2) == ids(first, second)
    assert await call.update_ids(offset=second["update_id"]) == ids(second, third)
    assert await call.update_ids() == ids(second, third)
    assert await call.update_ids(offset=-1) == ids(third)
    assert await call.update_ids(offset=third["update_id"] + 1) == []


async def test_a_long_poll_ends_with_the_first_update(api: BotApi, call: Client, ann: User) -> None:
    poll = asyncio.create_task(call.update_ids(timeout=60))
    await asyncio.to_thread(api.wait_until, lambda: api.bot().is_polled or None, "a poll")

    update = ann.send("hello")

    assert await poll == ids(update)


async def test_a_long_poll_without_updates_ends_after_its_timeout(call: Client) -> None:
    assert await call.update_ids(timeout=1) == []


async def test_a_second_poll_ends_the_first_with_409(api: BotApi, call: Client, ann: User) -> None:
    first = asyncio.create_task(call("getUpdates", timeout=60))
    await asyncio.to_thread(api.wait_until, lambda: api.bot().is_polled or None, "a poll")

    second = asyncio.create_task(call.update_ids(timeout=60))

    ended = await first

    assert ended["error_code"] == 409
    assert ended["description"].startswith("Conflict: terminated by other getUpdates request")
    assert ids(ann.send("hello")) == await second


async def test_updates_of_a_poll_whose_client_is_gone_are_not_lost(
    api: BotApi, call: Client, ann: User
) -> None:
    poll = asyncio.create_task(call("getUpdates", timeout=60))
    await asyncio.to_thread(api.wait_until, lambda: api.bot().is_polled or None, "a poll")
    poll.cancel()
    await asyncio.to_thread(api.wait_until, lambda: not api.bot().is_polled or None, "no poll")

    update = ann.send("hello")

    assert await call.update_ids() == ids(update)


async def test_a_bot_gets_the_kinds_of_updates_that_it_allows(api: BotApi, call: Client, ann: User) -> None:
    await call("getUpdates", allowed_updates=["callback_query"])

    with pytest.raises(AssertionError, match="the bot wants no message"):
        ann.send("hello")
    await call("getUpdates")  # as before
    with pytest.raises(AssertionError, match="the bot wants no message"):
        ann.send("hello")
    await call("getUpdates", allowed_updates=[])  # the usual ones
    update = ann.send("hello")

    assert await call.update_ids() == ids(update)


async def test_each_bot_has_updates_and_chats_of_its_own(api: BotApi, session: aiohttp.ClientSession) -> None:
    first, second = Client(api, session), Client(api, session, OTHER_TOKEN)
    update = User(api, 7, token=OTHER_TOKEN).send("hello")

    assert await first.update_ids() == []
    assert await second.update_ids() == ids(update)
    assert (await first("getMe"))["result"]["id"] != (await second("getMe"))["result"]["id"]
    assert (await first("sendMessage", chat_id=7, text="hello"))[
        "description"
    ] == "Bad Request: chat not found"


async def test_a_message_can_be_edited_and_deleted(call: Client, ann: User) -> None:
    ann.send("/start")
    sent = (await call("sendMessage", chat_id=7, text="Sure?", reply_markup=KEYBOARD))["result"]
    this = {"chat_id": 7, "message_id": sent["message_id"]}

    same = await call("editMessageText", **this, text="Sure?", reply_markup=KEYBOARD)
    edited = (await call("editMessageText", **this, text="Done"))["result"]

    assert same["description"].startswith("Bad Request: message is not modified")
    assert (edited["message_id"], edited["text"]) == (sent["message_id"], "Done")
    assert "reply_markup" not in edited
    assert ann.shown == ["Sure?", "Done"]
    assert (await call("deleteMessage", **this))["result"] is True
    assert (await call("editMessageText", **this, text="x"))["description"].endswith("to edit not found")


async def test_a_pressed_button_is_answered_once(call: Client, ann: User) -> None:
    ann.send("/start")
    await call("sendMessage", chat_id=7, text="Sure?", reply_markup=json.dumps(KEYBOARD))
    query = ann.press("Yes")

    answer = {"callback_query_id": query["callback_query"]["id"], "text": "Noted"}

    assert query["callback_query"]["data"] == "yes"
    assert (await call("answerCallbackQuery", **answer))["ok"]
    assert ann.wait_for_answer(query) == "Noted"
    assert "query ID is invalid" in (await call("answerCallbackQuery", **answer))["description"]


async def test_all_in_a_group_see_what_the_bot_says(api: BotApi, call: Client) -> None:
    ann, bob = User(api, 7, group=-100), User(api, 8, group=-100)
    ann.send("/start")
    await call("sendMessage", chat_id=-100, text="Hello, all")

    assert ann.hear("Hello") == bob.hear("Hello")
    assert bob.send("hi")["message"]["chat"]["type"] == "supergroup"


@pytest.mark.parametrize(
    ("method", "parameters", "description"),
    [
        ("sendMessage", {"chat_id": 99, "text": "x"}, "chat not found"),
        ("sendMessage", {"chat_id": 7, "text": " "}, "message text is empty"),
        ("sendMessage", {"chat_id": 7, "text": "x" * 4097}, "message is too long"),
        ("sendMessage", {"chat_id": "x", "text": "x"}, "chat_id is no integer: 'x'"),
        (
            "sendMessage",
            {"chat_id": 7, "text": "x", "reply_markup": "{"},
            "can't parse reply_markup: it is no JSON",
        ),
        ("setWebhook", {"secret_token": "?"}, "secret token contains unallowed characters"),
    ],
)
async def test_a_wrong_call_is_refused_in_telegrams_words(
    call: Client, ann: User, method: str, parameters: JSON, description: str
) -> None:
    ann.send("/start")

    answer = await call(method, **parameters)

    assert answer == {"ok": False, "error_code": 400, "description": f"Bad Request: {description}"}


async def test_unknown_tokens_methods_and_paths_are_refused(
    api: BotApi, session: aiohttp.ClientSession
) -> None:
    assert await Client(api, session, "1:nobody")("getMe") == {
        "ok": False,
        "error_code": 401,
        "description": "Unauthorized",
    }
    assert (await Client(api, session)("getMeat"))["error_code"] == 404
    assert (await Client(api, session)("get/me"))["error_code"] == 404


@pytest.mark.parametrize("encoding", ["json", "form", "multipart", "query"])
async def test_parameters_may_come_in_any_encoding(
    api: BotApi, ann: User, session: aiohttp.ClientSession, encoding: str
) -> None:
    ann.send("/start")
    url = f"{api.url}/bot{TOKEN}/SENDMESSAGE"
    parameters = {"chat_id": "7", "text": "Sure?", "reply_markup": json.dumps(KEYBOARD)}
    multipart = aiohttp.MultipartWriter("form-data")
    for name, value in parameters.items():
        multipart.append(value).set_content_disposition("form-data", name=name)
    arguments: dict[str, Any] = {
        "json": {"json": parameters | {"chat_id": 7, "reply_markup": KEYBOARD}},
        "form": {"data": parameters},
        "multipart": {"data": multipart},
        "query": {"params": parameters},
    }

    async with session.post(url, **arguments[encoding]) as response:
        answer = await response.json()

    assert answer["result"]["reply_markup"] == KEYBOARD


@asynccontextmanager
async def webhook(statuses: list[int]) -> Any:
    """A bot's server: its URL, and what came; it answers with these statuses first."""
    came: list[tuple[int, str | None]] = []

    async def take(request: web.Request) -> web.Response:
        update = await request.json()
        came.append((update["update_id"], request.headers.get("X-Telegram-Bot-Api-Secret-Token")))
        return web.Response(status=statuses.pop(0) if statuses else 200)

    application = web.Application()
    application.router.add_post("/hook", take)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/hook", came
    finally:
        await runner.cleanup()


async def test_a_webhook_gets_each_update_until_it_takes_it_in_order(
    api: BotApi, call: Client, ann: User
) -> None:
    first, second = ann.send("one"), ann.send("two")
    async with webhook([500, 503]) as (url, came):
        await call("setWebhook", url=url, secret_token="secret")

        await asyncio.to_thread(api.wait_until_confirmed)

        assert came == [(update_id, "secret") for update_id in ids(first, first, first, second)]
        info = (await call("getWebhookInfo"))["result"]
        assert (info["url"], info["pending_update_count"]) == (url, 0)
        assert info["last_error_message"] == "Wrong response from the webhook: 503 Service Unavailable"


async def test_polls_are_refused_while_there_is_a_webhook(api: BotApi, call: Client, ann: User) -> None:
    poll = asyncio.create_task(call("getUpdates", timeout=60))
    await asyncio.to_thread(api.wait_until, lambda: api.bot().is_polled or None, "a poll")
    await call("setWebhook", url="http://127.0.0.1:1/nobody")
    update = ann.send("hello")

    assert (await poll)["description"] == "Conflict: terminated by setWebhook request"
    assert (await call("getUpdates"))["error_code"] == 409
    await call("deleteWebhook")
    assert await call.update_ids() == ids(update)
    await call("deleteWebhook", drop_pending_updates=True)
    assert await call.update_ids() == []


async def test_a_call_that_is_held_has_no_effect_when_its_client_is_gone(
    api: BotApi, call: Client, ann: User
) -> None:
    ann.send("/start")
    with api.held("sendMessage") as held:
        sending = asyncio.create_task(call("sendMessage", chat_id=7, text="hello"))
        await asyncio.to_thread(held.wait_until_reached)
        sending.cancel()
        await asyncio.wait([sending])
        await asyncio.to_thread(held.wait_until_left)
    await call("sendMessage", chat_id=7, text="there")

    assert ann.shown == ["there"]


Send = Callable[[BotApi], Awaitable[str]]


async def by_aiogram(api: BotApi) -> str:
    bot = aiogram.Bot(TOKEN, session=AiohttpSession(api=TelegramAPIServer.from_base(api.url)))
    async with bot:
        updates = await bot.get_updates()
        assert updates[0].message is not None
        sent = await bot.send_message(updates[0].message.chat.id, "Sure?")
        await bot.edit_message_text("Done", chat_id=sent.chat.id, message_id=sent.message_id)
        with pytest.raises(TelegramRetryAfter) as refused:
            await bot.send_chat_action(sent.chat.id, "typing")
        assert refused.value.retry_after == 3
        return str((await bot.get_me()).username)


async def by_python_telegram_bot(api: BotApi) -> str:
    async with telegram.Bot(TOKEN, base_url=f"{api.url}/bot") as bot:
        updates = await bot.get_updates()
        assert updates[0].message is not None
        sent = await bot.send_message(updates[0].message.chat.id, "Sure?")
        await bot.edit_message_text("Done", chat_id=sent.chat.id, message_id=sent.message_id)
        with pytest.raises(telegram.error.RetryAfter):
            await bot.send_chat_action(sent.chat.id, "typing")
        return bot.username


async def by_telebot(api: BotApi) -> str:
    return await asyncio.to_thread(_by_telebot)


def _by_telebot() -> str:
    bot = telebot.TeleBot(TOKEN, threaded=False)
    updates = bot.get_updates()
    assert updates[0].message is not None
    sent = bot.send_message(updates[0].message.chat.id, "Sure?")
    bot.edit_message_text("Done", chat_id=sent.chat.id, message_id=sent.message_id)
    with pytest.raises(apihelper.ApiTelegramException, match="retry after 3"):
        bot.send_chat_action(sent.chat.id, "typing")
    return str(bot.get_me().username)


@pytest.mark.parametrize("send", [by_aiogram, by_python_telegram_bot, by_telebot])
async def test_the_frameworks_own_clients_talk_to_it(
    api: BotApi, ann: User, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apihelper, "API_URL", api.url + "/bot{0}/{1}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PTB_TIMEDELTA", "1")  # what it warns of otherwise
    ann.send("/start")
    api.fail_next("sendChatAction", 429, "Too Many Requests: retry after 3", retry_after=3)

    username = await send(api)

    assert username == "test_1000001_bot"
    assert ann.shown == ["Sure?", "Done"]
