"""What outcomes say: which tests are to be repeated, which differ, and the page that tells it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import comb
from typing import Any

#: A difference is real if chance alone makes one as large, or larger, no more often than this.
LEVEL = 0.05


@dataclass
class Tally:
    """How often one test ended how."""

    without: Counter[str] = field(default_factory=Counter)
    engine: Counter[str] = field(default_factory=Counter)
    why: str = ""  #: what a run said that did not pass
    seconds: float = 0.0  #: that it took at most

    def add(self, end: Mapping[str, Any], *, engine: bool) -> None:
        (self.engine if engine else self.without)[end["outcome"]] += 1
        self.why = self.why or end["why"]
        self.seconds = max(self.seconds, end["seconds"])

    @property
    def steady(self) -> bool:
        """Whether every run ended alike, with the engine and without."""
        return len(self.without | self.engine) == 1

    @property
    def p(self) -> float:
        """How likely chance alone makes a difference as large as this, of the outcome that differs most."""
        of_without, of_engine = self.without.total(), self.engine.total()
        ends = self.without | self.engine
        return min(
            (fisher(self.without[e], of_without, self.engine[e], of_engine) for e in ends), default=1.0
        )


@dataclass(frozen=True)
class Verdict:
    """On one test."""

    test: str
    first: Tally  #: in the runs of everything
    among: Tally  #: repeated in the runs of the parts in which some test was not steady
    alone: Tally  #: repeated in runs of this test only, if it was not steady

    def __str__(self) -> str:
        (without, engine), (without_alone, engine_alone) = outcomes(self.among), outcomes(self.alone)
        return (
            f"{self.test}: {without} without, {engine} with an engine;"
            f" alone {without_alone} without, {engine_alone} with one"
        )

    @property
    def p(self) -> float:
        """That of the two ways to repeat it which differ more; twice, since there are two."""
        return min(1.0, 2 * min(self.among.p, self.alone.p))

    @property
    def real(self) -> bool:
        """Whether an engine makes a difference. The first runs are no evidence: they made it a suspect."""
        return self.p <= LEVEL

    @property
    def alike(self) -> bool:
        """Whether every run ended alike, the first ones and those that were repeated."""
        tallies = (self.first, self.among, self.alone)
        return len({end for tally in tallies for end in tally.without | tally.engine}) == 1


def fisher(a: int, of_a: int, b: int, of_b: int) -> float:
    """Fisher's exact test, two-sided, of `a` among `of_a` runs against `b` among `of_b`."""
    hits = a + b
    ways = [comb(of_a, n) * comb(of_b, hits - n) for n in range(min(of_a, hits) + 1)]
    return sum(each for each in ways if each <= ways[a]) / comb(of_a + of_b, hits)


def judge(
    first: Mapping[str, Tally], among: Mapping[str, Tally], alone: Mapping[str, Tally]
) -> list[Verdict]:
    return [
        Verdict(test, tally, among.get(test, Tally()), alone.get(test, Tally()))
        for test, tally in first.items()
    ]


def page(title: str, remarks: Iterable[str], verdicts: list[Verdict], left_out: Mapping[str, str]) -> str:
    """As Markdown: what was repeated, then every test."""
    suspects = [verdict for verdict in verdicts if not verdict.alike]
    lines = [f"# {title}", "", *(f"* {remark}" for remark in [*remarks, summary(verdicts)]), ""]
    if suspects:
        lines += [
            "## Not alike in every run",
            "",
            *table(
                "test",
                "without",
                "with",
                "repeated: without",
                "with",
                "alone: without",
                "with",
                "p",
                "difference",
            ),
        ]
    for verdict in sorted(suspects, key=lambda verdict: verdict.p):
        counts = [*outcomes(verdict.first), *outcomes(verdict.among), *outcomes(verdict.alone)]
        lines.append(row(verdict.test, *counts, f"{verdict.p:.3f}", "**real**" if verdict.real else "chance"))
    lines += ["", "## Every test", "", *table("test", "without", "with", "what it said")]
    lines += [row(verdict.test, *outcomes(verdict.first), verdict.first.why) for verdict in verdicts]
    if left_out:
        lines += ["", "## Left out", "", *table("test", "why")]
        lines += [row(test, why) for test, why in left_out.items()]
    return "\n".join(lines) + "\n"


def summary(verdicts: list[Verdict]) -> str:
    """In a line: how many tests ended how in every run, and what became of the others."""
    alike = Counter(end for verdict in verdicts if verdict.alike for end in verdict.first.without)
    others, real = len(verdicts) - alike.total(), sum(verdict.real for verdict in verdicts)
    return f"alike in every run: {counted(alike)}; not alike: {others}; an engine changes: {real}"


def outcomes(tally: Tally) -> tuple[str, str]:
    return counted(tally.without), counted(tally.engine)


def counted(outcomes: Counter[str]) -> str:
    return ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common()) or "none"


def table(*columns: str) -> list[str]:
    return [row(*columns), "|---" * len(columns) + "|"]


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
