"""Let something go wrong at every point of a convergence, one run each, and see how the world ends up.

A run is a function of its schedule: which fault strikes at which point, when that is passed for the n-th
time. The run without a fault is made twice: its points are what there is to explore, and if the two differ,
nothing can be compared. Then come all schedules of one fault, all of two, and so on: the first that fails has
the fewest. (The idea, for controllers on a cluster, is Sieve's, OSDI '22.)
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial, update_wrapper
from typing import Any, NamedTuple

from celery_goalstate.engine import Engine
from celery_goalstate.entity import Entity
from celery_goalstate.settings import Settings
from celery_goalstate.testing.faults import Fault, fail, kill, lose_lease
from celery_goalstate.testing.simulation import (
    BETWEEN_LOOKS,
    DAY,
    LINES_TOLD,
    Point,
    Simulation,
    Watched,
    located,
    settings_of,
)
from celery_goalstate.testing.story import shortened
from celery_goalstate.testing.worlds import (
    NOT_REPEATABLE,
    NotRepeatable,
    Snapshot,
    World,
    differences,
    engine_of,
    excerpt,
    fresh,
    taken,
)

KILL, LOSE_LEASE, TIMEOUT = "kill", "lose_lease", "timeout"
FAULTS = (KILL, LOSE_LEASE, TIMEOUT)
#: Other failing schedules that a report names.
OTHERS_NAMED = 4
#: Allowed ends that a report shows.
ENDS_SHOWN = 4


class _Failure(AssertionError):
    """`schedule` names what went wrong where, to repeat it."""

    def __init__(self, text: str, schedule: str) -> None:
        super().__init__(text)
        self.schedule = schedule


class NotCrashSafe(_Failure):
    """The world ends up otherwise, or never, when something happens to a worker. `schedule` repeats it."""


class NotConcurrencySafe(_Failure):
    """The world ends up as it could not have, had the other come between two evaluations."""


class Strike(NamedTuple):
    """What strikes where. `str()` is how a schedule names it."""

    fault: str
    point: str
    nth: int

    def __str__(self) -> str:
        return f"{self.fault} {self.point}" + (f" #{self.nth}" if self.nth > 1 else "")


Schedule = tuple[Strike, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check has tried, and found nothing."""

    schedules: int  #: how many runs there were
    points: int  #: of the run without a fault
    seconds: float
    exhausted: bool  #: whether those were all; False: the limit was reached

    def __str__(self) -> str:
        text = f"{self.schedules} schedules over {self.points} points in {self.seconds:.2f} s"
        return text if self.exhausted else f"{text}, and the limit was reached"


class Ran(NamedTuple):
    """How one run has ended."""

    snapshot: Any
    points: list[Point]
    lines: list[str]  #: of its story
    problem: str = ""  #: why it did not come to rest at its goal
    unreached: str = ""  #: the first strike that never came
    called: frozenset[str] = frozenset()  #: the watched calls that were made

    def after(self, schedule: Schedule) -> Iterator[Point]:
        """The points after the last strike."""
        struck = {(strike.point, strike.nth) for strike in schedule}
        last = max((n for n, point in enumerate(self.points) if point[:2] in struck), default=-1)
        yield from self.points[last + 1 :]


