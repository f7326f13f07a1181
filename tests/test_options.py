"""Options: defaults, bounds, and what a bot may be called."""

from __future__ import annotations

import pickle
import string
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fsm_ray.channel.handshake import Endpoint
from fsm_ray.errors import InvalidBotName, InvalidOptions
from fsm_ray.options import SLOTS, STORE_SCHEMES, BotOptions, check_bot_name, make_options
from fsm_ray.routing.directory import BotDescription
from fsm_ray.stores.base import Place

NAME_CHARACTERS = string.ascii_letters + string.digits + "_.@-"

FITTING: dict[str, list[Any]] = {
    "store": [
        "memory://",
        "rocksdb:///var/lib/bot",
        "redis://user:secret@host:6379/0",
        "rediss://host",
        "unix:///run/redis.sock",
        "postgresql://user@host/db?sslmode=require",
        "s3://bucket/prefix",
        "gs://bucket",
        "az://container",
        "file:///mnt/shared",
    ],
    "shards": [1, 2, SLOTS],
    "ttl_s": [None, 0.001, 86_400, 1e10],
    "ttl_mode": ["idle", "absolute"],
    "state_ttl_s": [{}, {"get_code": 300, "registration:get_name": 0.5}],
    "max_record_bytes": [256, 1 << 20, 16 << 20],
    "allow_pickle": [True, False],
    "listen_host": [None, "127.0.0.1", "::1"],
    "ownership_lease_s": [0.2, 5.0, 300.0],
    "node_resource": [None, "node:10.0.0.7", "bot_disk"],
    "encryption_keys": [None],
}

OUT_OF_BOUNDS: dict[str, list[Any]] = {
    "shards": [0, -1, SLOTS + 1],
    "ttl_s": [0, -1.0, 1.1e10, float("nan"), float("inf")],
    "ttl_mode": ["", "sliding"],
    "state_ttl_s": [{"get_code": 0}, {"get_code": -1.0}, {"get_code": float("inf")}],
    "max_record_bytes": [0, -1, 255, (16 << 20) + 1],
    "ownership_lease_s": [0.0, -1.0, 0.19, 300.1, float("nan"), float("inf")],
}

OF_ANOTHER_TYPE: dict[str, list[Any]] = {
    "store": [None, b"memory://", 1],
    "shards": ["4", 4.0, True, None, b"4"],
    "ttl_s": ["60", True],
    "ttl_mode": [None, 1],
    "state_ttl_s": [None, 300, {"get_code": "300"}, {"get_code": None}, {1: 300.0}],
    "max_record_bytes": ["1024", 1024.0, True, None],
    "allow_pickle": [1, 0, "yes", "false", None],
    "listen_host": [1, b"127.0.0.1", ("127.0.0.1",)],
    "ownership_lease_s": ["5", True, None],
    "node_resource": [1, b"disk"],
    "encryption_keys": [1, b"env:KEYS", Path("/etc/keys.json")],
}


