"""Flows: what may be declared, which steps are forbidden, and what a draft makes of a handler's calls."""
# ruff: noqa: RUF012  # a flow's declaration is a plain dict; what the class keeps of it is immutable

from __future__ import annotations

import base64
import logging
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from enum import Enum, StrEnum
from typing import Any, Literal

import cloudpickle  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fsm_ray.errors import InvalidFlow, InvalidState, InvalidTransition, UnknownFlow, UnknownState
from fsm_ray.flows import Draft, Flow, FlowRules, Policy
from fsm_ray.state import State

DATA = {"name": "Ada", "email": "ada@example.org"}


class Registration(Flow):
    name = "registration"
    default_state = "get_name"
    transitions = {"get_name": ["get_email"], "get_email": ["confirm", "get_name"], "confirm": []}


class Settings(Flow):
    name = "settings"
    default_state = "choose_language"
    transitions = {"choose_language": ["confirm_language"], "confirm_language": ["choose_language"]}


class Free(Flow):
    states = ["a", "b", "c"]


class NoDefault(Flow):
    name = "no_default"
    transitions = {"step_one": ["step_two"], "step_two": []}


class Step(StrEnum):
    FIRST = "first"
    LAST = "last"


class MixedIn(str, Enum):  # noqa: UP042  # older code has these, and their str() is another
    ONLY = "only"


class Typed(Flow):
    default_state = Step.FIRST
    transitions = {Step.FIRST: [Step.LAST], Step.LAST: []}


FLOWS = (Registration, Settings, Free, NoDefault, Typed)


def start_over(draft: Draft, from_: str | None, to: str) -> None:
    """A policy of a user's: note the step, and go back to the first state."""
    draft.update_data(refused=[from_, to])
    draft.set_state("get_name", flow=Registration)


def rules(policy: Policy = "raise") -> FlowRules:
    return FlowRules(*FLOWS, on_invalid_transition=policy)


def draft(
    flow: str | None = None,
    state: str | None = None,
    data: dict[str, Any] | None = None,
    policy: Policy = "raise",
) -> Draft:
    return Draft(State(flow=flow, state=state, data=data or {}, version=7), rules(policy))


def contents(draft: Draft) -> tuple[str | None, str | None, dict[str, Any]]:
    return (draft.get_flow(), draft.get_state(), draft.get_data())


def declare(**attributes: Any) -> type[Flow]:
    """A flow called Form, with these in its body."""
    return type("Form", (Flow,), attributes)


class TestNames:
    def test_a_flow_has_the_name_that_it_declares(self) -> None:
        assert Registration.name == "registration"

    def test_a_flow_that_declares_no_name_has_that_of_its_class(self) -> None:
        assert Free.name == "Free"

    def test_each_flow_has_its_own_name(self) -> None:
        assert len({flow.name for flow in FLOWS}) == len(FLOWS)

    @pytest.mark.parametrize("name", ["", None, 1, b"form"])
    def test_a_name_that_is_no_string_or_empty_is_refused(self, name: object) -> None:
        with pytest.raises(InvalidFlow, match=r"Form: name .*give a str"):
            declare(name=name, states=["a"])

    def test_a_subclass_does_not_inherit_the_name(self) -> None:
        class Longer(Registration):
            pass

        assert Longer.name == "Longer"


class TestDefaultStates:
    def test_a_flow_has_the_default_state_that_it_declares(self) -> None:
        assert Registration.default_state == "get_name"

    def test_a_flow_that_declares_no_default_state_has_none(self) -> None:
        assert (NoDefault.default_state, Free.default_state) == (None, None)

    def test_a_default_state_that_is_not_declared_is_refused(self) -> None:
        with pytest.raises(InvalidFlow, match=r"Form: default_state names 'c'.*add it") as raised:
            declare(states=["a", "b"], default_state="c")

        assert (raised.value.flow, raised.value.state) == ("Form", "c")

    @pytest.mark.parametrize("default", ["", 1, ["a"]])
    def test_a_default_state_that_is_no_name_is_refused(self, default: object) -> None:
        with pytest.raises(InvalidFlow, match="Form: default_state"):
            declare(states=["a"], default_state=default)


