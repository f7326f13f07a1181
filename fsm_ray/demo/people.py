"""What people do in one chat with a registration bot: answer, err, correct, press twice, give up, return."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

FIRST_NAMES = (
    *("Ada", "Alan", "Amélie", "Anders", "Björn", "Chiara", "Dmitri", "Edsger", "Fatima", "Grace", "Hedy"),
    *("Ihor", "Joana", "Kenji", "Leïla", "Łukasz", "Mei", "Noor", "Olga", "Paweł", "Radia", "Søren", "Timo"),
    *("Юлия", "Иван", "Zoë", "愛", "علي"),
)
LAST_NAMES = (
    *("Lovelace", "Turing", "Okafor", "Jørgensen", "Rossi", "Ivanova", "Dijkstra", "Haddad", "Hopper"),
    *("Kovalenko", "Silva", "Tanaka", "Kowalski", "Chen", "Perlman", "Virtanen", "Müller"),
)
FIELDS = ("name", "age", "email")
CONFIRM = "confirm"
CHANGE = "change:"
BUTTONS = (("Confirm", CONFIRM), *((f"Change {field}", f"{CHANGE}{field}") for field in FIELDS))
"""Text and data of the buttons below the bot's last question."""

_NO_AGES = ("twenty", "39 years", "-5", "none of your business", "4e2", "1999")
_NO_EMAILS = ("ada at example dot org", "later", "example.org", "@ada")
_SMALL_TALK = ("Good morning!", "Who has the slides?", "😂😂", "+1", "See you tomorrow", "ok")


class Chance(random.Random):
    """Decides everything, from a seed."""

    def happens(self, probability: float) -> bool:
        return self.random() < probability


@dataclass(frozen=True)
class Say:
    """Sends a message."""

    text: str
    answers: str | None = None
    """The field that it is meant to answer."""


@dataclass(frozen=True)
class Edit:
    """Edits the latest message that answered the field."""

    field: str
    text: str


@dataclass(frozen=True)
class Press:
    """Presses a button below the bot's latest question."""

    data: str


Action = Say | Edit | Press


def registration(chance: Chance) -> Iterator[Action]:
    """One person's way through the dialogue, from /start to the end, or until they lose interest."""
    while True:
        yield Say("/start")
        patience = len(FIELDS) if chance.happens(0.88) else chance.randrange(len(FIELDS))
        for field in FIELDS[:patience]:
            yield from _answer(field, chance)
        if patience == len(FIELDS):
            yield from _confirm(chance)
            if chance.happens(0.85):
                return
        elif chance.happens(0.5):
            yield Say("/cancel")
        if chance.happens(0.5):
            return


def small_talk(chance: Chance) -> Iterator[Action]:
    """Messages of somebody in a group who wants nothing from the bot."""
    for _ in range(chance.randint(1, 3)):
        yield Say(chance.choice(_SMALL_TALK))


def _answer(field: str, chance: Chance) -> Iterator[Action]:
    while field != "name" and chance.happens(0.15):
        yield Say(chance.choice(_NO_AGES if field == "age" else _NO_EMAILS))
    yield Say(_value(field, chance), field)
    if chance.happens(0.08):
        yield Edit(field, _value(field, chance))


def _confirm(chance: Chance) -> Iterator[Action]:
    while chance.happens(0.25):
        field = chance.choice(FIELDS)
        yield Press(f"{CHANGE}{field}")
        yield from _answer(field, chance)
    yield Press(CONFIRM)
    if chance.happens(0.1):
        yield Press(CONFIRM)
    if chance.happens(0.1):
        yield Say("Thanks!")


def _value(field: str, chance: Chance) -> str:
    name = f"{chance.choice(FIRST_NAMES)} {chance.choice(LAST_NAMES)}"
    if field == "name":
        return name
    if field == "age":
        return str(chance.randint(14, 99))
    return f"{_ascii(name) or 'me'}{chance.randint(1, 99)}@example.{chance.choice(('org', 'com', 'net'))}"


def _ascii(name: str) -> str:
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return letters.strip().lower().replace(" ", ".")
