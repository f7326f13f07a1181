"""State: what a conversation is in, as users read and write it."""

from __future__ import annotations

import copy
import pickle
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from fsm_ray.protocol import ContentView, RecordView, state_of
from fsm_ray.record import NEVER_MS
from fsm_ray.state import State

SOON = datetime(2026, 2, 28, 12, tzinfo=UTC)


class TestFields:
    def test_a_new_state_is_in_no_flow_and_no_state_and_has_no_data(self) -> None:
        state = State()

        assert (state.flow, state.state, state.data) == (None, None, {})
        assert (state.version, state.expires_at) == (None, None)

    def test_the_flow_can_be_chosen(self) -> None:
        state = State(flow="registration")

        assert (state.flow, state.state, state.data) == ("registration", None, {})

    def test_the_state_can_be_chosen_without_a_flow(self) -> None:
        state = State(state="get_name")

        assert (state.flow, state.state, state.data) == (None, "get_name", {})

    def test_flow_state_and_data_can_be_chosen_together(self) -> None:
        state = State(flow="registration", state="get_name", data={"name": "Alice"})

        assert (state.flow, state.state, state.data) == ("registration", "get_name", {"name": "Alice"})

    def test_the_data_can_be_chosen(self) -> None:
        assert State(data={"name": "Alice", "age": 30}).data == {"name": "Alice", "age": 30}

    def test_state_and_data_can_be_chosen_together(self) -> None:
        state = State(state="get_email", data={"name": "Alice"})

        assert (state.state, state.data) == ("get_email", {"name": "Alice"})

    @pytest.mark.parametrize("name", ["idle", "Form:name", "имя", "", None])
    def test_any_string_or_none_is_a_flow_and_a_state(self, name: str | None) -> None:
        state = State(flow=name, state=name)

        assert (state.flow, state.state) == (name, name)


class TestChanges:
    def test_a_copy_with_changes_keeps_the_other_fields(self) -> None:
        before = State(flow="registration", state="get_name", data={"name": "Alice"}, version=3)

        after = before.model_copy(update={"state": "get_email"})

        assert after == State(flow="registration", state="get_email", data={"name": "Alice"})
        assert after.version == 3
        assert before.state == "get_name"

    def test_a_copy_without_the_flow_keeps_the_data(self) -> None:
        before = State(flow="registration", state="get_name", data={"name": "Alice"})

        after = before.model_copy(update={"flow": None, "state": None})

        assert after == State(data={"name": "Alice"})

    def test_fields_can_be_assigned(self) -> None:
        state = State(flow="registration", state="get_name")

        state.state = "get_email"
        state.data["name"] = "Alice"

        assert state == State(flow="registration", state="get_email", data={"name": "Alice"})

    @pytest.mark.parametrize(
        ("field", "value"), [("flow", 1), ("state", b"x"), ("data", None), ("version", "1")]
    )
    def test_a_refused_assignment_changes_nothing(self, field: str, value: object) -> None:
        state = State(flow="registration", state="get_name", data={"name": "Alice"}, version=3)
        before = state.model_copy(deep=True)

        with pytest.raises(ValidationError, match=field):
            setattr(state, field, value)

        assert state == before
        assert state.version == before.version


