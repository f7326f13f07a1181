"""Errors: one tree, each named for what the caller can do, each able to cross process borders."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import pytest

from fsm_ray import errors
from fsm_ray.errors import FsmRayError

ALL_ERRORS: list[type[FsmRayError]] = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, FsmRayError)
]
KINDS = [kind for kind in ALL_ERRORS if kind is not FsmRayError]


def facts_of(kind: type[FsmRayError]) -> dict[str, Any]:
    """A value for every fact that the class declares."""
    names = [name for base in kind.__mro__ for name in vars(base).get("__annotations__", {})]
    return {name: (name, 1, None, {"nested": ["ä", b"\x00"]}) for name in names}


def draw(kind: type[FsmRayError]) -> list[str]:
    """The tree below an error, as the module's docstring draws it, without the remarks."""
    children = [child for child in ALL_ERRORS if child.__bases__ == (kind,)]
    lines = [kind.__name__]
    for child in children:
        corner, indent = ("└── ", "    ") if child is children[-1] else ("├── ", "│   ")
        first, *others = draw(child)
        lines += [corner + first, *(indent + line for line in others)]
    return lines


class TestTheTree:
    def test_the_drawing_in_the_docstring_is_the_real_tree(self) -> None:
        assert errors.__doc__ is not None
        drawing = errors.__doc__.split("```")[1].strip().splitlines()

        assert [re.sub(r"(?<=\w) .*", "", line) for line in drawing] == draw(FsmRayError)

    def test_every_error_is_in_the_tree(self) -> None:
        assert len(draw(FsmRayError)) == len(ALL_ERRORS)

    def test_the_base_is_a_plain_exception(self) -> None:
        assert FsmRayError.__bases__ == (Exception,)


class TestEachError:
    @pytest.mark.parametrize("kind", KINDS)
    def test_its_docstring_is_one_line_that_says_when_it_is_raised(self, kind: type[FsmRayError]) -> None:
        docstring = vars(kind)["__doc__"]

        assert re.fullmatch(r"Raised when [^\n]+\.", docstring)

    @pytest.mark.parametrize("kind", ALL_ERRORS)
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_it_survives_pickling_with_its_facts(self, kind: type[FsmRayError], protocol: int) -> None:
        error = kind("what went wrong: ä", **facts_of(kind))

        loaded = pickle.loads(pickle.dumps(error, protocol))

        assert type(loaded) is kind
        assert (loaded.args, vars(loaded)) == (error.args, facts_of(kind))

    @pytest.mark.parametrize("kind", ALL_ERRORS)
    def test_it_survives_cloudpickle_which_ray_uses(self, kind: type[FsmRayError]) -> None:
        error = kind("what went wrong", **facts_of(kind))

        loaded = pickle.loads(cloudpickle.dumps(error))

        assert type(loaded) is kind
        assert (loaded.args, vars(loaded)) == (error.args, facts_of(kind))

    @pytest.mark.parametrize("kind", ALL_ERRORS)
    def test_it_survives_copying_with_its_facts(self, kind: type[FsmRayError]) -> None:
        error = copy.copy(kind("what went wrong", **facts_of(kind)))

        assert (type(error), str(error), vars(error)) == (kind, "what went wrong", facts_of(kind))

    @pytest.mark.parametrize("kind", ALL_ERRORS)
    def test_facts_that_do_not_apply_are_none(self, kind: type[FsmRayError]) -> None:
        error = kind("what went wrong")

        assert {name: getattr(error, name) for name in facts_of(kind)} == dict.fromkeys(facts_of(kind))

    @pytest.mark.parametrize("kind", ALL_ERRORS)
    def test_it_prints_its_message_alone(self, kind: type[FsmRayError]) -> None:
        assert str(kind("what went wrong", bot="b", key=(1, 2))) == "what went wrong"

    def test_a_fact_may_have_the_name_of_the_message(self) -> None:
        error: Any = FsmRayError("what went wrong", message="a fact")

        assert (str(error), error.message) == ("what went wrong", "a fact")

    def test_every_error_has_room_for_the_bot_and_the_key(self) -> None:
        error = FsmRayError("what went wrong", bot="my_bot", key=(42, 7))

        assert (error.bot, error.key) == ("my_bot", (42, 7))


class TestWhatCallersCatch:
    def test_a_write_of_unknown_outcome_is_caught_as_unavailable(self) -> None:
        assert issubclass(errors.OutcomeUnknown, errors.NamespaceUnavailable)

    def test_whatever_fails_to_be_a_usable_argument_is_caught_as_invalid_input(self) -> None:
        fixable = (
            errors.InvalidBotName,
            errors.InvalidKey,
            errors.InvalidState,
            errors.InvalidData,
            errors.PickleNotAllowed,
            errors.RecordTooLarge,
        )

        assert all(issubclass(kind, errors.InvalidInput) for kind in fixable)

    def test_no_retryable_error_is_caught_as_invalid_input(self) -> None:
        assert not issubclass(errors.NamespaceUnavailable, errors.InvalidInput | errors.ConfigurationError)
