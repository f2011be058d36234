"""At 3 a.m.: the commands that say what fails, is late or hangs, whether anybody is there, and what to do."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner

from celery_goalstate import Engine, Entity, Rules, cli
from celery_goalstate.index import open_index
from celery_goalstate.index.base import Claim, Report, Request, Run, Verdict
from tests.integration import test_cli
from tests.integration.conftest import engine_of_others
from tests.integration.test_cli import Command, run
from tests.servers import Valkey

valkey, engine, goalstate = test_cli.valkey, test_cli.engine, test_cli.goalstate  # fixtures

DAY = 86_400_000


class Orders:
    """What workers and time have made of the orders, told to the index itself."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.index = open_index(engine.settings)

    def due(self, *ids: str, ago: int = 0) -> None:
        """Due since so many milliseconds, and no worker has come."""
        now = self.index.servers()[0].clock
        self.index.enqueue("order", [Request(id, at=now, task_id=id) for id in ids])
        if ago:
            self._make_older(ids, ago)

    def _make_older(self, ids: Any, ago: int) -> None:
        """What is due is never moved into the past: so the stored deadline is."""
        client: Any = self.index._client  # type: ignore[attr-defined]
        for id in ids:
            key = "gs:{default:order:0}"
            deadline = int(client.hget(f"{key}:e:{id}", "deadline")) - ago
            client.hset(f"{key}:e:{id}", "deadline", deadline)
            client.zadd(f"{key}:sent", {id: deadline}, xx=True)

    def running(self, id: str, where: str = "") -> Run:
        self.due(id)
        [record] = self.index.describe("order", [id])
        assert record is not None
        [claim] = self.index.claim("order", [(id, record.token)], nonce=id, task_id=f"task-{id}")
        assert isinstance(claim, Claim)
        named = Run(id, claim.lease)
        if where:
            self.index.renew("order", [named], where={named: where})
        return named

    def ended(self, id: str, verdict: Verdict, delay: int | None = None, **report: Any) -> None:
        held = self.running(id)
        self.index.finish("order", [Report(id, held.lease, verdict, delay, **report)])

    def failing(self, id: str, error: str = "OSError: no route", **report: Any) -> None:
        told = {"failures": 1, "state": "paid", "goal": "shipped", "step": "charge", "took": 12, **report}
        self.ended(id, Verdict.FAILED, told.pop("delay", DAY), error=error, **told)

    def quarantined(self, id: str, error: str = "PermanentError: card stolen") -> None:
        self.ended(id, Verdict.QUARANTINED, failures=1, error=error)

    def swept(self) -> None:
        """As by a worker."""
        self.index.survey(self.engine.kinds, sweeper="s", hold=60_000, limit=0)


@pytest.fixture
def orders(engine: Engine) -> Iterator[Orders]:
    orders = Orders(engine)
    yield orders
    orders.index.close()


