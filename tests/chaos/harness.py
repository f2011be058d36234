"""One run: servers, producers, workers under supervision, faults, and in the end the proof.

                ┌──────────────► proxy ──────────────► index (append-only file, always synced or every second,
                │                                             one server or a cluster, which has no proxy)
producers ──────┤                  ▲
                └─► queue post ─► Post ─► queue work ─► workers
                          (both queues on the broker)
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kombu import Connection
from kombu.transport.native_delayed_delivery import MAX_NUMBER_OF_BITS_TO_USE, level_name

from celery_goalstate import EntityRef
from tests.acceptance.ledger import Ledger
from tests.chaos import clock, processes
from tests.chaos.aof import AppendOnlyFile
from tests.chaos.app import CLUSTER, KINDS, POST, QUORUM, SETTINGS, WORK, Things
from tests.chaos.checker import Final, Findings, check
from tests.chaos.faults import Injector, poison_for
from tests.chaos.post import Post
from tests.chaos.proxy import Proxy
from tests.servers import Cluster, RabbitMQ, RedisServer, Valkey, poll

QUIET = 1.0  # seconds without anything scheduled: a stalled process may have something to say
#: What Celery and kombu end a worker with, whatever its tasks are.
OF_CELERY = (
    "Unrecoverable error: WorkerLostError('Could not start worker processes')",  # one was killed too soon
    # The broker went away, and came back neither at once nor before unacknowledged messages were given back.
    "Unrecoverable error: AttributeError(\"'NoneType' object has no attribute 'hostname'\")",
)


@dataclass(frozen=True)
class Options:
    """What `python -m tests.chaos` is told."""

    minutes: float = 1.0
    seed: int = 1
    broker: str = "redis"  #: or "redis-server", "rabbitmq", "quorum"
    pool: str = "prefork"
    index: str = "redis"  #: a server of its own; "cluster": three; "same": the broker's, which loses it
    fsync: str = "always"  #: of the index's file; "everysec": each time it ends, its last moments are lost
    workers: int = 2
    producers: int = 2
    pace: float = 0.12  #: seconds between two calls of a producer
    kinds: str = ""  #: of entities that producers enqueue, separated by commas; empty: all
    trouble: float = 0.06  #: the part of the messages that are not carried faithfully
    faults: str = ""  #: only those whose name holds one of these words, which are separated by commas
    calm: float = 1.0  #: so many times as long between two faults: on a busy machine, processes start slowly
    settle: float = 90.0  #: seconds after the last fault in which everything must end
    latest: float = 0.0  #: seconds after its deadline in which each evaluation must begin; 0: any number


class Stage:
    """What faults are inflicted on."""

    def __init__(self, options: Options, directory: Path) -> None:
        self.options = options
        self.directory = directory
        self.over = threading.Event()  #: no more faults
        self.faults: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.clocks, self.no_clocks = clock.build(directory)
        self.traits = {options.broker, options.pool, f"index {options.index}"}
        self.traits |= {"clocks"} if self.clocks else set()
        if options.index != "same":
            self.traits |= {"own index", "own index with clocks"} if self.clocks else {"own index"}
        if options.index != "cluster":
            self.traits |= {"proxy"}
        self.poison = poison_for(options.pool)
        self.kinds = options.kinds
        if not self.kinds and options.pool != "prefork":  # there, each death is a whole worker's
            self.kinds = ",".join(
                kind for kind, plan in KINDS.items() if plan.weight and "die:1" not in plan.steps
            )

    @contextlib.contextmanager
    def set_up(self) -> Iterator[None]:
        options, directory = self.options, self.directory
        with contextlib.ExitStack() as stack:
            self.broker: Valkey | RedisServer | RabbitMQ
            match options.broker:
                case "redis":
                    self.broker = Valkey(directory / "broker", appendonly=True, appendfsync="always")
                case "redis-server":
                    synced = ("--appendonly", "yes", "--appendfsync", "always")
                    self.broker = RedisServer(directory / "broker", *synced)
                case _:
                    self.broker = RabbitMQ(directory / "broker")
            stack.enter_context(self.broker)
            self.index = self._index(stack)
            self.nodes = self.index.nodes if isinstance(self.index, Cluster) else [self.index]
            if options.fsync == "everysec":
                assert options.index == "redis", "the broker's own server, and a cluster, are always synced"
                self.file = stack.enter_context(AppendOnlyFile(directory / "index"))
            index_url = self.index.url
            if not isinstance(self.index, Cluster):
                self.proxy = stack.enter_context(Proxy(self.index.port))
                index_url = self.proxy.url
            settings = {
                **SETTINGS,
                **(QUORUM if options.broker == "quorum" else {}),
                **(CLUSTER if options.index == "cluster" else {}),
                "broker_url": self.broker.url,
                "goalstate_index_url": self.index.url,
            }
            (directory / "settings.json").write_text(json.dumps(settings))
            self.things = Things(directory)
            stack.callback(self.things.app.close)
            queues = self.things.app.amqp.queues
            self.things.ledger.write("clock", wall=time.time())
            notes = Ledger(directory / "ledger")  # not synced: this process is not killed
            self.post = stack.enter_context(
                Post(self.broker.url, options.seed, queues[POST], queues[WORK], notes)
            )
            place = {"directory": directory, "index_url": index_url, "clocks": self.clocks}
            self.workers = [
                processes.worker(number, pool=options.pool, soft=number % 2 == 0, **place)
                for number in range(1, options.workers + 1)
            ]
            self.producers = [
                processes.producer(number, options.producers, options.seed, options.pace, self.kinds, **place)
                for number in range(options.producers)
            ]
            for process in (*self.workers, *self.producers):
                process.start()
                stack.callback(process.end)
            yield

    def _index(self, stack: contextlib.ExitStack) -> Valkey | RedisServer | Cluster:
        if self.options.index == "same":
            assert not isinstance(self.broker, RabbitMQ), "RabbitMQ cannot hold the index"
            return self.broker
        config = {
            "appendonly": "yes",
            "appendfsync": self.options.fsync,
            "auto_aof_rewrite_percentage": 0,
        }
        index: Valkey | Cluster
        if self.options.index == "cluster":
            # A slot without a node is an error for its own keys only.
            index = Cluster(self.directory / "index", cluster_require_full_coverage="no", **config)
        else:
            index = Valkey(self.directory / "index", **config)
        if self.clocks:
            self.clock = clock.Clock(self.clocks, self.directory / "index.clock")  # one for all nodes
            for node in index.nodes if isinstance(index, Cluster) else [index]:
                node.env.update(self.clock.env)
        return stack.enter_context(index)

    # What faults do

    def wait(self, seconds: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Wait so long, or until it is done (True), or until there are to be no more faults."""
        until = time.monotonic() + seconds
        while not done():
            left = until - time.monotonic()
            if left <= 0 or self.over.wait(min(left, 0.05)):
                return done()
        return True

    def note(self, text: str) -> None:
        """Something that a person should know of."""
        self.notes[text] += 1

    @contextlib.contextmanager
    def noted(self, fault: str) -> Iterator[None]:
        """The ledger has when it began and ended."""
        call = self.things.ledger.call()
        self.things.ledger.write("fault", name=fault, call=call)
        try:
            yield
        finally:
            self.things.ledger.write("over", call=call)

    def has(self, kind: str) -> bool:
        """Whether producers enqueue entities of this kind."""
        return not self.kinds or kind in self.kinds.split(",")

    def want_more(self, ref: EntityRef) -> None:
        """As producers do."""
        self.things.world.want_more(ref)
        self.things.insist(lambda: self.things.enqueue([ref]))

    def restart_broker(self, seconds: float) -> None:
        self.broker.kill()
        self.wait(seconds)
        self.broker.start()

    def restart_node(self, node: Valkey | RedisServer, seconds: float, lost: float) -> None:
        """Kill it. What it has not synced is lost, as if its machine had died: so many seconds."""
        node.kill()
        if self.options.fsync == "everysec":
            since = self.file.lose(lost)
            self.things.ledger.write("index-loss", at=since)
        self.wait(seconds)
        node.start()
        if self.options.fsync == "everysec":
            self.things.ledger.write("index-lost")
            self.things.resync()

    def step_clock_of_index(self, seconds: int) -> None:
        before, after = self.clock.offset, self.clock.offset + seconds
        self.things.ledger.write("index-step", before=before, after=after)
        self.clock.step(seconds)
        self.things.ledger.write("index-stepped")

    def flush_broker(self) -> None:
        """All messages are gone, and the index with them, if it is there."""
        if not isinstance(self.broker, RabbitMQ):
            ledger = self.things.ledger
            if self.index is self.broker:
                ledger.write("index-loss")
            with self.broker.client() as client:
                client.flushdb()
            if self.index is self.broker:
                ledger.write("index-lost")
                self.things.resync()
            return
        with Connection(self.broker.url) as connection:
            delayed = [level_name(level) for level in range(MAX_NUMBER_OF_BITS_TO_USE)]
            for queue in (POST, WORK, *(delayed if self.options.broker == "quorum" else ())):
                connection.default_channel.queue_purge(queue)