class TestStates:
    def test_all_declared_states_are_known_in_the_order_of_the_declaration(self) -> None:
        assert Registration.states == ("get_name", "get_email", "confirm")

    def test_a_flow_may_have_a_single_state(self) -> None:
        single = declare(transitions={"only": []})

        assert single.states == ("only",)
        assert single.transitions == {"only": ()}

    def test_states_can_be_declared_without_transitions(self) -> None:
        assert tuple(Free.states) == ("a", "b", "c")

    def test_states_are_plain_strings_though_declared_as_enum_members(self) -> None:
        mixed_in = declare(states=[MixedIn.ONLY], default_state=MixedIn.ONLY)

        assert [type(state) for state in Typed.states] == [str, str]
        assert (mixed_in.states, mixed_in.default_state) == (("only",), "only")
        assert type(mixed_in.states[0]) is type(mixed_in.default_state) is str

    def test_an_enum_that_is_no_string_is_refused_for_it_would_never_equal_the_state(self) -> None:
        plain = Enum("plain", {"A": "a"})

        with pytest.raises(InvalidFlow, match="StrEnum"):
            declare(states=list(plain))

    @pytest.mark.parametrize("attributes", [{"states": []}, {"transitions": {}}, {"states": ()}])
    def test_a_flow_without_states_is_refused(self, attributes: dict[str, Any]) -> None:
        with pytest.raises(InvalidFlow, match=r"Form: .*no states; name at least one"):
            declare(**attributes)

    def test_a_state_named_twice_is_refused(self) -> None:
        with pytest.raises(InvalidFlow, match="Form: states names 'a' twice; name it once") as raised:
            declare(states=["a", "b", "a"])

        assert raised.value.state == "a"

    @pytest.mark.parametrize("states", ["abc", {"a", "b"}, Step, 1, {"a": 1}])
    def test_states_that_are_no_list_are_refused(self, states: object) -> None:
        with pytest.raises(InvalidFlow, match=r"Form: states is .*give a list"):
            declare(states=states)

    @pytest.mark.parametrize("state", ["", None, 1])
    def test_a_state_that_is_no_string_or_empty_is_refused(self, state: object) -> None:
        with pytest.raises(InvalidFlow, match="Form: states has the name"):
            declare(states=["a", state])


class TestTransitions:
    def test_a_flow_knows_what_may_follow_each_state(self) -> None:
        assert Registration.transitions == {
            "get_name": ("get_email",),
            "get_email": ("confirm", "get_name"),
            "confirm": (),
        }

    def test_every_transition_is_allowed_when_none_is_declared(self) -> None:
        assert Free.transitions is None
        assert Free.allowed_from("a") == ("a", "b", "c")

    def test_a_state_left_out_of_the_transitions_is_a_dead_end(self) -> None:
        mixed = declare(
            states=["idle", "working", "done"], transitions={"idle": ["working"], "done": ["idle"]}
        )

        assert mixed.states == ("idle", "working", "done")
        assert mixed.transitions == {"idle": ("working",), "working": (), "done": ("idle",)}

    def test_any_state_may_come_first(self) -> None:
        assert NoDefault.allowed_from(None) == ("step_one", "step_two")
        assert Registration.allowed_from(None) == Registration.states

    def test_nothing_follows_a_state_that_is_not_declared_any_more(self) -> None:
        assert Registration.allowed_from("get_nickname") == ()

    def test_a_flow_without_declared_transitions_lets_one_leave_a_state_that_is_gone(self) -> None:
        assert Free.allowed_from("gone") == ("a", "b", "c")

    def test_a_transition_to_an_undeclared_state_is_refused(self) -> None:
        with pytest.raises(InvalidFlow, match=r"Form: transitions names 'done'.*add it") as raised:
            declare(transitions={"start": ["done"]})

        assert (raised.value.flow, raised.value.state) == ("Form", "done")

    def test_transitions_from_an_undeclared_state_are_refused(self) -> None:
        with pytest.raises(InvalidFlow, match="Form: transitions names 'b', which is no state"):
            declare(states=["a"], transitions={"a": ["a"], "b": ["a"]})

    def test_a_transition_given_twice_is_refused(self) -> None:
        with pytest.raises(InvalidFlow, match=r"Form: transitions\['a'\] names 'b' twice"):
            declare(transitions={"a": ["b", "b"], "b": []})

    def test_the_first_of_several_faults_is_told(self) -> None:
        with pytest.raises(InvalidFlow, match="'x'"):
            declare(transitions={"a": ["x", "y"]})

    @pytest.mark.parametrize("following", ["b", {"b"}, None, 1])
    def test_what_follows_must_be_a_list(self, following: object) -> None:
        with pytest.raises(InvalidFlow, match=r"Form: transitions\['a'\] is .*give a list"):
            declare(transitions={"a": following, "b": []})

    def test_transitions_that_are_no_dict_are_refused(self) -> None:
        with pytest.raises(InvalidFlow, match=r"Form: transitions is \[.*give a dict"):
            declare(transitions=[("a", "b")])

    def test_states_that_the_default_state_does_not_lead_to_are_refused(self) -> None:
        island = {"c": ["a", "d"], "d": ["c"]}

        with pytest.raises(
            InvalidFlow, match=r"Form: no transitions lead from .*'a' to 'c'; add one"
        ) as raised:
            declare(default_state="a", transitions={"a": ["b"], "b": ["a"], **island})

        assert (raised.value.flow, raised.value.state) == ("Form", "c")

    def test_states_in_a_circle_with_the_default_state_are_reachable(self) -> None:
        circle = declare(default_state="a", transitions={"a": ["b"], "b": ["c"], "c": ["a"]})

        assert circle.states == ("a", "b", "c")

    def test_without_a_default_state_every_state_is_reachable(self) -> None:
        assert declare(transitions={"a": [], "b": []}).states == ("a", "b")

    def test_without_transitions_every_state_is_reachable(self) -> None:
        assert declare(default_state="a", states=["a", "b"]).states == ("a", "b")