class TestStatus:
    def test_all_is_well(self, orders: Orders, goalstate: Command) -> None:
        orders.swept()
        orders.ended("1", Verdict.DONE, converged=True)
        result = goalstate("status")
        assert result.exit_code == 0
        heading, first, *_ = result.output.splitlines()
        assert heading.split() == [
            *("KIND", "SCHEDULED", "OVERDUE", "OLDEST", "RUNNING", "LONGEST", "FAILING", "FAILED")
        ]
        assert first.split() == ["order", "0", "0", "0", "0", "0"]
        assert "!" not in result.output

    def test_what_fails(self, orders: Orders, goalstate: Command) -> None:
        orders.swept()
        orders.failing("1")
        orders.quarantined("2")
        result = goalstate("status")
        assert result.exit_code == 1
        assert re.search(r"^order +1 +0 +0 +1 +1$", result.output, re.MULTILINE)
        assert "! order: 1 quarantined, until somebody enqueues them" in result.output
        assert "`celery goalstate list --kind order --status failed`" in result.output
        assert "! order: 1 failing, the first for 0 s: `celery goalstate list --kind order --failing`" in (
            re.sub(r"\d+ ms", "0 s", result.output)
        )

    def test_what_is_late(self, orders: Orders, goalstate: Command) -> None:
        orders.swept()
        orders.due("1", "2")
        assert goalstate("status").exit_code == 0, "a worker will come"
        orders.due("3", ago=16 * 60_000)
        result = goalstate("status", "--wait", "0")
        assert result.exit_code == 1
        assert re.search(r"^order +3 +3 +16 min +0 ", result.output, re.MULTILINE)
        assert "! order: 3 overdue, the first for 16 min: `celery goalstate list --kind order --overdue`" in (
            result.output
        )

    def test_how_long_the_rest_takes(self, orders: Orders, goalstate: Command) -> None:
        orders.swept()
        orders.due("1", "2", ago=16 * 60_000)
        worker, done = Orders(orders.engine), threading.Event()

        def work() -> None:
            for number in itertools.count():
                if done.is_set():
                    break
                worker.ended(f"w{number}", Verdict.DONE, converged=True)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            result = goalstate("status", "--wait", "0.5")
            said = json.loads(goalstate("status", "--wait", "0.5", "--json").stdout)
        finally:
            done.set()
            thread.join()
            worker.index.close()
        assert re.search(
            r"! order: \d+ overdue, the first for 16 min;"
            r" [\d.,]+ a second are evaluated, about [\d.]+ ms to go: ",
            result.output,
        )
        assert said["kinds"]["order"]["evaluations_per_second"] > 2
        assert said["kinds"]["parcel"]["evaluations_per_second"] is None

    def test_nothing_moves(self, orders: Orders, goalstate: Command) -> None:
        orders.swept()
        orders.due("1", ago=16 * 60_000)
        result = goalstate("status", "--wait", "0.1")
        assert "overdue, the first for 16 min; none was evaluated within 100 ms: " in result.output

    def test_what_is_late_since_somebody_wants_that(self, orders: Orders, goalstate: Command) -> None:
        orders.swept()
        orders.due("1", ago=60 * 60_000)
        orders.engine.pause("order", by="ann@ops-1")
        result = goalstate("status")
        assert result.exit_code == 0
        assert re.search(r"paused (now|\d+ s ago) by ann@ops-1$", result.output, re.MULTILINE)

    def test_what_hangs(self, valkey: Valkey) -> None:
        app = Celery("shop", broker=valkey.url, set_as_current=False)
        engine = Engine(app)

        @engine.register(max_run=0.001)
        class Order(Entity):
            rules = Rules({})

        orders = Orders(engine)
        orders.swept()
        orders.running("a b", where="[]")
        result = run(app, "status")
        assert result.exit_code == 1
        assert re.search(r"! 'order/a b' runs for .*: `celery goalstate show 'order/a b'`", result.output)
        orders.index.close()
        with valkey.client() as client:
            client.flushall()

    def test_nobody_is_there(self, orders: Orders, goalstate: Command) -> None:
        result = goalstate("status")
        assert result.exit_code == 1
        assert "! no worker is there so far, nothing happens (order, parcel)" in result.output
        orders.index.survey(["order"], sweeper="s", hold=0, limit=0)
        assert re.search(r"! no worker is there since ", goalstate("status").output)

    def test_a_kind_that_nobody_registers(self, orders: Orders, goalstate: Command) -> None:
        orders.swept()
        engine_of_others(orders.engine, "order.old").enqueue(orders.engine.ref("order.old", "1"))
        result = goalstate("status")
        assert result.exit_code == 1
        assert re.search(r"^order.old .* not registered$", result.output, re.MULTILINE)
        assert "! order.old: no entity class of this kind is registered here, and 1 entities" in result.output

    def test_json(self, orders: Orders, goalstate: Command) -> None:
        orders.failing("1")
        result = goalstate("status", "--json")
        assert result.exit_code == 1
        said = json.loads(result.stdout)
        assert said["kinds"]["order"]["failing"] == 1
        assert said["kinds"]["order"]["counts"]["scheduled"] == 1
        assert len(said["needs"]) == 2

    def test_an_index_that_does_not_answer(self) -> None:
        app = Celery("shop", broker="redis://127.0.0.1:1", set_as_current=False)
        Engine(app)
        assert run(app, "status").exit_code == 3