def run(options: Options, directory: Path, *, say: Callable[[str], None] = lambda _: None) -> Findings:
    """Run it all; what was found, in figures and in broken guarantees."""
    stage = Stage(options, directory)
    with stage.set_up():
        if stage.no_clocks:
            say(f"without steps of clocks: {stage.no_clocks}")
        say("starting")
        poll("workers are ready", lambda: all(w.is_ready() for w in stage.workers), timeout=60)
        say(f"faults for {options.minutes:g} minutes")
        stage.post.trouble = options.trouble
        timer = threading.Timer(options.minutes * 60, stage.over.set)
        timer.start()
        try:
            Injector(stage).run()
        finally:
            timer.cancel()
            stage.over.set()
        say("no more faults: everything is to settle")
        stage.post.trouble = 0.0
        if "proxy" in stage.traits:
            stage.proxy.lose_replies(0)
        stage.things.world.settles.set(True)
        began = time.monotonic()
        for producer in stage.producers:
            producer.stop(timeout=30)
        unsettled = settle(stage.things, stage.options.settle)
        seconds = time.monotonic() - began
        say(f"settled after {seconds:.1f} s" if not unsettled else f"not settled after {seconds:.1f} s")
        final = final_state(stage.things)
        say("checking")
    findings = check(stage.things.ledger.lines(), final, latest=options.latest or math.inf)
    findings.faults = dict(stage.faults) | {
        f"messages {fault}": count for fault, count in stage.post.faults.items() if fault != "broker away"
    }
    findings.figures["worker ends by errors of Celery"] = count_ends(stage)
    findings.notes = dict(stage.notes)
    findings.figures["messages"] = stage.post.carried
    findings.figures["worker starts"] = sum(worker.starts for worker in stage.workers)
    findings.figures["producer starts"] = sum(producer.starts for producer in stage.producers)
    findings.figures["seconds to settle"] = round(seconds, 1)
    return findings