class TestSubclasses:
    def test_a_subclass_inherits_states_transitions_and_default_state(self) -> None:
        class Again(Registration):
            name = "again"

        assert (Again.states, Again.transitions) == (Registration.states, Registration.transitions)
        assert Again.default_state == "get_name"

    def test_a_subclass_with_transitions_of_its_own_inherits_no_states(self) -> None:
        class Shorter(Registration):
            transitions = {"get_name": ["done"], "done": []}

        assert Shorter.states == ("get_name", "done")

    def test_a_subclass_with_states_of_its_own_inherits_no_transitions(self) -> None:
        class Looser(Registration):
            states = ["get_name", "done"]

        assert Looser.transitions is None

    def test_a_subclass_can_extend_what_it_inherits(self) -> None:
        class Longer(NoDefault):
            transitions = {**(NoDefault.transitions or {}), "step_two": ["step_three"], "step_three": []}

        assert Longer.states == ("step_one", "step_two", "step_three")
        assert NoDefault.states == ("step_one", "step_two")

    def test_a_subclass_whose_states_lack_the_inherited_default_state_is_refused(self) -> None:
        with pytest.raises(InvalidFlow, match="default_state names 'get_name'"):
            type("Other", (Registration,), {"states": ["a"]})

    def test_a_subclass_that_chooses_a_default_state_from_which_not_all_is_reachable_is_refused(self) -> None:
        with pytest.raises(InvalidFlow, match="no transitions lead"):
            type("Other", (Registration,), {"default_state": "confirm"})

    def test_a_class_without_states_is_a_base_and_cannot_be_registered(self) -> None:
        class Base(Flow):
            default_state = "start"

        class Form(Base):
            states = ["start", "end"]

        assert Form.default_state == "start"
        with pytest.raises(InvalidFlow, match="Base: it has no states"):
            FlowRules(Base)

    def test_bases_of_another_kind_get_their_arguments(self) -> None:
        class Titled:
            title = ""

            def __init_subclass__(cls, *, title: str, **arguments: object) -> None:
                super().__init_subclass__(**arguments)
                cls.title = title

        class Form(Flow, Titled, title="A form"):
            states = ["a"]

        assert Form.title == "A form"


class TestImmutability:
    def test_states_and_transitions_cannot_be_changed(self) -> None:
        kept: Any = Registration

        with pytest.raises(TypeError):
            kept.states[0] = "x"
        with pytest.raises(TypeError):
            kept.transitions["confirm"] = ("get_name",)
        with pytest.raises(TypeError):
            kept.transitions["get_name"][0] = "confirm"

    def test_changing_what_was_declared_with_changes_no_flow(self) -> None:
        following = ["b"]
        transitions = {"a": following, "b": []}
        form = declare(transitions=transitions)

        following.append("a")
        transitions["c"] = []

        assert form.transitions == {"a": ("b",), "b": ()}


class TestMermaid:
    def test_a_flow_is_drawn_from_the_start_to_its_dead_ends(self) -> None:
        assert Registration.mermaid() == textwrap.dedent("""\
            stateDiagram-v2
                [*] --> get_name
                get_name --> get_email
                get_email --> confirm
                get_email --> get_name
                confirm --> [*]""")

    def test_a_flow_without_a_default_state_starts_in_any_state(self) -> None:
        assert NoDefault.mermaid() == textwrap.dedent("""\
            stateDiagram-v2
                [*] --> step_one
                [*] --> step_two
                step_one --> step_two
                step_two --> [*]""")

    def test_a_flow_without_transitions_is_drawn_with_all_of_them(self) -> None:
        assert declare(default_state="a", states=["a", "b"]).mermaid() == textwrap.dedent("""\
            stateDiagram-v2
                [*] --> a
                a --> a
                a --> b
                b --> a
                b --> b""")

    def test_names_that_are_no_ids_are_escaped(self) -> None:
        form = declare(
            default_state="Form:name", transitions={"Form:name": ['a "b"; #1\n<c>'], 'a "b"; #1\n<c>': []}
        )

        assert form.mermaid() == textwrap.dedent("""\
            stateDiagram-v2
                state "Form:name" as _0
                state "a #34;b#34;#59; #35;1#10;#60;c#62;" as _1
                [*] --> _0
                _0 --> _1
                _1 --> [*]""")

    @pytest.mark.parametrize(
        "word", ["state", "Note", "class", "default", "root_start", "_0", "имя 1", "[*]"]
    )
    def test_words_of_mermaid_are_no_ids(self, word: str) -> None:
        form = declare(default_state="_1", transitions={"_1": [word], word: []})

        assert "    _0 --> _1\n    _1 --> [*]" in form.mermaid()

    @given(st.lists(st.text(min_size=1), min_size=1, max_size=5, unique=True))
    def test_whatever_the_names_each_state_has_one_id_of_its_own(self, names: list[str]) -> None:
        drawing = declare(default_state=names[0], transitions=dict.fromkeys(names, names)).mermaid()

        arrows = re.findall(r"^    (\S+) --> (\S+)$", drawing, re.MULTILINE)
        assert len(set(arrows)) == len(arrows) == 1 + len(names) ** 2
        assert len({start for start, _ in arrows}) == 1 + len(names)


