"""A producer that dies: `python -m tests.acceptance.producer DIRECTORY NUMBER ID...`.

It enqueues the entities one by one and kills itself at the publish of the entity with this number: after the
index took the enqueue, before the broker heard of it.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path

from kombu import Producer

from tests.acceptance.app import Things


def main(directory: str, number: str, *ids: str) -> None:
    things = Things(Path(directory))
    publishes = itertools.count()
    publish = Producer.publish
    call = ""

    def publish_or_die(*args: object, **kwargs: object) -> object:
        if next(publishes) == int(number):
            things.ledger.write("enqueued", ids[int(number)], call=call)  # the index has it
            os.kill(os.getpid(), signal.SIGKILL)
        return publish(*args, **kwargs)

    Producer.publish = publish_or_die
    for id in ids:
        call = things.ledger.call()
        things.ledger.write("enqueue", id, delay=0.0, call=call)
        things.engine.enqueue(things.Thing(id))
        things.ledger.write("enqueued", id, call=call)


if __name__ == "__main__":
    main(*sys.argv[1:])
