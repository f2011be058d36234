"""Which faults come, in what order, by what a run is told."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from tests.chaos.faults import FAULTS, schedule

TRAITS = {"redis", "prefork", "index redis", "own index", "own index with clocks", "proxy", "clocks"}
CLUSTER = {"rabbitmq", "prefork", "index cluster", "own index", "own index with clocks", "clocks"}
SAME = {"redis", "solo", "index same", "proxy"}


def names(traits: set[str], only: str = "", *, seed: int = 1) -> list[str]:
    return [fault.name for _, fault, _ in islice(schedule(random.Random(seed), traits, only), 200)]


def test_a_seed_always_gives_the_same() -> None:
    assert names(TRAITS, seed=7) == names(TRAITS, seed=7)
    assert names(TRAITS, seed=7) != names(TRAITS, seed=8)


def test_every_fault_comes_somewhere() -> None:
    assert {name for traits in (TRAITS, CLUSTER, SAME) for name in names(traits)} == {
        fault.name for fault in FAULTS
    }


def test_only_what_there_is_can_be_hurt() -> None:
    assert "the clock of the index steps" in names(TRAITS)
    assert "a node of the index stands still" not in names(TRAITS)
    assert "a node of the index stands still" in names(CLUSTER)
    assert not {"replies of the index are lost", "the index stands still"} & set(names(CLUSTER))
    assert not [name for name in names(SAME) if "clock" in name or "full" in name or "child" in name]


def test_words_choose_faults() -> None:
    assert set(names(TRAITS, "is full,whole kind")) == {"the index is full", "a whole kind is deleted"}
    with pytest.raises(SystemExit, match=r"no fault of .* is called a word or another"):
        names(TRAITS, "a word,another")
