"""The faults: what each does to the processes and servers of a run, and when they come."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from celery_goalstate import EntityRef
from tests.chaos.app import HELD_UP, KINDS, LEASE, POISON, STALLING
from tests.servers import frozen

if TYPE_CHECKING:
    from tests.chaos.harness import Stage
    from tests.chaos.processes import Victim

DAY = 86_400.0  # seconds
MARKERS = 8  # entities that nobody else enqueues: enough for one in each shard

Inject = Callable[["Stage", random.Random], bool]


@dataclass(frozen=True)
class Fault:
    """`inject` returns once the fault is over; False if there was nothing to hurt."""

    name: str
    inject: Inject
    times: int = 1  #: how often it comes in one round of the schedule
    on: str = ""  #: only where the stage has this trait: a broker, a pool, a sort of index, ...
    alone: str = ""  #: faults of the same word do not come at the same time


FAULTS: list[Fault] = []


def _fault(name: str, *, times: int = 1, on: str = "", alone: str = "") -> Callable[[Inject], Inject]:
    def register(inject: Inject) -> Inject:
        FAULTS.append(Fault(name, inject, times, on, alone))
        return inject

    return register


# Processes ---------------------------------------------------------------------------------------


@_fault("SIGKILL of a pool's child", times=3, on="prefork")
def _kill_child(stage: Stage, draw: random.Random) -> bool:
    children = draw.choice(stage.workers).children()
    if children:
        _signal([draw.choice(children)], signal.SIGKILL)
    return bool(children)


@_fault("SIGKILL of a worker")
def _kill_worker(stage: Stage, draw: random.Random) -> bool:
    worker = draw.choice(stage.workers)
    if not worker.is_ready():
        return False
    worker.signal(signal.SIGKILL)  # its children are left to the supervisor
    return True


@_fault("warm shutdown of a worker", alone="shutdown")
def _warm(stage: Stage, draw: random.Random) -> bool:
    return _shut_down(stage, draw.choice(stage.workers), signal.SIGTERM)


@_fault("cold shutdown of a worker", alone="shutdown")
def _cold(stage: Stage, draw: random.Random) -> bool:
    return _shut_down(stage, draw.choice(stage.workers[0::2]), signal.SIGQUIT)


@_fault("soft shutdown of a worker", alone="shutdown")
def _soft(stage: Stage, draw: random.Random) -> bool:
    return _shut_down(stage, draw.choice(stage.workers[1::2]), signal.SIGQUIT)


def _shut_down(stage: Stage, worker: Victim, number: int) -> bool:
    if not worker.is_ready():
        return False
    starts = worker.starts
    stage.things.ledger.write("stop", pids=[worker.pid, *worker.children()])
    worker.signal(number)
    if not stage.wait(20, lambda: worker.starts > starts) and not stage.over.is_set():
        name = f"a worker that does not end in 20 s after {signal.Signals(number).name}"
        stage.faults[name] += 1
        with stage.noted(name):
            worker.signal(signal.SIGKILL)
    stage.wait(20, lambda: worker.starts > starts and worker.is_ready())  # a rolling restart waits, too
    return True


@_fault("SIGKILL of a producer")
def _kill_producer(stage: Stage, draw: random.Random) -> bool:
    draw.choice(stage.producers).signal(signal.SIGKILL)
    return True


@_fault("SIGKILL of a producer between index and broker", times=2)
def _kill_between(stage: Stage, draw: random.Random) -> bool:
    producer = draw.choice(stage.producers)
    if not producer.is_ready():
        return False
    producer.signal(signal.SIGUSR1)
    return True


@_fault("a pool's child stands still for longer than its lease", times=2, on="prefork", alone="child")
def _freeze_child(stage: Stage, draw: random.Random) -> bool:
    children = draw.choice(stage.workers).children()
    if not children:
        return False
    with _frozen_process(stage, [draw.choice(children)]):
        stage.wait(draw.uniform(1.3, 2.2) * LEASE)
    return True


@_fault("a worker stands still for longer than its leases", alone="worker")
def _freeze_worker(stage: Stage, draw: random.Random) -> bool:
    worker = draw.choice(stage.workers)
    if not worker.is_ready():
        return False
    with _frozen_process(stage, [worker.pid, *worker.children()]):
        stage.wait(draw.uniform(1.3, 2.2) * LEASE)
    return True


@_fault("the clock of a worker steps", times=2, on="clocks")
def _step_clock_of_worker(stage: Stage, draw: random.Random) -> bool:
    return _step_clock(draw.choice(stage.workers), draw)


@_fault("the clock of a producer steps", times=2, on="clocks")
def _step_clock_of_producer(stage: Stage, draw: random.Random) -> bool:
    return _step_clock(draw.choice(stage.producers), draw)


def _step_clock(process: Victim, draw: random.Random) -> bool:
    """By seconds or minutes, ahead or back, never much further than ten minutes from the right time."""
    assert process.clock
    by = round(draw.choice([draw.uniform(1, 10), draw.uniform(10, 300)]))
    ahead = draw.random() < 0.5 if abs(process.clock.offset) < 300 else process.clock.offset < 0
    process.clock.step(by if ahead else -by)
    return True


@_fault("an action stalls for longer than its lease", times=3, alone="stall")
def _stall(stage: Stage, draw: random.Random) -> bool:
    """And goes on when another evaluation has done everything, and more."""
    kinds = [kind for kind in STALLING if stage.has(kind)]
    if not kinds:
        return False
    kind = draw.choice(kinds)
    ref = EntityRef(kind, str(draw.randrange(KINDS[kind].entities)))
    world = stage.things.world
    world.ask_to_stall(ref)
    stage.want_more(ref)
    stage.wait(10, lambda: world.stalled(ref) > 0)
    if world.asks_no_more(ref) or not stage.wait(1, lambda: world.stalled(ref) > 0):
        return False
    pid = world.stalled(ref)
    try:
        stage.wait(draw.uniform(1.3, 2.2) * LEASE)
        stage.want_more(ref)
        stage.wait(3 * LEASE, lambda: world.reached(ref) == world.wanted(ref))
    finally:
        stage.things.ledger.write("thaw", pids=[pid])
        _signal([pid], signal.SIGCONT)
    return True


@contextlib.contextmanager
def _frozen_process(stage: Stage, pids: list[int]) -> Iterator[None]:
    _signal(pids, signal.SIGSTOP)
    stage.things.ledger.write("freeze", pids=pids)
    try:
        yield
    finally:
        stage.things.ledger.write("thaw", pids=pids)
        _signal(pids, signal.SIGCONT)


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# The broker --------------------------------------------------------------------------------------


@_fault("restart of the broker", alone="broker")
def _restart_broker(stage: Stage, draw: random.Random) -> bool:
    stage.restart_broker(draw.uniform(0, 1.0))
    return True


@_fault("the broker loses all messages", times=2, alone="broker")
def _flush_broker(stage: Stage, draw: random.Random) -> bool:
    stage.flush_broker()
    return True


@_fault("the broker stands still", alone="broker")
def _freeze_broker(stage: Stage, draw: random.Random) -> bool:
    """For longer than anybody may wait for it, at times."""
    with frozen(stage.broker.pid):
        stage.wait(draw.uniform(0.3, 2.0) * HELD_UP)
    return True


@_fault("a kind cannot be published", alone="publishing")
def _refuse(stage: Stage, draw: random.Random) -> bool:
    stage.things.world.refuses.set(True)
    try:
        stage.wait(draw.uniform(5, 20))
    finally:
        stage.things.world.refuses.set(False)
    return True


# The index: one server, or the nodes of a cluster ------------------------------------------------


@_fault("restart of the index", on="index redis", alone="index")
@_fault("restart of a node of the index", on="index cluster", alone="index")
def _restart_node(stage: Stage, draw: random.Random) -> bool:
    stage.restart_node(draw.choice(stage.nodes), draw.uniform(0, 1.0), lost=draw.uniform(0, 1.0))
    return True


@_fault("the index stands still", on="proxy", alone="index")
@_fault("a node of the index stands still", times=2, on="index cluster", alone="index")
def _freeze_node(stage: Stage, draw: random.Random) -> bool:
    with frozen(draw.choice(stage.nodes).pid):
        stage.wait(draw.uniform(0.3, 2.5) * LEASE)
    return True


@_fault("the index is full", on="own index", alone="index")
def _fill_index(stage: Stage, draw: random.Random) -> bool:
    """As if somebody else's data had filled it: whatever may need memory is refused."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(node.client()) for node in stage.nodes]
        for client in clients:
            client.config_set("maxmemory", 1)
            stack.callback(client.config_set, "maxmemory", 0)
        stage.wait(draw.uniform(0.3, 2.5) * LEASE)
    return True


