"""What happened in a simulation, for people: one line each, with what repeats told once."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from celery_goalstate.display import printable

#: How many evaluations a round may have that is told once when it repeats.
LONGEST_ROUND = 5
#: A round is told twice, and more of them only counted.
ROUNDS_TOLD = 2
#: Characters of a line: what calls are given can be long.
LONGEST_LINE = 110


class Sort(enum.Enum):
    """What an event is; its value is how far its line is indented."""

    LOOK = 0
    OUTCOME = 2
    STEP = 4  #: an action, a call, a commit, a fault


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. `at` is in seconds since the simulation began."""

    at: float
    sort: Sort
    text: str
    level: int = 0  #: how many stalled workers wait meanwhile


def told(events: Sequence[Event]) -> list[str]:
    """The lines of a story."""
    lines, last = [], None
    for event in _without_rounds(events):
        at = f"{event.at:9.1f} s" if event.at != last else " " * 11
        last = event.at
        indent = " " * int(event.sort.value + 4 * event.level)
        lines.append(_cut(f"{at}  {indent}{event.text}"))
    return lines


def shortened(lines: Sequence[str], most: int) -> list[str]:
    """At most so many of the lines: the first and the last ones, and of those between what went wrong."""
    if len(lines) <= most:
        return list(lines)
    marks = ("☠", "⏸", "✗", "⚡", "✉")
    faults = [n for n, line in enumerate(lines) if any(mark in line for mark in marks)][: most // 3]
    kept = set(faults)
    for n in _outside_in(len(lines)):
        if len(kept) + len(_gaps(kept, len(lines))) + 2 > most:
            break
        kept.add(n)
    shown = []
    for n, line in enumerate(lines):
        if n in kept:
            shown.append(line)
        elif n - 1 in kept or n == 0:
            gap = next((m for m in range(n, len(lines)) if m in kept), len(lines)) - n
            shown.append(f"{' ' * 11}  … {gap} more lines")
    return shown


def scrubbed(text: str, tokens: Mapping[str, int]) -> str:
    """The text, printable, without what differs from process to process: addresses, and fencing tokens."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", printable(text))
    return re.sub(
        r"\b\d{16,}\b", lambda found: f"<token {tokens[found[0]]}>" if found[0] in tokens else found[0], text
    )


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 1]}…"


def _outside_in(count: int) -> list[int]:
    """0, the last, 1, the last but one, ..."""
    return [n // 2 if n % 2 == 0 else count - 1 - n // 2 for n in range(count)]


def _gaps(kept: set[int], count: int) -> list[int]:
    return [n for n in range(count) if n not in kept and (n == 0 or n - 1 in kept)]


def _without_rounds(events: Sequence[Event]) -> list[Event]:
    blocks: list[list[Event]] = []  # an evaluation, and what belongs to it
    for event in events:
        if event.sort is Sort.LOOK or not blocks:
            blocks.append([])
        blocks[-1].append(event)
    signs = [[(event.level, _timeless(event.text)) for event in block] for block in blocks]
    kept: list[Event] = []
    start = 0
    while start < len(blocks):
        length, rounds = _rounds(signs, start)
        shown = min(rounds, ROUNDS_TOLD) if rounds > ROUNDS_TOLD + 1 else rounds
        for block in blocks[start : start + shown * length]:
            kept += block
        end = start + rounds * length
        if shown < rounds:
            last = blocks[end - 1][-1]
            more = f"… and so on: {(rounds - shown) * length} more of these"
            kept.append(Event(last.at, Sort.LOOK, more, blocks[start][0].level))
        start = end
    return kept


def _timeless(text: str) -> str:
    return re.sub(r"failure \d+|\bin [\d.]+ \w+|<token \d+>", "", text)


def _rounds(signs: Sequence[object], start: int) -> tuple[int, int]:
    """How long the round is that repeats from here, and how often it is there; (1, 1): none repeats."""
    for length in range(1, LONGEST_ROUND + 1):
        one, rounds = signs[start : start + length], 1
        while signs[start + rounds * length : start + (rounds + 1) * length] == one:
            rounds += 1
        if rounds > ROUNDS_TOLD + 1:
            return length, rounds
    return 1, 1