class TestList:
    def test_failing(self, orders: Orders, goalstate: Command) -> None:
        orders.due("0")
        for id in ("3", "1", "2"):
            orders.failing(id)
        result = goalstate("list", "--failing")
        heading, *lines = result.output.splitlines()
        assert heading.split() == ["ENTITY", "FAILING", "TRIED", "AGAIN", "STATE", "FAILURES", "ERROR"]
        assert [line.split()[0] for line in lines] == ["order/3", "order/1", "order/2"], "the longest first"
        assert re.search(r" in 24 h +paid → shipped, in charge +1 +OSError: no route$", lines[0])

    def test_overdue(self, orders: Orders, goalstate: Command) -> None:
        orders.due("new")
        orders.due("old", ago=60_000)
        orders.failing("later")
        result = goalstate("list", "--overdue", "--kind", "order")
        assert [line.split()[0] for line in result.output.splitlines()[1:]] == ["order/old", "order/new"]

    def test_running(self, orders: Orders, goalstate: Command) -> None:
        orders.running("quick")
        orders.running("slow", where=json.dumps(["w1@x", 7, "ship", "app.py:8 ship"]))
        result = goalstate("list", "--running")
        assert [line.split()[0] for line in result.output.splitlines()[1:]] == ["order/slow", "order/quick"]

    def test_error(self, orders: Orders, goalstate: Command) -> None:
        orders.failing("1", error="OSError: no route")
        orders.failing("2", error="ValueError: " + "x" * 100 + " at the end")
        orders.quarantined("3", error="PermanentError: at the end")
        result = goalstate("list", "--error", "AT THE END")
        assert [line.split()[0] for line in result.output.splitlines()[1:]] == ["order/3", "order/2"]
        nothing = goalstate("list", "--error", "elsewhere", "--kind", "order")
        assert (nothing.exit_code, nothing.stdout) == (1, "")
        assert "no entities of kind order with 'elsewhere' in their error" in nothing.stderr

    def test_page_by_page(self, orders: Orders, goalstate: Command) -> None:
        for id in "abc":
            orders.failing(id)
        result = goalstate("list", "--failing", "--limit", "2")
        [cursor] = re.findall(r"--after (\S+)", result.stderr)
        assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == ["order/a", "order/b"]
        result = goalstate("list", "--failing", "--after", cursor)
        assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == ["order/c"]
        assert goalstate("list", "--overdue", "--after", cursor).exit_code == 2

    def test_a_status_and_a_flag_are_too_much(self, goalstate: Command) -> None:
        result = goalstate("list", "--status", "idle", "--failing")
        assert result.exit_code == 2
        assert "give --status idle or --failing, not both" in result.stderr


class TestShow:
    def test_what_it_is_doing(self, orders: Orders, goalstate: Command) -> None:
        calls = "app.py:7 call_carrier < app.py:8 ship"
        orders.running("1", where=json.dumps(["w1@x", 14740, "ship", calls]))
        output = goalstate("show", "order", "1").output
        assert re.search(r"running since  .* UTC, .*, on w1@x, pid 14740\n", output)
        assert re.search(r"doing          ship, .* at app.py:7 call_carrier < app.py:8 ship\n", output)
        assert "To end it: `celery control terminate KILL task-1`." in output

    def test_why(self, orders: Orders, goalstate: Command) -> None:
        orders.failing("1", error="OSError: first", delay=0)
        [record] = orders.index.describe("order", ["1"])
        assert record is not None
        [claim] = orders.index.claim("order", [("1", record.token)], nonce="n", task_id="t")
        report = Report("1", claim.lease, Verdict.FAILED, DAY, failures=2, error="OSError: second")
        orders.index.finish("order", [report])
        output = goalstate("show", "order", "1").output
        assert re.search(r"failures       2, since .* UTC", output)
        assert "error          OSError: second\n" in output
        assert re.search(r"before that    .* UTC  paid, in charge, 12 ms: OSError: first\n", output)
        shown = json.loads(goalstate("show", "order", "1", "--json").stdout)
        assert [each["error"] for each in shown["history"]] == ["OSError: second", "OSError: first"]