def count_ends(stage: Stage) -> int:
    """Of workers by themselves, for reasons that are known; of all others it takes note."""
    known = 0
    for process in (*stage.workers, *stage.producers):
        for end in process.own_ends:
            if end.code == -signal.SIGKILL:  # by an entity, or between index and broker
                continue
            if any(error in end.output for error in OF_CELERY):
                known += 1
            else:
                stage.note(f"{process.name} ended by itself, with {end.code}")
    return known


def settle(things: Things, seconds: float) -> int:
    """Wait, so long at most, until nothing is scheduled or running any more; how many entities still are."""

    def busy() -> int:
        counts = things.engine.counts()
        return sum(
            each["scheduled"] + each["running"] for kind, each in counts.items() if not KINDS[kind].far
        )

    until = time.monotonic() + seconds
    quiet_since = math.inf
    while time.monotonic() - quiet_since < QUIET:
        left = busy()
        quiet_since = math.inf if left else min(quiet_since, time.monotonic())
        if left and time.monotonic() > until:
            return left
        time.sleep(0.1)  # asked again and again, and what is busy in the end is told
    return 0


def final_state(things: Things) -> dict[str, Final]:
    world = things.world
    refs = [EntityRef(kind, str(n)) for kind, plan in KINDS.items() for n in range(plan.entities)]
    described = things.engine.describe_many(refs)
    ahead = time.time() - time.monotonic()
    return {
        str(ref): Final(
            None if known is None else str(known.status),
            (known and known.error) or "",
            world.wanted(ref),
            world.reached(ref),
            world.is_gone(ref),
            known.deadline.timestamp() - ahead if known and known.deadline else None,
            known is not None and known.sent,
        )
        for ref, known in zip(refs, described, strict=True)
    }