class TestFlowRules:
    def test_a_flow_is_found_by_its_name_and_by_its_class(self) -> None:
        assert rules().flow("registration") is rules().flow(Registration) is Registration
        assert list(rules().flows) == ["registration", "settings", "Free", "no_default", "Typed"]

    @pytest.mark.parametrize("flow", ["unknown", declare(states=["a"])])
    def test_a_flow_that_is_not_registered_is_refused_with_those_that_are(
        self, flow: str | type[Flow]
    ) -> None:
        with pytest.raises(UnknownFlow, match=r"not registered.*'registration', 'settings'") as raised:
            FlowRules(Registration, Settings).flow(flow)

        assert raised.value.flow in {"unknown", "Form"}
        assert raised.value.registered == ("registration", "settings")

    def test_no_flow_need_be_registered(self) -> None:
        with pytest.raises(UnknownFlow, match="registered: none"):
            FlowRules().flow("registration")

    def test_two_flows_of_one_name_are_refused(self) -> None:
        with pytest.raises(
            InvalidFlow, match="Form: its name 'settings' is also that of Settings; rename one"
        ):
            FlowRules(Settings, declare(name="settings", states=["a"]))

    @pytest.mark.parametrize("flow", ["registration", Registration(), object, None])
    def test_only_flows_are_registered(self, flow: Any) -> None:
        with pytest.raises(InvalidFlow, match="register subclasses of Flow"):
            FlowRules(flow)

    @pytest.mark.parametrize("policy", ["rise", None, 1, ("module", "function")])
    def test_an_unknown_policy_is_refused(self, policy: Any) -> None:
        with pytest.raises(InvalidFlow, match="'raise', 'log', 'ignore' or a callable"):
            FlowRules(on_invalid_transition=policy)

    def test_the_policy_is_to_raise_unless_another_is_chosen(self) -> None:
        assert FlowRules().on_invalid_transition == "raise"

    @pytest.mark.parametrize("policy", ["raise", "log", "ignore", start_over])
    @pytest.mark.parametrize("dumps", [pickle.dumps, cloudpickle.dumps])
    def test_rules_survive_pickling_by_reference(
        self, policy: Policy, dumps: Callable[[object], bytes]
    ) -> None:
        loaded = pickle.loads(dumps(rules(policy)))

        assert loaded.flows == rules().flows
        assert loaded.on_invalid_transition == policy

    @pytest.mark.slow
    def test_rules_of_a_script_reach_another_process_with_their_flows(self) -> None:
        script = """
            import base64, cloudpickle
            from fsm_ray.flows import Flow, FlowRules
            class Base(Flow):
                default_state = "get_name"
            class Form(Base):
                name = "form"
                transitions = {"get_name": ["done"], "done": []}
            class Again(Form):
                default_state = "done"
                transitions = {"done": ["done"]}
            rules = FlowRules(Form, Again, on_invalid_transition=lambda draft, from_, to: draft.clear_flow())
            print(base64.b64encode(cloudpickle.dumps(rules)).decode())
        """
        printed = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, timeout=60
        ).stdout

        loaded: FlowRules = pickle.loads(base64.b64decode(printed))

        assert list(loaded.flows) == ["form", "Again"]
        assert loaded.flow("form").transitions == {"get_name": ("done",), "done": ()}
        assert loaded.flow("Again").states == ("done",)
        form = Draft(State(flow="form", state="done"), loaded)
        assert not form.transition("get_name")
        assert form.flow is None


class TestReading:
    def test_a_draft_of_nothing_is_in_no_flow_and_no_state_and_has_no_data(self) -> None:
        new = Draft(None, rules())

        assert contents(new) == (None, None, {})
        assert new.version is None

    def test_a_draft_of_an_empty_record_is_in_no_flow_and_no_state_and_has_no_data(self) -> None:
        assert contents(draft()) == (None, None, {})

    @pytest.mark.parametrize(
        ("flow", "state"),
        [("registration", "get_name"), ("settings", "choose_language"), ("Free", None), (None, "get_name")],
    )
    def test_a_draft_has_flow_state_data_and_version_of_what_was_loaded(
        self, flow: str | None, state: str | None
    ) -> None:
        loaded = draft(flow, state, dict(DATA))

        assert contents(loaded) == (flow, state, DATA)
        assert (loaded.flow, loaded.state, loaded.data, loaded.version) == (flow, state, DATA, 7)

    def test_the_data_is_the_draft_s_own_dict_to_change(self) -> None:
        loaded = draft()

        loaded.get_data()["name"] = "Ada"

        assert loaded.data == {"name": "Ada"}

    def test_an_attribute_that_does_not_exist_cannot_be_assigned(self) -> None:
        with pytest.raises(AttributeError):
            draft().stat = "get_name"  # type: ignore[attr-defined]


