"""Flows: a conversation's named states, which may follow which, and what happens on a forbidden step.

Pure: nothing here is stored or sent. A `Draft` is the working copy that a handler changes; its helpers leave
the state within those that the active flow declares.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import ValidationError

from fsm_ray.errors import InvalidFlow, InvalidState, InvalidTransition, UnknownFlow, UnknownState
from fsm_ray.state import State

Policy = Literal["raise", "log", "ignore"] | Callable[["Draft", str | None, str], object]
"""On a forbidden step: raise InvalidTransition, log a warning, do nothing, or call this with the draft, from
where, and to where. What a callable does to the draft is all that happens."""

_logger = logging.getLogger(__name__)


class Flow:
    """Subclass it to declare a flow; the declaration is checked, and made immutable, with the class.

    Names are `str`, members of a `StrEnum` too. A flow's subclass inherits states and transitions unless it
    declares either. A class that has neither is a base for flows, and cannot be registered.

    Examples:
        >>> class Registration(Flow):
        ...     name = "registration"
        ...     default_state = "get_name"
        ...     transitions = {"get_name": ["get_email"], "get_email": ["done", "get_name"], "done": []}
        >>> print(Registration.mermaid())
        stateDiagram-v2
            [*] --> get_name
            get_name --> get_email
            get_email --> done
            get_email --> get_name
            done --> [*]

    Raises:
        InvalidFlow: there are no states, or a name is empty, given twice, or not that of a declared state, or
            a state cannot be reached from the default state.
    """

    name: ClassVar[str] = ""
    """What `State.flow` holds in this flow; left out, the class's own name."""

    default_state: ClassVar[str | None] = None
    """Where the flow starts; None: in no state, and any may come first."""

    states: ClassVar[Sequence[str]] = ()
    """Every state; left out, the keys of `transitions`."""

    transitions: ClassVar[Mapping[str, Sequence[str]] | None] = None
    """State -> those that may follow; a state left out is a dead end. None: every transition is allowed."""

    def __init_subclass__(cls, **arguments: object) -> None:
        super().__init_subclass__(**arguments)
        own = vars(cls)
        cls.name = _name(cls, "name", own.get("name", cls.__name__))
        if own.get("states") is not None or own.get("transitions") is not None:
            _declare(cls, own.get("states"), own.get("transitions"))
        # cloudpickle makes a class of `__main__` without its attributes first: no states is no error here.
        if cls.states and cls.default_state is not None:
            cls.default_state = _name(cls, "default_state", cls.default_state)
            _check_declared(cls, "default_state", cls.default_state)
            _check_reachable(cls, cls.default_state)

    @classmethod
    def allowed_from(cls, state: str | None) -> Sequence[str]:
        """The states that may follow this one; any, when the conversation is in no state yet."""
        if state is None or cls.transitions is None:
            return cls.states
        return cls.transitions.get(state, ())

    @classmethod
    def mermaid(cls) -> str:
        """The flow as a Mermaid state diagram; the same declaration gives the same text."""
        ids = {state: _mermaid_id(number, state) for number, state in enumerate(cls.states)}
        lines = [f'state "{_mermaid_label(state)}" as {ids[state]}' for state in ids if ids[state] != state]
        starts = cls.states if cls.default_state is None else (cls.default_state,)
        lines += [f"[*] --> {ids[state]}" for state in starts]
        for state in cls.states:
            ends = [ids[following] for following in cls.allowed_from(state)] or ["[*]"]
            lines += [f"{ids[state]} --> {end}" for end in ends]
        return "\n    ".join(["stateDiagram-v2", *lines])


class FlowRules:
    """The flows registered for a bot, by name, and the policy for a forbidden step.

    Pickles by reference to the flows and to a callable policy; cloudpickle carries those of `__main__` too.

    Raises:
        InvalidFlow: something given is no flow, two have one name, or there is no such policy.
    """

    def __init__(self, *flows: type[Flow], on_invalid_transition: Policy = "raise") -> None:
        if on_invalid_transition not in ("raise", "log", "ignore") and not callable(on_invalid_transition):
            known = "'raise', 'log', 'ignore' or a callable"
            raise InvalidFlow(f"on_invalid_transition is {on_invalid_transition!r}; give {known}")
        self.on_invalid_transition = on_invalid_transition
        """What happens on a forbidden step."""
        self.flows: dict[str, type[Flow]] = {}
        """The registered flows by their names."""
        for flow in flows:
            if not (isinstance(flow, type) and issubclass(flow, Flow)):
                raise InvalidFlow(f"{flow!r} is no flow; register subclasses of Flow")
            if not flow.states:
                raise _invalid(flow, "it has no states; give it states or transitions")
            if flow.name in self.flows:
                other = self.flows[flow.name].__name__
                raise _invalid(flow, f"its name {flow.name!r} is also that of {other}; rename one")
            self.flows[flow.name] = flow

    def flow(self, flow: str | type[Flow]) -> type[Flow]:
        """The registered flow of this name, or of this class's name.

        Raises:
            UnknownFlow: none is registered under the name.
        """
        name = _name_of(flow)
        registered = self.flows.get(name)
        if registered is not None:
            return registered
        message = f"flow {name!r} is not registered for this bot; registered: {_listed(self.flows)}"
        raise UnknownFlow(message, flow=name, registered=tuple(self.flows))