@dataclass(frozen=True, slots=True)
class Explorer:
    """Makes the runs of one check."""

    world: World
    snapshot: Snapshot | None
    effects: tuple[Watched, ...]
    within: timedelta
    looks: int
    engine: Engine | None
    start: datetime  #: one for all runs: fencing tokens grow with the time
    meanwhile: Callable[[Any], Any] | None = None
    any_end: bool = False
    settings: dict[Engine, Settings] = field(default_factory=dict)  #: read once for all runs

    def run(self, schedule: Schedule = (), *, afterwards: bool = False) -> Ran:
        """One run in a fresh world. `afterwards`: what happens meanwhile comes after the end, and goes on."""
        with fresh(self.world) as entity:
            engine = self.engine or engine_of(entity)
            settings = self.settings.get(engine) or self.settings.setdefault(engine, settings_of(engine))
            simulation = Simulation(engine, start=self.start, settings=settings)
            with simulation.in_place():
                simulation.watch(*self.effects)
                for strike in schedule:
                    simulation.at(strike.point, self._fault(strike.fault, entity), nth=strike.nth)
                engine.enqueue(entity)
                problem = simulation.come_to_rest(self.within, self.looks)
                if afterwards and self.meanwhile is not None and not problem:
                    self.meanwhile(entity)
                    problem = simulation.come_to_rest(self.within, self.looks)
                if not problem and not self.any_end:
                    problem = simulation.problem_of(entity)
                missed = simulation.missed()
                return Ran(
                    snapshot=self._taken(entity),
                    points=simulation.points,
                    lines=simulation.lines(),
                    problem=problem,
                    unreached=missed[0] if missed else "",
                    called=frozenset(point.name for point in simulation.points if point.of_call),
                )

    def undisturbed(self) -> Ran:
        """The run without a fault. Raises `NotRepeatable`, or `AssertionError` if it does not converge."""
        __tracebackhide__ = True
        one, other = self.run(), self.run()
        if one.problem:
            raise AssertionError(_report(f"without any fault it does not converge: {one.problem}", one))
        if one.snapshot != other.snapshot or one.points != other.points:
            same = one.snapshot == other.snapshot
            found = _other_points(one, other) if same else differences(one.snapshot, other.snapshot)
            raise NotRepeatable("\n".join([NOT_REPEATABLE, *found]))
        return one

    def _fault(self, name: str, entity: Entity) -> Fault:
        if self.meanwhile is None:
            known: dict[str, Fault] = {KILL: kill, LOSE_LEASE: lose_lease}
            return known.get(name) or fail(TimeoutError("simulated"))
        meanwhile = partial(self.meanwhile, entity)
        update_wrapper(meanwhile, self.meanwhile)  # the story has its name
        return meanwhile

    def _taken(self, entity: Entity) -> Any:
        if self.snapshot is not None:
            return taken(self.snapshot, entity)
        fresh_entity = type(entity).from_id(entity.get_id())
        return fresh_entity.get_state(), fresh_entity.get_goal_state()


def check_crash_safe(
    world: World,
    *,
    snapshot: Snapshot | None = None,
    effects: Iterable[Watched] = (),
    faults: Iterable[str] = (KILL,),
    depth: int = 1,
    limit: int = 2000,
    within: timedelta = DAY,
    looks: int = 200,
    engine: Engine | None = None,
    schedule: str | None = None,
) -> Checked:
    """Kill the worker at every point, one run each: the world must end up as in a run without a fault.

    `world()` makes a fresh world and returns (or, as a context manager, yields) the entity; in a Django test
    each run is undone. `snapshot(entity)` is what must be the same: take in what the outside has seen (a
    ledger), not just the state; by default it is the two states. `effects` are watched (`Simulation.watch`):
    what happens before and after each call of these functions is explored, too.

    `faults`: "kill"; "lose_lease": a stalled worker goes on after another one has done it; "timeout": an
    effect raises `TimeoutError`, before it happened and after. `depth`: so many faults in one run. `limit`:
    so many runs. `within` and `looks`: how long a run takes at most to come to rest, and how many
    evaluations. `schedule`, from a report, repeats one run.

    Raises `NotCrashSafe` with a report, `NotRepeatable` before any fault strikes if two runs without one
    differ, `AssertionError` if those do not converge, and `ValueError` for bad input.
    """
    __tracebackhide__ = True
    began = time.perf_counter()
    explorer = _explorer(world, snapshot, effects, within, looks, engine)
    names = _checked_faults(tuple(faults), explorer.effects)
    if depth < 1 or limit < 1:
        raise ValueError(f"depth is {depth!r} and limit is {limit!r}; give 1 or more")
    repeated = None if schedule is None else _parsed(schedule)
    good = explorer.undisturbed()
    called, exhausted, count = set(good.called), True, 0
    failing: list[tuple[Schedule, Ran]] = []
    frontier: list[tuple[Schedule, Ran]] = [((), good)]
    for _ in range(depth):
        following: list[tuple[Schedule, Ran]] = []
        plans = _next_schedules(frontier, names) if repeated is None else iter([repeated])
        for plan in plans:
            if count >= limit:
                exhausted = False
                break
            ran = explorer.run(plan)
            count += 1
            called |= ran.called
            if ran.unreached:
                raise NotRepeatable(_unreached(plan, ran, good))
            failed = bool(ran.problem) or ran.snapshot != good.snapshot
            (failing if failed else following).append((plan, ran))
        if failing or repeated is not None:
            break
        frontier = following
    if failing:
        raise _not_crash_safe(failing, count, good)
    _check_effects(explorer.effects, called)
    return Checked(count, len(good.points), time.perf_counter() - began, exhausted)