def cases(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


class Bots(str, Enum):  # noqa: UP042  # the older kind, whose members print as "Bots.MAIN"
    MAIN = "main"


class TestDefaults:
    def test_a_bot_is_kept_by_one_shard_in_memory(self) -> None:
        options = BotOptions()

        assert (options.store, options.shards) == ("memory://", 1)

    def test_a_record_may_take_a_mebibyte(self) -> None:
        assert BotOptions().max_record_bytes == 1_048_576

    def test_pickle_is_allowed(self) -> None:
        assert BotOptions().allow_pickle is True

    def test_conversations_live_for_ever(self) -> None:
        options = BotOptions()

        assert (options.ttl_s, options.ttl_mode, options.state_ttl_s) == (None, "idle", {})

    def test_shards_listen_where_ray_does(self) -> None:
        assert BotOptions().listen_host is None

    def test_a_lease_takes_five_seconds(self) -> None:
        assert BotOptions().ownership_lease_s == 5.0

    def test_a_rocksdb_store_is_on_the_head_node(self) -> None:
        assert BotOptions().node_resource is None

    def test_every_option_is_tested_here(self) -> None:
        assert BotOptions.model_fields.keys() == FITTING.keys()


class TestBounds:
    @pytest.mark.parametrize(("name", "value"), cases(FITTING))
    def test_a_value_within_bounds_is_kept_as_it_is(self, name: str, value: Any) -> None:
        assert getattr(make_options(None, {name: value}), name) == value

    @pytest.mark.parametrize(("name", "value"), cases(OUT_OF_BOUNDS))
    def test_a_value_out_of_bounds_is_refused_by_name(self, name: str, value: Any) -> None:
        with pytest.raises(InvalidOptions, match=name):
            make_options(None, {name: value})

    @pytest.mark.parametrize(("name", "value"), cases(OF_ANOTHER_TYPE))
    def test_a_value_of_another_type_is_never_converted(self, name: str, value: Any) -> None:
        with pytest.raises(InvalidOptions, match=name):
            make_options(None, {name: value})

    @pytest.mark.parametrize(
        "store",
        ["", "memory", "memory:", "memory:/", "MEMORY://", " memory://", "mysql://host", "://", "memory ://"],
    )
    def test_a_store_of_an_unknown_scheme_is_refused_and_the_known_ones_are_named(self, store: str) -> None:
        with pytest.raises(InvalidOptions) as refused:
            make_options(None, {"store": store})

        assert repr(store) in str(refused.value)
        assert all(f"{scheme}://" in str(refused.value) for scheme in STORE_SCHEMES)

    def test_an_unknown_option_is_refused_by_name(self) -> None:
        with pytest.raises(InvalidOptions, match="ttl"):
            make_options(None, {"ttl": 60})

    def test_all_faults_are_told_at_once(self) -> None:
        with pytest.raises(InvalidOptions) as refused:
            make_options(None, {"shards": 0, "max_record_bytes": 1, "colour": "red"})

        assert all(name in str(refused.value) for name in ("shards", "max_record_bytes", "colour"))

    def test_the_error_carries_pydantics_own_as_its_cause(self) -> None:
        with pytest.raises(InvalidOptions) as refused:
            make_options(None, {"shards": 0})

        assert isinstance(refused.value.__cause__, ValidationError)


class TestMakeOptions:
    def test_without_anything_the_defaults_are_given(self) -> None:
        assert make_options(None, {}) == BotOptions()

    def test_options_without_changes_are_kept(self) -> None:
        options = BotOptions(shards=4, allow_pickle=False)

        assert make_options(options, {}) == options

    def test_changes_win_over_options_and_leave_the_others_alone(self) -> None:
        options = BotOptions(shards=4, allow_pickle=False)

        assert make_options(options, {"shards": 8}) == BotOptions(shards=8, allow_pickle=False)
        assert options.shards == 4

    def test_changes_are_checked_like_options(self) -> None:
        with pytest.raises(InvalidOptions, match="shards"):
            make_options(BotOptions(), {"shards": 0})

    @pytest.mark.parametrize("options", [{"shards": 4}, "memory://", 4, BotOptions, (), {}, False])
    def test_options_of_another_type_are_refused(self, options: Any) -> None:
        with pytest.raises(InvalidOptions, match="BotOptions"):
            make_options(options, {})


class TestAsAValue:
    @pytest.mark.parametrize("name", FITTING)
    def test_no_option_can_be_changed_afterwards(self, name: str) -> None:
        options = BotOptions()

        with pytest.raises(ValidationError):
            setattr(options, name, FITTING[name][-1])

    def test_options_survive_pickling(self) -> None:
        options = BotOptions(shards=4, max_record_bytes=1024, allow_pickle=False, listen_host="127.0.0.1")

        assert pickle.loads(pickle.dumps(options)) == options

    @pytest.mark.parametrize("show", [repr, str])
    def test_they_show_no_password_nor_does_what_holds_them(self, show: Callable[[object], str]) -> None:
        options = BotOptions(store="redis://user:secret@host:6379/0?password=secret", shards=4)
        holders = (
            options,
            Endpoint(options, "node", "/socket", None, b"proof"),
            BotDescription("bot", options),
            Place(url=options.store, bot_name="bot", shard=0, shards=4, lease_s=5.0),
        )

        assert [show(each) for each in holders if "secret" in show(each)] == []
        assert "redis://user:***@host:6379/0" in show(options)
        assert "shards=4" in show(options)

    def test_options_are_equal_when_every_value_is_and_only_then(self) -> None:
        assert BotOptions(shards=4) == BotOptions(shards=4)
        assert BotOptions(shards=4) != BotOptions(shards=5)


class TestBotNames:
    @pytest.mark.parametrize(
        "name",
        ["a", "7", "my_bot", "@my_bot", "my.bot-2", "A" * 64, "_", "user@host.example", NAME_CHARACTERS[:64]],
    )
    def test_letters_digits_and_four_signs_make_a_name(self, name: str) -> None:
        assert check_bot_name(name) == name

    @pytest.mark.parametrize(
        "name",
        [
            "",
            "A" * 65,
            "my bot",
            "my_bot\n",
            "\nmy_bot",
            "my\nbot",
            "my_bot\x00",
            "my/bot",
            "my\\bot",
            "my:bot",
            "бот",
            "bôt",
            "bot²",
            "\u0661",
            "bot\u200b",
            "\ud800",
            "*",
            " ",
        ],
    )
    def test_anything_else_is_no_name(self, name: str) -> None:
        with pytest.raises(InvalidBotName):
            check_bot_name(name)

    @pytest.mark.parametrize("name", [None, 1, b"my_bot", ("my_bot",), ["m"], True, object])
    def test_what_is_no_str_is_no_name(self, name: object) -> None:
        with pytest.raises(InvalidBotName):
            check_bot_name(name)

    @pytest.mark.parametrize("name", [".", "..", "...", ".hidden", "-", "-rf", "--help"])
    def test_a_name_that_means_something_to_a_file_system_or_a_command_is_no_name(self, name: str) -> None:
        with pytest.raises(InvalidBotName):
            check_bot_name(name)

    def test_a_name_that_prints_otherwise_than_it_compares_is_no_name(self) -> None:
        # f"{Bots.MAIN}/0" is "Bots.MAIN/0": its actors would not be those of the equal name "main".
        with pytest.raises(InvalidBotName):
            check_bot_name(Bots.MAIN)

    @pytest.mark.parametrize("name", ["my bot", None, 7])
    def test_the_error_carries_the_name_and_tells_the_rule(self, name: object) -> None:
        with pytest.raises(InvalidBotName, match="1 to 64 letters, digits or") as refused:
            check_bot_name(name)

        assert refused.value.bot == name
        assert repr(name) in str(refused.value)

    @given(st.text(st.characters(codec="utf-8") | st.sampled_from(NAME_CHARACTERS), max_size=70))
    def test_a_name_is_accepted_exactly_when_it_follows_the_rule(self, name: str) -> None:
        follows = 1 <= len(name) <= 64 and set(name) <= set(NAME_CHARACTERS) and name[0] not in ".-"

        try:
            accepted = check_bot_name(name) == name
        except InvalidBotName:
            accepted = False

        assert accepted == follows


class TestEncryptionKeys:
    @pytest.mark.parametrize("where", ["file:///etc/fsm_ray/keys.json", "env:FSM_RAY_KEYS", "env:_K2"])
    def test_they_are_said_to_be_in_a_file_or_in_the_environment(self, where: str) -> None:
        assert BotOptions(store="redis://host", encryption_keys=where).encryption_keys == where

    @pytest.mark.parametrize("where", ["", "file://keys.json", "/etc/keys.json", "env:", "env:A B", "s3cret"])
    def test_anything_else_is_refused_and_not_shown_as_it_may_be_a_key(self, where: str) -> None:
        with pytest.raises(InvalidOptions, match="encryption_keys") as caught:
            make_options(None, {"store": "redis://host", "encryption_keys": where})

        assert "s3cret" not in str(caught.value)

    def test_a_bot_in_memory_has_nothing_to_encrypt(self) -> None:
        with pytest.raises(InvalidOptions, match="memory://"):
            make_options(None, {"encryption_keys": "env:KEYS"})