class TestIsIn:
    @pytest.mark.parametrize("state", ["get_name", "confirm", None])
    def test_a_conversation_is_in_its_flow_whatever_its_state(self, state: str | None) -> None:
        assert draft("registration", state).is_in("registration")
        assert draft("registration", state).is_in(Registration)

    @pytest.mark.parametrize("flow", [None, "settings", "registrations"])
    def test_a_conversation_is_in_no_other_flow(self, flow: str | None) -> None:
        assert not draft(flow).is_in("registration")
        assert not draft(flow).is_in(Registration)

    def test_a_conversation_is_in_one_of_several_states(self) -> None:
        loaded = draft("registration", "get_email")

        assert loaded.is_in(Registration, "get_email")
        assert loaded.is_in("registration", "get_name", "get_email")
        assert not loaded.is_in(Registration, "get_name", "confirm")
        assert not loaded.is_in(Settings, "get_email")

    def test_states_may_be_enum_members(self) -> None:
        assert draft("Typed", "first").is_in(Typed, Step.FIRST)

    def test_a_draft_of_nothing_is_in_no_flow(self) -> None:
        assert not Draft(None, rules()).is_in(Registration)


class TestStartFlow:
    @pytest.mark.parametrize("flow", ["registration", Registration])
    def test_a_flow_starts_in_its_default_state_without_data(self, flow: str | type[Flow]) -> None:
        idle = draft()

        assert idle.start_flow(flow) is True
        assert contents(idle) == ("registration", "get_name", {})

    def test_starting_a_flow_clears_the_data(self) -> None:
        idle = draft(data={"old": "data"})

        idle.start_flow("registration")

        assert idle.data == {}

    def test_a_flow_without_a_default_state_starts_in_no_state(self) -> None:
        idle = draft()

        idle.start_flow("no_default")

        assert contents(idle) == ("no_default", None, {})

    def test_starting_the_active_flow_begins_it_anew(self) -> None:
        active = draft("registration", "confirm", {"name": "Ada"})

        assert active.start_flow("registration") is True
        assert contents(active) == ("registration", "get_name", {})

    @pytest.mark.parametrize("policy", ["raise", "log", "ignore", start_over])
    def test_a_flow_that_is_not_registered_is_refused_whatever_the_policy(self, policy: Policy) -> None:
        active = draft("registration", "confirm", dict(DATA), policy)

        with pytest.raises(UnknownFlow, match="'unknown_flow' is not registered"):
            active.start_flow("unknown_flow")
        assert contents(active) == ("registration", "confirm", DATA)

    def test_starting_another_flow_than_the_active_one_raises(self) -> None:
        active = draft("registration", "confirm", dict(DATA))

        with pytest.raises(InvalidTransition, match=r"'settings' cannot start .*clear_flow\(\)") as raised:
            active.start_flow(Settings)

        error = raised.value
        assert (error.flow, error.from_state, error.to_state) == ("registration", "registration", "settings")
        assert error.allowed is None
        assert contents(active) == ("registration", "confirm", DATA)

    @pytest.mark.parametrize("policy", ["log", "ignore"])
    def test_starting_another_flow_changes_nothing_when_that_is_let_pass(self, policy: Policy) -> None:
        active = draft("registration", "get_name", dict(DATA), policy)

        assert active.start_flow("settings") is False
        assert contents(active) == ("registration", "get_name", DATA)

    def test_starting_another_flow_calls_the_policy_with_both_flows(self) -> None:
        active = draft("settings", "choose_language", policy=start_over)

        assert active.start_flow("no_default") is False
        assert contents(active) == ("registration", "get_name", {"refused": ["settings", "no_default"]})

    def test_a_flow_can_start_after_one_that_is_not_registered_any_more_is_cleared(self) -> None:
        active = draft("gone", "somewhere")

        with pytest.raises(InvalidTransition, match="while 'gone' is active"):
            active.start_flow("settings")
        active.clear_flow()

        assert active.start_flow("settings")