def check_concurrent(
    world: World,
    meanwhile: Callable[[Any], Any],
    *,
    snapshot: Snapshot | None = None,
    effects: Iterable[Watched] = (),
    any_end: bool = False,
    within: timedelta = DAY,
    looks: int = 200,
    engine: Engine | None = None,
) -> Checked:
    """Let `meanwhile(entity)` happen at every point inside an evaluation, one run each.

    It is what somebody else does: a new goal, say, and its enqueue. The world must end up as it could have,
    had that come before, between or after the evaluations. `any_end`: the entity need not be at its goal.
    Otherwise as `check_crash_safe`. Raises `NotConcurrencySafe` with a report.
    """
    __tracebackhide__ = True
    began = time.perf_counter()
    explorer = _explorer(world, snapshot, effects, within, looks, engine, meanwhile, any_end)
    name = getattr(meanwhile, "__name__", "meanwhile")
    good = explorer.undisturbed()
    allowed: list[tuple[str, Any]] = []
    for point in good.points:
        if point.name == BETWEEN_LOOKS:
            ran = explorer.run((Strike(name, *point[:2]),))
            allowed.append((f"before look {point.nth}", _rested(ran, name).snapshot))
    ran = explorer.run(afterwards=True)
    allowed.append(("after the last look", _rested(ran, name).snapshot))
    count = len(allowed)
    for point in good.points:
        if point.name != BETWEEN_LOOKS and not point.in_transaction:
            strike = Strike(name, *point[:2])
            ran = explorer.run((strike,))
            count += 1
            if ran.unreached:
                raise NotRepeatable(_unreached((strike,), ran, good))
            if ran.problem or all(ran.snapshot != end for _, end in allowed):
                raise _not_concurrency_safe(strike, ran, allowed)
    return Checked(count, len(good.points), time.perf_counter() - began, exhausted=True)


def _explorer(
    world: World,
    snapshot: Snapshot | None,
    effects: Iterable[Watched],
    within: timedelta,
    looks: int,
    engine: Engine | None,
    meanwhile: Callable[[Any], Any] | None = None,
    any_end: bool = False,
) -> Explorer:
    if isinstance(effects, str):
        raise TypeError(f"effects is {effects!r}; give a list of functions: [{effects!r}]")
    start = datetime.now(UTC)
    return Explorer(world, snapshot, tuple(effects), within, looks, engine, start, meanwhile, any_end)


def _checked_faults(names: Sequence[str], effects: Sequence[Watched]) -> Sequence[str]:
    if not names or not set(FAULTS).issuperset(names):
        raise ValueError(f"faults is {names!r}; give some of {', '.join(FAULTS)}")
    if TIMEOUT in names and not effects:
        raise ValueError('faults has "timeout", which is of effects: name the functions that may time out')
    return names


def _next_schedules(frontier: Iterable[tuple[Schedule, Ran]], faults: Sequence[str]) -> Iterator[Schedule]:
    """Each schedule, with one more strike after its last."""
    for before, ran in frontier:
        for point in ran.after(before):
            for fault in faults:
                if _can_strike(fault, point):
                    yield (*before, Strike(fault, point.name, point.nth))