class TestBulk:
    def test_enqueue_what_is_quarantined(self, orders: Orders, goalstate: Command) -> None:
        for id in "abc":
            orders.quarantined(id)
        orders.failing("d")
        result = goalstate("enqueue", "--failed", "order", "--yes")
        assert (result.exit_code, result.stdout) == (0, "order: 3 enqueued\n")
        counts = orders.engine.counts("order")["order"]
        assert (counts["failed"], counts["scheduled"]) == (0, 4)

    def test_enqueue_what_fails(self, orders: Orders, goalstate: Command) -> None:
        for id in "abc":
            orders.failing(id)
        assert goalstate("enqueue", "--failing", "order", "--yes").stdout == "order: 3 enqueued\n"
        assert orders.engine.overview("order")["order"].overdue == 3

    def test_delete_what_fails(self, orders: Orders, goalstate: Command) -> None:
        for id in "abc":
            orders.failing(id)
        orders.due("d")
        assert goalstate("delete", "--failing", "order", "--yes").stdout == "order: 3 deleted\n"
        assert [each.id for each in orders.engine.list("order")] == ["d"]

    def test_more_than_a_page(self, orders: Orders, goalstate: Command) -> None:
        ids = [str(n) for n in range(1_234)]
        orders.due(*ids)
        records = orders.index.describe("order", ids)
        pairs = [(each.id, each.token) for each in records if each]
        claims = orders.index.claim("order", pairs, nonce="n", task_id="t")
        reports = [
            Report(claim.id, claim.lease, Verdict.QUARANTINED, None, 1, error="boom")
            for claim in claims
            if isinstance(claim, Claim)
        ]
        orders.index.finish("order", reports)
        result = goalstate("delete", "--failed", "order", "--yes", "--json")
        assert json.loads(result.stdout) == {"kind": "order", "deleted": 1_234}
        assert orders.engine.list("order") == []

    @pytest.mark.parametrize(("answer", "left"), [("y", 0), ("n", 1)])
    def test_it_is_confirmed(self, orders: Orders, answer: str, left: int) -> None:
        orders.quarantined("a")
        context = CLIContext(app=orders.engine.app, no_color=True, workdir=None)
        result = CliRunner().invoke(
            cli.goalstate, ["enqueue", "--failed", "order"], obj=context, input=f"{answer}\n"
        )
        assert "Enqueue 1 failed entity of kind order? [y/N]" in result.stderr
        assert result.exit_code == left
        assert orders.engine.counts("order")["order"]["failed"] == left

    def test_none(self, goalstate: Command) -> None:
        assert goalstate("enqueue", "--failed", "order").stdout == "order: 0 enqueued\n"

    @pytest.mark.parametrize(
        "words",
        [
            ["enqueue"],
            ["enqueue", "order", "1", "--failed", "order"],
            ["delete", "--failed", "order", "--failing", "order"],
        ],
    )
    def test_one_way_to_name_them(self, goalstate: Command, words: list[str]) -> None:
        result = goalstate(*words)
        assert result.exit_code == 2
        assert "give KIND ID..., or --failed KIND, or --failing KIND" in result.stderr


class TestDoctor:
    def test_what_it_finds(self, orders: Orders, goalstate: Command) -> None:
        result = goalstate("doctor")
        assert result.exit_code == 1
        assert "fail  no worker is there for order, parcel" in result.output
        assert re.search(r"^ok    the index answers: redis://.*, namespace default", result.output)
        orders.swept()
        result = goalstate("doctor")
        assert result.exit_code == 0
        assert "ok    a worker is there for order, parcel" in result.output

    def test_a_server_that_drops_what_is_scheduled(self, orders: Orders, goalstate: Command) -> None:
        orders.swept()
        client: Any = orders.index._client  # type: ignore[attr-defined]
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            result = goalstate("doctor")
        finally:
            client.config_set("maxmemory-policy", "noeviction")
        assert result.exit_code == 1
        assert "fail  its maxmemory-policy is allkeys-lru" in result.output

    def test_rules_with_gaps(self, valkey: Valkey) -> None:
        app = Celery("shop", broker=valkey.url, set_as_current=False)
        engine = Engine(app)

        @engine.register
        class Order(Entity):
            rules = Rules({"shipped": {"paid": ["ship"]}, "paid": {"shipped": []}})

            def ship(self, ctx: Any) -> None: ...

        result = run(app, "doctor", "--json")
        said = {finding["what"]: finding["verdict"] for finding in json.loads(result.stdout)}
        [gaps] = [what for what in said if "the rules of order" in what]
        assert said[gaps] == "warn"
        assert "paid → paid, shipped → shipped" in gaps
        with valkey.client() as client:
            client.flushall()

    def test_an_index_that_does_not_answer(self) -> None:
        app = Celery("shop", broker="redis://:secret@127.0.0.1:1", set_as_current=False)
        Engine(app)
        result = run(app, "doctor")
        assert result.exit_code == 1
        assert re.search(r"^fail  the index on redis://:\*\*@127.0.0.1:1", result.output, re.MULTILINE)
        assert "secret" not in result.output