class TestSetState:
    def test_the_state_is_set_within_the_active_flow_and_data_is_kept(self) -> None:
        active = draft("registration", "get_name", {"name": "Ada"})

        assert active.set_state("get_email") is True
        assert contents(active) == ("registration", "get_email", {"name": "Ada"})

    def test_a_state_to_which_no_transition_leads_can_be_set(self) -> None:
        active = draft("registration", "get_name")

        active.set_state("confirm")

        assert active.get_state() == "confirm"

    def test_setting_a_state_without_an_active_flow_raises(self) -> None:
        with pytest.raises(InvalidTransition, match="no flow is active") as raised:
            draft().set_state("get_name")

        error = raised.value
        assert (error.flow, error.from_state, error.to_state) == (None, None, "get_name")

    @pytest.mark.parametrize("policy", ["log", "ignore"])
    def test_setting_a_state_without_a_flow_changes_nothing_when_that_is_let_pass(
        self, policy: Policy
    ) -> None:
        idle = draft(data=dict(DATA), policy=policy)

        assert idle.set_state("get_name") is False
        assert contents(idle) == (None, None, DATA)

    def test_setting_a_state_without_a_flow_calls_the_policy(self) -> None:
        idle = draft(policy=start_over)

        assert idle.set_state("confirm") is False
        assert idle.data == {"refused": [None, "confirm"]}

    @pytest.mark.parametrize("policy", ["raise", "log", "ignore", start_over])
    @pytest.mark.parametrize("flow", [None, "registration", Registration])
    @pytest.mark.parametrize("state", ["choose_language", "", None])
    def test_a_state_that_the_flow_does_not_declare_is_refused_whatever_the_policy(
        self, policy: Policy, flow: str | type[Flow] | None, state: Any
    ) -> None:
        active = draft("registration", "confirm", dict(DATA), policy)

        with pytest.raises(UnknownState, match="it has: 'get_name', 'get_email', 'confirm'") as raised:
            active.set_state(state, flow=flow)
        assert (raised.value.flow, raised.value.state) == ("registration", state)
        assert contents(active) == ("registration", "confirm", DATA)

    def test_no_state_is_set_in_an_active_flow_that_is_not_registered(self) -> None:
        with pytest.raises(UnknownFlow, match="'gone'"):
            draft("gone", "somewhere").set_state("get_name")


class TestSetStateOfAnotherFlow:
    @pytest.mark.parametrize("flow", ["settings", Settings])
    def test_flow_and_state_are_set_whatever_is_active_and_data_is_kept(self, flow: str | type[Flow]) -> None:
        active = draft("registration", "get_name", {"name": "Ada"})

        assert active.set_state("choose_language", flow=flow) is True
        assert contents(active) == ("settings", "choose_language", {"name": "Ada"})

    @pytest.mark.parametrize("active", [None, "gone"])
    def test_flow_and_state_are_set_when_no_flow_or_an_unknown_one_is_active(
        self, active: str | None
    ) -> None:
        loaded = draft(active)

        loaded.set_state("confirm", flow="registration")

        assert contents(loaded) == ("registration", "confirm", {})

    def test_a_flow_that_is_not_registered_is_refused(self) -> None:
        active = draft("registration", "get_name")

        with pytest.raises(UnknownFlow, match="'unknown' is not registered"):
            active.set_state("step_one", flow="unknown")
        assert contents(active) == ("registration", "get_name", {})


class TestTransition:
    def test_any_state_can_be_entered_when_no_flow_is_active(self) -> None:
        idle = Draft(None, FlowRules())

        assert idle.transition("any_state") is True
        assert contents(idle) == (None, "any_state", {})

    def test_any_state_follows_any_other_in_a_flow_without_transitions(self) -> None:
        active = draft("Free", "a")

        assert active.transition("c") is True
        assert active.get_state() == "c"

    def test_an_allowed_transition_sets_the_state_and_keeps_flow_and_data(self) -> None:
        active = draft("registration", "get_name", dict(DATA))

        assert active.transition("get_email") is True
        assert contents(active) == ("registration", "get_email", DATA)

    @pytest.mark.parametrize("flow", ["no_default", "registration", "Free"])
    def test_any_declared_state_can_be_entered_from_none(self, flow: str) -> None:
        for state in rules().flow(flow).states:
            active = draft(flow)

            assert active.transition(state) is True
            assert active.state == state

    def test_a_forbidden_transition_raises_with_its_facts(self) -> None:
        active = draft("registration", "get_name", dict(DATA))

        with pytest.raises(
            InvalidTransition, match="from 'get_name' to 'confirm'; allowed: 'get_email'"
        ) as raised:
            active.transition("confirm")

        error = raised.value
        assert (error.flow, error.from_state, error.to_state) == ("registration", "get_name", "confirm")
        assert error.allowed == ("get_email",)
        assert contents(active) == ("registration", "get_name", DATA)

    @pytest.mark.parametrize("policy", ["log", "ignore"])
    def test_a_forbidden_transition_changes_nothing_when_that_is_let_pass(self, policy: Policy) -> None:
        active = draft("registration", "get_name", dict(DATA), policy)

        assert active.transition("confirm") is False
        assert contents(active) == ("registration", "get_name", DATA)

    def test_a_forbidden_transition_does_what_a_callable_policy_does(self) -> None:
        active = draft("registration", "confirm", policy=start_over)

        assert active.transition("get_email") is False
        assert contents(active) == ("registration", "get_name", {"refused": ["confirm", "get_email"]})

    def test_what_a_callable_policy_raises_comes_out(self) -> None:
        def refuse(draft: Draft, from_: str | None, to: str) -> None:
            raise PermissionError(to)

        with pytest.raises(PermissionError, match="confirm"):
            draft("registration", "get_name", policy=refuse).transition("confirm")

    def test_nothing_follows_a_dead_end(self) -> None:
        with pytest.raises(InvalidTransition, match="allowed: none"):
            draft("registration", "confirm").transition("get_name")

    def test_a_state_follows_itself_only_if_declared(self) -> None:
        with pytest.raises(InvalidTransition):
            draft("registration", "get_name").transition("get_name")

    def test_the_active_flow_s_transitions_count_alone(self) -> None:
        active = draft("settings", "choose_language")

        active.transition("confirm_language")

        assert active.get_state() == "confirm_language"
        with pytest.raises(InvalidTransition):
            active.transition("get_email")

    @pytest.mark.parametrize("state", [None, "a", "get_name"])
    @pytest.mark.parametrize("flow", ["registration", "Free"])
    def test_an_undeclared_state_is_never_entered(self, flow: str, state: str | None) -> None:
        with pytest.raises(InvalidTransition, match="to 'typo'"):
            draft(flow, state).transition("typo")

    @pytest.mark.parametrize("policy", ["raise", "log", "ignore"])
    def test_an_active_flow_that_is_not_registered_is_told_whatever_the_policy(self, policy: Policy) -> None:
        with pytest.raises(UnknownFlow, match="'gone' is not registered"):
            draft("gone", "somewhere", policy=policy).transition("get_name")

    def test_an_enum_member_is_kept_as_a_plain_string(self) -> None:
        active = draft("Typed", "first")

        active.transition(Step.LAST)
        assert (active.state, type(active.state)) == ("last", str)
        active.set_state(Step.FIRST)
        assert (active.state, type(active.state)) == ("first", str)