@_fault("the clock of the index steps", times=2, on="own index with clocks", alone="index")
def _step_clock_of_index(stage: Stage, draw: random.Random) -> bool:
    """By seconds or up to an hour, ahead or back, never much further than an hour from the right time."""
    by = round(draw.choice([draw.uniform(1, 10), draw.uniform(10, 3600)]))
    ahead = draw.random() < 0.5 if abs(stage.clock.offset) < 3600 else stage.clock.offset < 0
    stage.step_clock_of_index(by if ahead else -by)
    return True


@_fault("the index cannot be reached", on="proxy", alone="proxy")
def _close_proxy(stage: Stage, draw: random.Random) -> bool:
    stage.proxy.close_for(draw.uniform(0.3, 2.5) * LEASE, stage.over)
    return True


@_fault("connections to the index are cut", times=2, on="proxy")
def _cut(stage: Stage, draw: random.Random) -> bool:
    stage.proxy.cut()
    return True


@_fault("replies of the index are lost", times=2, on="proxy")
def _lose_replies(stage: Stage, draw: random.Random) -> bool:
    stage.proxy.lose_replies(draw.randint(1, 6))
    return True


@_fault("the index is slow", on="proxy", alone="proxy")
def _delay(stage: Stage, draw: random.Random) -> bool:
    stage.proxy.delay = draw.uniform(0.02, 0.2)
    stage.wait(draw.uniform(1, 3))
    stage.proxy.delay = 0.0
    return True