def _can_strike(fault: str, point: Point) -> bool:
    if point.name == BETWEEN_LOOKS:
        return False
    # Others would see what a transaction has not committed, on the one connection of a test.
    return point.of_call if fault == TIMEOUT else fault == KILL or not point.in_transaction


_STRIKE = re.compile(r"(?P<fault>\w+) (?P<point>(?:before|after) .+?)(?: #(?P<nth>\d+))?")


def _parsed(schedule: str) -> Schedule:
    strikes = []
    for text in schedule.split("; "):
        found = _STRIKE.fullmatch(text)
        if found is None or found["fault"] not in FAULTS:
            raise ValueError(
                f"schedule has {text!r}; give it as a report has it: 'kill after ship #2; kill before pack'"
            )
        strikes.append(Strike(found["fault"], found["point"], int(found["nth"] or 1)))
    return tuple(strikes)


# Reports -----------------------------------------------------------------------------------------


def _text(schedule: Schedule) -> str:
    return "; ".join(map(str, schedule))


def _report(head: str, ran: Ran, *more: str) -> str:
    return "\n".join([head, "", *shortened(ran.lines, LINES_TOLD), *more])


def _not_crash_safe(failing: Sequence[tuple[Schedule, Ran]], count: int, good: Ran) -> NotCrashSafe:
    (schedule, ran), *others = failing
    if ran.problem:
        ends = [f"Then {ran.problem}"]
    else:
        ends = ["Ends differently from an undisturbed run:", *differences(good.snapshot, ran.snapshot)]
    if others:
        ends += ["", "Likewise: " + ", ".join(repr(_text(each)) for each, _ in others[:OTHERS_NAMED])]
        if len(others) > OTHERS_NAMED:
            ends[-1] += f" and {len(others) - OTHERS_NAMED} more"
    head = f"not crash-safe: {len(failing)} of {count} schedules end in another world. The shortest:"
    repeat = f"Repeat it: check_crash_safe(..., schedule={_text(schedule)!r})"
    return NotCrashSafe(_report(head, ran, "", *ends, "", repeat), _text(schedule))


def _not_concurrency_safe(strike: Strike, ran: Ran, allowed: Sequence[tuple[str, Any]]) -> NotConcurrencySafe:
    if ran.problem:
        ends = [f"Then {ran.problem}"]
    else:
        ends = ["No order of whole looks ends so:", f"    {excerpt(ran.snapshot)}", "They end so:"]
        shown = dict.fromkeys(f"    {excerpt(end)}   if it comes {when}" for when, end in allowed)
        ends += list(shown)[:ENDS_SHOWN]
    head = f"not safe when {strike.fault} comes in the midst of an evaluation, {strike.point}:"
    return NotConcurrencySafe(_report(head, ran, "", *ends), str(strike))


def _rested(ran: Ran, name: str) -> Ran:
    __tracebackhide__ = True
    if ran.problem:
        raise AssertionError(
            _report(f"{name} between two looks, and it does not converge: {ran.problem}", ran)
        )
    return ran


def _unreached(schedule: Schedule, ran: Ran, good: Ran) -> str:
    points = ", ".join(str(Strike("", *point[:2])).strip() for point in good.points)
    return _report(
        f'the run never came to "{ran.unreached}" of the schedule {_text(schedule)!r}. Points of the run'
        f" without a fault: {points}",
        ran,
    )


def _other_points(one: Ran, other: Ran) -> list[str]:
    return differences([point.name for point in one.points], [point.name for point in other.points])


def _check_effects(effects: Iterable[Watched], called: Container[str]) -> None:
    __tracebackhide__ = True
    for effect in effects:
        *_, label = located(effect)
        if f"before {label}" not in called:
            raise AssertionError(
                f"{label} is among the effects, and no action ever called it: name it where it is looked up,"
                " as for mock.patch"
            )