class TestStrictness:
    @pytest.mark.parametrize("field", ["flow", "state"])
    @pytest.mark.parametrize("value", [1, True, 1.5, b"idle", ["idle"], ("idle",), object()])
    def test_a_name_that_is_no_string_is_refused(self, field: str, value: object) -> None:
        with pytest.raises(ValidationError, match=field):
            State(**{field: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize("data", [None, "name", 1, ["name"], [("name", "Alice")], {"name"}])
    def test_data_that_is_no_dict_is_refused(self, data: Any) -> None:
        with pytest.raises(ValidationError, match="data"):
            State(data=data)

    @pytest.mark.parametrize("key", [1, None, b"name", ("name",), True])
    def test_data_with_a_key_that_is_no_string_is_refused(self, key: Any) -> None:
        with pytest.raises(ValidationError, match="data"):
            State(data={key: "Alice"})

    @pytest.mark.parametrize("version", ["1", 1.0, True, b"1"])
    def test_a_version_that_is_no_int_is_refused(self, version: Any) -> None:
        with pytest.raises(ValidationError, match="version"):
            State(version=version)

    @pytest.mark.parametrize("moment", [1.5, "2026-02-28T12:00:00Z", datetime(2026, 2, 28)])  # noqa: DTZ001
    def test_an_expiry_that_is_no_aware_datetime_is_refused(self, moment: Any) -> None:
        with pytest.raises(ValidationError, match="expires_at"):
            State(expires_at=moment)

    def test_an_unknown_field_is_refused(self) -> None:
        with pytest.raises(ValidationError, match="step"):
            State(step="get_name")  # type: ignore[call-arg]

    def test_an_unknown_attribute_cannot_be_assigned(self) -> None:
        state = State()

        with pytest.raises(ValidationError, match="step"):
            state.step = "get_name"  # type: ignore[attr-defined]

    def test_values_in_the_data_are_kept_as_they_are(self) -> None:
        value = object()

        assert State(data={"value": value}).data["value"] is value


class TestEquality:
    def test_states_that_say_the_same_are_equal_whatever_their_version_and_expiry(self) -> None:
        state = State(flow="registration", state="get_name", data={"a": 1}, version=1, expires_at=SOON)

        assert state == State(flow="registration", state="get_name", data={"a": 1}, version=2)
        assert state == State(flow="registration", state="get_name", data={"a": 1})

    @pytest.mark.parametrize("change", [{"flow": None}, {"state": None}, {"data": {}}])
    def test_states_that_differ_in_flow_state_or_data_differ(self, change: dict[str, Any]) -> None:
        state = State(flow="registration", state="get_name", data={"a": 1}, version=1)

        assert state != state.model_copy(update=change)

    def test_a_state_equals_nothing_but_a_state(self) -> None:
        assert State() != {"flow": None, "state": None, "data": {}, "version": None}
        assert State() != None  # noqa: E711  # the operator is what is tested

    def test_a_state_cannot_be_hashed(self) -> None:
        with pytest.raises(TypeError, match="unhashable"):
            hash(State())


class TestCopies:
    def test_the_dict_given_is_not_the_dict_held(self) -> None:
        given = {"name": "Alice"}
        state = State(data=given)

        given["name"] = "Bob"
        state.data["age"] = 30

        assert state.data == {"name": "Alice", "age": 30}
        assert given == {"name": "Bob"}

    def test_the_dict_assigned_is_not_the_dict_held(self) -> None:
        given = {"name": "Alice"}
        state = State()

        state.data = given
        given["name"] = "Bob"

        assert state.data == {"name": "Alice"}

    def test_two_new_states_share_no_data(self) -> None:
        State().data["name"] = "Alice"

        assert State().data == {}

    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    def test_a_state_survives_pickling(self, protocol: int) -> None:
        state = State(flow="f", state="s", data={"tags": {"a", "b"}}, version=3, expires_at=SOON)

        copied = pickle.loads(pickle.dumps(state, protocol))

        assert type(copied) is State
        assert copied == state
        assert (copied.version, copied.expires_at) == (3, SOON)

    def test_a_deep_copy_shares_nothing(self) -> None:
        state = State(data={"tags": ["a"]})

        copied = copy.deepcopy(state)
        copied.data["tags"].append("b")

        assert state == State(data={"tags": ["a"]})


class TestWhatIsShown:
    def test_a_state_that_never_expires_does_not_speak_of_it(self) -> None:
        assert repr(State(version=1)) == "State(flow=None, state=None, data={}, version=1)"

    def test_a_state_that_expires_tells_when(self) -> None:
        assert repr(State(expires_at=SOON)).endswith(f", version=None, expires_at={SOON!r})")


class TestStateOf:
    @pytest.mark.parametrize(
        ("deadline_ms", "expires_at"),
        [
            (NEVER_MS, None),
            (0, datetime(1970, 1, 1, tzinfo=UTC)),
            (1_772_280_000_001, SOON + timedelta(milliseconds=1)),
            (253_402_300_799_999, datetime.max.replace(microsecond=999_000, tzinfo=UTC)),
            (253_402_300_800_000, None),
        ],
    )
    def test_a_record_is_read_with_its_version_and_expiry(
        self, deadline_ms: int, expires_at: datetime | None
    ) -> None:
        content = ContentView({"a": 1}, 7, deadline_ms=deadline_ms)

        state = state_of(RecordView("f", "s", content))

        assert state == State(flow="f", state="s", data={"a": 1})
        assert (state.version, state.expires_at) == (7, expires_at)