# Entities ----------------------------------------------------------------------------------------


@_fault("an entity that kills its worker", times=2)
def _poison(stage: Stage, draw: random.Random) -> bool:
    kind = draw.choice(stage.poison)
    stage.want_more(EntityRef(kind, str(draw.randrange(KINDS[kind].entities))))
    return True


@_fault("a whole kind is deleted", times=2, alone="index")
def _delete_kind(stage: Stage, draw: random.Random) -> bool:
    """While some of its entities are enqueued before, meanwhile and afterwards."""
    kinds = [kind for kind, plan in KINDS.items() if plan.weight and not plan.far and stage.has(kind)]
    kind = draw.choice(kinds)
    refs = [EntityRef(kind, str(n)) for n in range(min(100, KINDS[kind].entities))]
    stage.things.insist(lambda: stage.things.enqueue(refs))
    stage.things.insist(lambda: _delete_meanwhile(stage, kind, lambda: stage.want_more(draw.choice(refs))))
    stage.want_more(draw.choice(refs))
    return True


def _delete_meanwhile(stage: Stage, kind: str, enqueue: Callable[[], None]) -> None:
    """Raises `IndexUnavailable`. Once all markers are gone, in whatever shard, the delete has begun."""
    engine, ledger = stage.things.engine, stage.things.ledger
    markers = [EntityRef(kind, f"marker-{n}") for n in range(MARKERS)]
    engine.enqueue_many(markers, DAY)
    call, begun = ledger.call(), False
    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(stage.things.delete_kind, kind, call)
        while not deleting.done():
            if not begun and not any(engine.describe_many(markers)):
                ledger.write("deleting-kind", call=call)
                begun = True
            enqueue()
        deleting.result()


def poison_for(pool: str) -> list[str]:
    """The others of these kinds need a pool of processes that its parent watches."""
    return POISON if pool == "prefork" else ["poison-kill"]


# The schedule ------------------------------------------------------------------------------------


def schedule(
    draw: random.Random, traits: set[str], only: str = ""
) -> Iterator[tuple[float, Fault, random.Random]]:
    """For ever: how long to wait, the fault that then comes, and what it draws its choices from.

    Every fault that these traits allow, and whose name holds one of the words in `only`, comes in each round.
    """
    words = only.split(",")
    faults = [
        fault
        for fault in FAULTS
        if (not fault.on or fault.on in traits) and any(word in fault.name for word in words)
    ]
    if not faults:
        raise SystemExit(f"no fault of {', '.join(sorted(traits))} is called {' or '.join(words)}")
    while True:
        deck = [fault for fault in faults for _ in range(fault.times)]
        draw.shuffle(deck)
        for fault in deck:
            yield draw.uniform(0.2, 2.0), fault, random.Random(draw.random())


class Injector:
    """Injects the faults of a schedule until `over`, several at a time."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        options = stage.options
        self._schedule = schedule(random.Random(options.seed), stage.traits, options.faults)
        self._alone: dict[str, threading.Lock] = {fault.alone: threading.Lock() for fault in FAULTS}
        self._threads: list[threading.Thread] = []

    def run(self) -> None:
        """Until the stage's time is over, and all faults too."""
        for gap, fault, draw in self._schedule:
            if self._stage.over.wait(gap * self._stage.options.calm):
                break
            thread = threading.Thread(target=self._inject, args=(fault, draw), name=fault.name, daemon=True)
            thread.start()
            self._threads = [*(thread for thread in self._threads if thread.is_alive()), thread]
        for thread in self._threads:
            thread.join(timeout=30)

    def _inject(self, fault: Fault, draw: random.Random) -> None:
        lock = self._alone[fault.alone] if fault.alone else contextlib.nullcontext()
        try:
            with lock:
                if not self._stage.over.is_set():
                    with self._stage.noted(fault.name):
                        happened = fault.inject(self._stage, draw)
                    if happened:
                        self._stage.faults[fault.name] += 1
        except Exception as error:  # noqa: BLE001 - shown in the end: the other faults go on
            self._stage.note(f"{fault.name}: {type(error).__name__}: {error}")