class TestLog:
    def test_a_forbidden_step_is_logged_once_without_the_user_s_data(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        active = draft("registration", "get_name", dict(DATA), "log")

        with caplog.at_level(logging.DEBUG):
            active.transition("confirm")

        (record,) = caplog.records
        assert (record.levelname, record.name) == ("WARNING", "fsm_ray.flows")
        assert "'get_name' to 'confirm'" in record.getMessage()
        assert not any(value in record.getMessage() for value in DATA.values())

    def test_a_forbidden_step_that_is_ignored_is_not_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.DEBUG):
            draft("registration", "get_name", policy="ignore").transition("confirm")

        assert not caplog.records


class TestUpdateData:
    def test_new_fields_join_those_that_are_there(self) -> None:
        active = draft("registration", "get_name", {"name": "Ada"})

        assert active.update_data({"email": "ada@example.org"}) == DATA
        assert contents(active) == ("registration", "get_name", DATA)

    def test_fields_of_the_same_name_are_replaced_whole(self) -> None:
        active = draft(data={"count": 1, "tags": {"a": 1}})

        active.update_data({"count": 2, "tags": {"b": 2}})

        assert active.data == {"count": 2, "tags": {"b": 2}}

    def test_fields_can_be_added_to_empty_data(self) -> None:
        active = draft("registration", "get_name")

        active.update_data({"name": "Bob"})

        assert active.data == {"name": "Bob"}

    def test_fields_can_be_given_by_keyword_also_those_called_changes_and_self(self) -> None:
        active = draft()

        active.update_data({"a": 1}, b=2, changes=3, self=4)

        assert active.data == {"a": 1, "b": 2, "changes": 3, "self": 4}

    def test_nothing_given_changes_nothing(self) -> None:
        assert draft(data={"a": 1}).update_data() == {"a": 1}


class TestClearFlow:
    def test_flow_state_and_data_are_gone(self) -> None:
        active = draft("registration", "confirm", dict(DATA))

        active.clear_flow()

        assert contents(active) == (None, None, {})

    def test_a_conversation_in_no_flow_can_be_cleared(self) -> None:
        idle = draft()

        idle.clear_flow()

        assert contents(idle) == (None, None, {})

    def test_a_flow_that_is_not_registered_can_be_cleared(self) -> None:
        active = draft("gone", "somewhere", dict(DATA))

        active.clear_flow()

        assert contents(active) == (None, None, {})


class TestToState:
    def test_an_unchanged_draft_gives_what_was_loaded(self) -> None:
        state = draft("registration", "get_name", dict(DATA)).to_state()

        assert state == State(flow="registration", state="get_name", data=DATA)
        assert state is not None
        assert state.version == 7

    def test_an_unchanged_draft_of_nothing_gives_no_record(self) -> None:
        assert Draft(None, rules()).to_state() is None

    def test_an_unchanged_draft_of_an_empty_record_gives_an_empty_record(self) -> None:
        assert draft().to_state() == State()

    def test_a_record_whose_data_was_emptied_stays(self) -> None:
        emptied = draft(data=dict(DATA))

        emptied.data.clear()

        assert emptied.to_state() == State()

    def test_a_cleared_draft_gives_no_record_and_keeps_the_version_to_compare(self) -> None:
        active = draft("registration", "confirm", dict(DATA))

        active.clear_flow()

        assert (active.to_state(), active.version) == (None, 7)

    def test_what_follows_a_clear_makes_a_record_again(self) -> None:
        active = draft("registration", "confirm", dict(DATA))

        active.clear_flow()
        active.update_data(seen=True)

        assert active.to_state() == State(data={"seen": True})

    @pytest.mark.parametrize("flow", ["no_default", "registration"])
    def test_starting_a_flow_makes_a_record(self, flow: str) -> None:
        new = Draft(None, rules())

        new.start_flow(flow)

        assert new.to_state() == State(flow=flow, state=rules().flow(flow).default_state)

    def test_values_nested_in_the_data_are_the_draft_s_own(self) -> None:
        active = draft(data={"tags": ["a"]})

        active.data["tags"].append("b")

        assert active.to_state() == State(data={"tags": ["a", "b"]})

    def test_assigned_attributes_are_stored(self) -> None:
        active = draft("registration", "get_name", dict(DATA))

        active.flow, active.state, active.data = None, "Form:name", {"a": 1}

        assert active.to_state() == State(state="Form:name", data={"a": 1})

    @pytest.mark.parametrize(
        ("field", "value"), [("flow", 1), ("state", Registration), ("data", None), ("data", {1: "secret"})]
    )
    def test_an_attribute_that_no_state_can_have_is_refused_by_name_and_not_shown(
        self, field: str, value: object
    ) -> None:
        active = draft("registration", "get_name")
        setattr(active, field, value)

        with pytest.raises(InvalidState, match=f"the {field} cannot be stored") as raised:
            active.to_state()
        assert "secret" not in str(raised.value)


