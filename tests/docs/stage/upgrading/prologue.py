"""What the shop was before: orders, of which some wait, one failed and one is quarantined."""

from datetime import timedelta

from celery import Celery

from celery_goalstate import Engine
from celery_goalstate.index.base import Report, Verdict

before = Engine(Celery("shop", broker="redis://localhost:6379/0", set_as_current=False))
before.declare("order")
index = before.parts.index


def evaluate(id, verdict, **report):
    before.enqueue(before.ref("order", id))
    [record] = index.describe("order", [id])
    [claim] = index.claim("order", [(id, record.token)], nonce="nonce", task_id="task")
    index.finish("order", [Report(id, claim.lease, verdict, **{"delay": None, **report})])


before.enqueue(before.ref("order", "42"), timedelta(hours=9))
evaluate("43", Verdict.FAILED, delay=600_000, failures=3, error="OSError: the carrier is away")
evaluate("44", Verdict.QUARANTINED, failures=1, error="PermanentError: there is no such address")
evaluate("45", Verdict.DONE, converged=True)
