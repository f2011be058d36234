"""A producer: `python -m tests.chaos.producer SEED NUMBER OF PACE KINDS`, until TERM.

It owns every OF-th entity, so that the order of what befalls each of them is certain. It may be killed at any
time, and begins by saying again what it was about to say then. After USR1 it kills itself between index and
broker, as soon as there is something to publish.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from celery_goalstate import EntityRef
from tests.chaos.app import DIRECTORY, KINDS, Things, from_environment

DAY = 86_400.0


class Producer:
    def __init__(self, things: Things, seed: int, number: int, of: int, pace: float, kinds: str) -> None:
        self.things = things
        self.random = random.Random(f"{seed}-{number}-{os.getpid()}")
        self.pace = pace
        self.refs = {
            kind: [EntityRef(kind, str(n)) for n in range(plan.entities) if n % of == number]
            for kind, plan in KINDS.items()
            if (kind in kinds.split(",") if kinds else plan.weight)
        }
        self.intent = Path(os.environ[DIRECTORY]) / f"intent-{number}"
        self.latest: EntityRef | None = None  # the last one that was enqueued
        self.goes_on = True
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGUSR1, self._die_at_the_next_publish)

    def _stop(self, *args: object) -> None:
        self.goes_on = False

    def _die_at_the_next_publish(self, *args: object) -> None:
        def die() -> None:
            for name, call in self.things.open_calls:
                self.things.ledger.write("enqueued", name, call=call)  # the index has it
            os.kill(os.getpid(), signal.SIGKILL)

        self.things.index.after_enqueue = die

    def run(self) -> None:
        if self.intent.exists():
            self.do(*json.loads(self.intent.read_text()))
        while self.goes_on:
            self.do(*self.choose())
            time.sleep(self.random.uniform(0, 2 * self.pace))  # the load

    def choose(self) -> tuple[str, list[list[str]], dict[str, Any]]:
        draw = self.random
        kinds = list(self.refs)
        kind = draw.choices(kinds, [KINDS[kind].weight for kind in kinds])[0]
        refs = [draw.choice(self.refs[kind])]
        if (chance := draw.random()) < 0.08:
            verb, options = "vanish" if KINDS[kind].vanishes and draw.random() < 0.7 else "delete", {}
            if verb == "delete" and self.latest and draw.random() < 0.5:
                refs = [self.latest]  # which is probably still scheduled
        elif chance < 0.2:
            verb, options = "look", {"delay": draw.uniform(0, 1)}  # the goal stays
        elif chance < 0.3:
            verb, options = "want", {"delay": draw.uniform(1.5, 5)}  # parked, mostly
        elif chance < 0.38:
            verb, options = "want", {"delay": draw.uniform(0.2, 1.5), "replace": True}
        elif chance < 0.44:
            verb, options = "want", {}
            refs = draw.sample(self.refs[kind], min(8, len(self.refs[kind])))
        else:
            verb, options = "want", {}
        if KINDS[kind].far and verb != "delete":
            replaces = draw.random() < 0.3
            verb, options = "look", {"delay": draw.uniform(DAY, 10_000 * DAY), "replace": replaces}
        return verb, [[ref.kind, ref.id] for ref in refs], options

    def do(self, verb: str, names: list[list[str]], options: dict[str, Any]) -> None:
        things, refs = self.things, [EntityRef(*name) for name in names]
        new = self.intent.with_suffix(".new")
        new.write_text(json.dumps([verb, names, options]))
        new.replace(self.intent)
        act: Callable[[], object]
        for ref in refs:
            things.world.mark(ref, gone=verb in ("delete", "vanish"))
            if verb == "want":
                things.world.want_more(ref)
        if verb == "delete":
            act = lambda: things.delete(refs[0])  # noqa: E731 - one of two, called below
        else:
            act = lambda: things.enqueue(refs, **options)  # noqa: E731 - the other
            self.latest = refs[0]
        things.insist(act)
        self.intent.unlink()


if __name__ == "__main__":
    seed, number, of, pace, kinds = sys.argv[1:]
    Producer(from_environment(), int(seed), int(number), int(of), float(pace), kinds).run()