class TestTogether:
    def test_a_handler_s_steps_add_up(self) -> None:
        active = draft()

        active.start_flow("registration")
        active.update_data(started=True)
        active.transition("get_email")
        active.update_data(name="Ada")

        assert contents(active) == ("registration", "get_email", {"started": True, "name": "Ada"})

    def test_a_flow_can_be_cleared_after_its_steps(self) -> None:
        active = draft()

        active.start_flow("registration")
        active.update_data(name="Ada")
        active.clear_flow()

        assert contents(active) == (None, None, {})


STATES = [None, "typo", *(state for flow in FLOWS for state in flow.states)]
NAMES = st.sampled_from([flow.name for flow in FLOWS])
STATE_NAMES = st.sampled_from([state for state in STATES if state is not None])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("start_flow"), NAMES),
        st.tuples(st.just("transition"), STATE_NAMES),
        st.tuples(st.just("set_state"), STATE_NAMES),
        st.tuples(st.just("set_state"), STATE_NAMES, NAMES),
        st.tuples(st.just("update_data"), st.dictionaries(st.text(), st.integers(), max_size=3)),
        st.tuples(st.just("clear_flow")),
    ),
    max_size=20,
)
LOADED = st.one_of(
    st.none(),
    st.builds(State, data=st.dictionaries(st.text(), st.integers(), max_size=2), version=st.just(7)),
    st.sampled_from(
        [State(flow=flow.name, state=state, version=7) for flow in FLOWS for state in flow.states]
    ),
).map(lambda state: None if state is None else state.model_copy(deep=True))


def take(draft: Draft, step: tuple[Any, ...]) -> object:
    """What the step returns, False where it is refused."""
    try:
        return getattr(draft, step[0])(*step[1:])
    except (InvalidTransition, UnknownState):
        return False


class TestAnySteps:
    @given(LOADED, STEPS, st.sampled_from(["raise", "log", "ignore", start_over]))
    def test_a_conversation_in_a_flow_stays_in_a_state_of_that_flow(
        self, loaded: State | None, steps: list[tuple[Any, ...]], policy: Policy
    ) -> None:
        draft = Draft(loaded, rules(policy))

        for step in steps:
            take(draft, step)

            if draft.flow is not None:
                flow = rules().flow(draft.flow)
                assert draft.state in flow.states or (draft.state is None and flow.default_state is None)

    @given(LOADED, STEPS, st.sampled_from(["raise", "log", "ignore"]))
    def test_a_refused_step_never_changes_anything(
        self, loaded: State | None, steps: list[tuple[Any, ...]], policy: Literal["raise", "log", "ignore"]
    ) -> None:
        draft = Draft(loaded, rules(policy))

        for step in steps:
            before = pickle.dumps((contents(draft), draft.to_state(), draft.version))

            if take(draft, step) is False:
                assert pickle.dumps((contents(draft), draft.to_state(), draft.version)) == before

    @given(LOADED, STEPS)
    def test_ignoring_and_raising_refuse_the_same_steps(
        self, loaded: State | None, steps: list[tuple[Any, ...]]
    ) -> None:
        copy = None if loaded is None else loaded.model_copy(deep=True)
        ignoring, raising = Draft(loaded, rules("ignore")), Draft(copy, rules("raise"))

        for step in steps:
            assert take(ignoring, step) == take(raising, step)
            assert contents(ignoring) == contents(raising)

    @given(LOADED, STEPS, NAMES)
    def test_starting_a_flow_again_always_clears_the_data(
        self, loaded: State | None, steps: list[tuple[Any, ...]], name: str
    ) -> None:
        draft = Draft(loaded, rules("ignore"))
        for step in steps:
            take(draft, step)
        draft.set_state(rules().flow(name).states[0], flow=name)
        draft.update_data(name="Ada")

        assert draft.start_flow(name) is True
        assert contents(draft) == (name, rules().flow(name).default_state, {})