class Draft:
    """The working copy of one conversation, made from a loaded `State`, which it takes over, data and all.

    Helpers that a policy may refuse return whether they took effect. Attributes may be assigned too, which
    checks nothing before `to_state`.

    Examples:
        >>> class Order(Flow):
        ...     transitions = {"choose": ["pay"], "pay": []}
        >>> draft = Draft(None, FlowRules(Order, on_invalid_transition="ignore"))
        >>> draft.start_flow(Order), draft.transition("choose"), draft.transition("choose")
        (True, True, False)
        >>> draft.update_data(dish="soup")
        {'dish': 'soup'}
        >>> draft.to_state()
        State(flow='Order', state='choose', data={'dish': 'soup'}, version=None)
    """

    __slots__ = ("_is_gone", "_rules", "data", "flow", "state", "version")

    def __init__(self, loaded: State | None, rules: FlowRules) -> None:
        state = State() if loaded is None else loaded
        self.flow: str | None = state.flow
        """The name of the active flow; None: none is."""
        self.state: str | None = state.state
        """The state in that flow; None: in none."""
        self.data: dict[str, Any] = state.data
        """What is known of the conversation; it may be changed in place, nested values too."""
        self.version: int | None = state.version
        """The version of what was loaded, None if there was nothing; no helper changes it."""
        self._rules = rules
        self._is_gone = loaded is None

    def get_flow(self) -> str | None:
        """The name of the active flow, None if none is."""
        return self.flow

    def get_state(self) -> str | None:
        """The state, None if the conversation is in none."""
        return self.state

    def get_data(self) -> dict[str, Any]:
        """The data itself, never None and no copy: what is changed in it is changed in the draft."""
        return self.data

    def is_in(self, flow: str | type[Flow], *states: str) -> bool:
        """Whether this flow is active, in one of these states if any are named."""
        return self.flow == _name_of(flow) and (not states or self.state in states)

    def start_flow(self, flow: str | type[Flow]) -> bool:
        """Begin a flow, or the active one anew: in its default state, without data.

        Raises:
            UnknownFlow: it is not registered; whatever the policy.
            InvalidTransition: another flow is active, and the policy is to raise.
        """
        begun = self._rules.flow(flow)
        if self.flow is not None and self.flow != begun.name:
            rule = f"flow {begun.name!r} cannot start while {self.flow!r} is active; clear_flow() ends that"
            return self._refuse(self.flow, begun.name, rule)
        self.flow, self.state, self.data = begun.name, begun.default_state, {}
        return True

    def transition(self, to: str) -> bool:
        """Go to a state that the active flow allows from here; without an active flow, to any.

        Raises:
            UnknownFlow: the active flow is not registered; whatever the policy.
            InvalidTransition: the flow does not allow it, and the policy is to raise.
        """
        to = _plain(to)
        if self.flow is not None:
            allowed = self._rules.flow(self.flow).allowed_from(self.state)
            if to not in allowed:
                allowed = tuple(allowed)
                step = f"flow {self.flow!r} has no transition from {self.state!r} to {to!r}"
                return self._refuse(self.state, to, f"{step}; allowed: {_listed(allowed)}", allowed)
        self.state = to
        return True

    def set_state(self, state: str, flow: str | type[Flow] | None = None) -> bool:
        """Go to any state of the active flow, or of the flow given, whatever is active; data is kept.

        Raises:
            UnknownFlow: the flow is not registered; whatever the policy.
            UnknownState: the flow does not declare the state; whatever the policy.
            InvalidTransition: no flow is active and none is given, and the policy is to raise.
        """
        state, chosen = _plain(state), self.flow if flow is None else flow
        if chosen is None:
            rule = f"state {state!r} cannot be set while no flow is active; start_flow() begins one"
            return self._refuse(None, state, rule)
        declared = self._rules.flow(chosen)
        if state not in declared.states:
            message = f"flow {declared.name!r} has no state {state!r}; it has: {_listed(declared.states)}"
            raise UnknownState(message, flow=declared.name, state=state)
        self.flow, self.state = declared.name, state
        return True

    def update_data(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> dict[str, Any]:
        """Merge fields into the data and return it; a value replaces the one of the same name whole."""
        self.data.update(changes or {}, **more)
        return self.data

    def clear_flow(self) -> None:
        """End the flow and forget state and data: unless more follows, no record remains."""
        self.flow, self.state, self.data = None, None, {}
        self._is_gone = True

    def to_state(self) -> State | None:
        """What is to be stored, with the loaded version; None: no record, it was cleared or never begun.

        Values nested in the data may have been changed in place: only encoded forms tell whether any was.

        Raises:
            InvalidState: an attribute was given a value that a `State` cannot have.
        """
        if self._is_gone and (self.flow, self.state, self.data) == (None, None, {}):
            return None
        try:
            return State(flow=self.flow, state=self.state, data=self.data, version=self.version)
        except ValidationError as error:
            fault = error.errors()[0]
            raise InvalidState(f"the {fault['loc'][0]} cannot be stored: {fault['msg']}") from error

    def _refuse(
        self, from_: str | None, to: str, rule: str, allowed: tuple[str, ...] | None = None
    ) -> Literal[False]:
        """Do what the policy says about a forbidden step."""
        policy = self._rules.on_invalid_transition
        if policy == "raise":
            raise InvalidTransition(rule, flow=self.flow, from_state=from_, to_state=to, allowed=allowed)
        if policy == "log":
            _logger.warning("%s; nothing was changed", rule)
        elif policy != "ignore":
            policy(self, from_, to)
        return False


def _declare(flow: type[Flow], states: object, transitions: object) -> None:
    """Keep what a class declares itself, immutable and as plain strings."""
    if not isinstance(transitions, Mapping | None):
        raise _invalid(flow, f"transitions is {transitions!r}; give a dict of lists")
    flow.states = _names(flow, "states", list(transitions or ()) if states is None else states)
    if not flow.states:
        raise _invalid(flow, "it has no states; name at least one")
    following = {
        _name(flow, "transitions", state): _names(flow, f"transitions[{state!r}]", names)
        for state, names in (transitions or {}).items()
    }
    for state in chain(following, *following.values()):
        _check_declared(flow, "transitions", state)
    every = {state: following.get(state, ()) for state in flow.states}
    flow.transitions = None if transitions is None else MappingProxyType(every)


def _check_reachable(flow: type[Flow], start: str) -> None:
    reached = [start]
    for state in reached:  # grows while it is gone through
        reached += [following for following in flow.allowed_from(state) if following not in reached]
    for state in flow.states:
        if state not in reached:
            rule = f"no transitions lead from the default state {start!r} to {state!r}; add one, or remove it"
            raise _invalid(flow, rule, state)


def _check_declared(flow: type[Flow], where: str, state: str) -> None:
    if state not in flow.states:
        rule = f"{where} names {state!r}, which is no state; add it to states, or as a key of transitions"
        raise _invalid(flow, rule, state)


def _names(flow: type[Flow], where: str, names: object) -> tuple[str, ...]:
    if not isinstance(names, list | tuple):
        raise _invalid(flow, f"{where} is {names!r}; give a list of names")
    plain = tuple(_name(flow, where, name) for name in names)
    for name in plain:
        if plain.count(name) > 1:
            raise _invalid(flow, f"{where} names {name!r} twice; name it once", name)
    return plain


def _name(flow: type[Flow], where: str, name: object) -> str:
    if not isinstance(name, str) or not name:
        raise _invalid(flow, f"{where} has the name {name!r}; give a str, or a StrEnum's member, not empty")
    return _plain(name)


def _invalid(flow: type[Flow], rule: str, state: str | None = None) -> InvalidFlow:
    return InvalidFlow(f"{flow.__name__}: {rule}", flow=flow.name, state=state)


def _plain(name: str) -> str:
    """The string alone of a StrEnum's member; `str()` of an Enum may give another."""
    return name if type(name) is str or not isinstance(name, str) else str.__str__(name)


def _name_of(flow: str | type[Flow]) -> str:
    return _plain(flow) if isinstance(flow, str) else flow.name


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


# Words of Mermaid's grammar, and ids that it makes: none can be a state's id.
_MERMAID_WORDS = re.compile(
    r"class|classdef|click|default|href|note|scale|state|statediagram|style|root_start|root_end",
    re.IGNORECASE,
)


def _mermaid_id(number: int, state: str) -> str:
    """The state's name if it can be an id, else one that no name is."""
    is_id = state.isidentifier() and not state.startswith("_") and not _MERMAID_WORDS.fullmatch(state)
    return state if is_id else f"_{number}"


def _mermaid_label(state: str) -> str:
    return re.sub(r"[^\w :.,/()-]", lambda match: f"#{ord(match[0])};", state)
