"""`celery goalstate`, over an index on an embedded Valkey: what it does, says, and exits with."""

from __future__ import annotations

import enum
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

from celery_goalstate import ANY, Action, Description, Engine, Entity, EntityRef, Rules, Status, cli
from celery_goalstate.cli import output
from celery_goalstate.exceptions import EntityGone
from celery_goalstate.index import open_index
from celery_goalstate.index.base import Claim, Report, Run, Verdict
from celery_goalstate.worker.lease import LeaseKeeper
from tests.integration.conftest import engine_of_others
from tests.servers import Valkey, free_port, in_a_fork
from tests.versions import needs_redis_py_8

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def engine(valkey: Valkey) -> Iterator[Engine]:
    app = Celery("shop", broker=valkey.url, set_as_current=False)
    engine = Engine(app)

    @engine.register
    class Order(Entity):
        rules = Rules({})

        @classmethod
        def iter_unconverged(cls) -> list[str]:
            return ["1", "2"]

    @engine.register(queue="parcels")
    class Parcel(Entity):
        rules = Rules({})

    yield engine
    with valkey.client() as client:
        client.flushall()


def run(app: Celery, *arguments: str) -> Result:
    context = CLIContext(app=app, no_color=True, workdir=None)
    result = CliRunner().invoke(cli.goalstate, list(arguments), obj=context)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def goalstate(engine: Engine) -> Command:
    return lambda *arguments: run(engine.app, *arguments)


def test_the_help_says_of_each_command_what_it_does(goalstate: Command) -> None:
    told = goalstate("--help").stdout.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in told] == sorted(cli.goalstate.commands)
    assert not [line for line in told if line.endswith("...")], "cut off: the first sentence is too long"


def evaluate(engine: Engine, id: str, verdict: Verdict | None, **report: Any) -> None:
    """What a worker would tell the index of an entity that is due: the verdict, or None while it runs."""
    index = open_index(engine.settings)
    [record] = index.describe("order", [id])
    assert record is not None
    [claim] = index.claim("order", [(id, record.token)], nonce="nonce", task_id="task")
    assert isinstance(claim, Claim)
    if verdict is not None:
        index.finish("order", [Report(id, claim.lease, verdict, report.pop("delay", None), **report)])
    index.close()


class TestEnqueue:
    def test_now(self, engine: Engine, goalstate: Command) -> None:
        result = goalstate("enqueue", "order", "42", "43")
        assert result.exit_code == 0
        assert result.output == "order/42: scheduled now\norder/43: scheduled now\n"
        assert all(engine.is_scheduled(engine.ref("order", id)) for id in ("42", "43"))

    @pytest.mark.parametrize(
        ("given", "seconds"),
        [("30s", 30), ("5m", 300), ("2h", 7200), ("1d", 86_400), ("1h30m", 5400)],
    )
    def test_in(self, engine: Engine, goalstate: Command, given: str, seconds: int) -> None:
        assert goalstate("enqueue", "order", "42", "--in", given).exit_code == 0
        found = engine.describe(engine.ref("order", "42"))
        assert found is not None
        assert found.deadline is not None
        assert abs(found.deadline - datetime.now(UTC) - timedelta(seconds=seconds)) < timedelta(seconds=5)

    @pytest.mark.parametrize("given", ["2099-01-31T07:30Z", "2099-01-31T08:30:00+01:00"])
    def test_at(self, engine: Engine, goalstate: Command, given: str) -> None:
        assert goalstate("enqueue", "order", "42", "--at", given).exit_code == 0
        found = engine.describe(engine.ref("order", "42"))
        assert found is not None
        assert found.deadline == datetime(2099, 1, 31, 7, 30, tzinfo=UTC)

    def test_an_earlier_deadline_stays(self, goalstate: Command) -> None:
        goalstate("enqueue", "order", "42", "--in", "5m")
        result = goalstate("enqueue", "order", "42", "--in", "2h")
        assert result.output == "order/42: scheduled in 5 min, as it was before\n"

    def test_json(self, goalstate: Command) -> None:
        [enqueued] = json.loads(
            goalstate("enqueue", "order", "42", "--at", "2099-01-31T07:30Z", "--json").stdout
        )
        assert enqueued == {
            "entity": "order/42",
            "changed": True,
            "deadline": "2099-01-31T07:30:00+00:00",
            "sent": False,
        }

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["order", "42", "--in", "soon"], "'soon' is no duration; give 30s, 5m"),
            (["order", "42", "--in", "5"], "'5' is no duration"),
            (["order", "42", "--in", ""], "'' is no duration"),
            (["order", "42", "--in", "-5s"], "'-5s' is no duration"),
            (["order", "42", "--in", "9999999999999d"], "is too long"),
            (["order", "42", "--in", "99999d"], "within the next hundred years"),
            (["order", "42", "--at", "tomorrow"], "'tomorrow' is no ISO 8601 time"),
            (["order", "42", "--at", "2099-01-31T07:30"], "does not name its time zone; append Z"),
            (["order", "42", "--in", "5m", "--at", "2099-01-31T07:30Z"], "--in or --at, not both"),
            (
                ["oder", "42"],
                "no entity class of kind 'oder' is registered. Did you mean order? Known: order",
            ),
            (["Order", "42"], "kind is 'Order'; accepted: lower-case letters"),
            (["order", "4\n2"], "an entity's id is '4\\n2'"),
            ([], "give KIND ID..."),
            (["order"], "which order? Give KIND ID, or KIND/ID"),
            (["order/"], "an entity's id is ''"),
        ],
    )
    def test_bad_usage(self, engine: Engine, goalstate: Command, arguments: list[str], said: str) -> None:
        result = goalstate("enqueue", *arguments)
        assert result.exit_code == 2
        assert said in result.output
        assert engine.counts("order")["order"] == dict.fromkeys(Status, 0)


class TestEntities:
    """An entity may be given as the lists and the logs write it."""

    def test_one_word(self, engine: Engine, goalstate: Command) -> None:
        assert goalstate("enqueue", "order/4/2", "--in", "5m", "parcel/7").exit_code == 0
        assert engine.is_scheduled(engine.ref("order", "4/2"))
        assert goalstate("show", "--json", "order/4/2").exit_code == 0
        assert (
            goalstate("delete", "order/4/2", "parcel/7").output == "order/4/2: deleted\nparcel/7: deleted\n"
        )

    def test_an_id_may_have_a_slash(self, goalstate: Command) -> None:
        assert goalstate("enqueue", "order", "a/1").output == "order/a/1: scheduled now\n"

    def test_the_two_ways_are_not_mixed(self, goalstate: Command) -> None:
        result = goalstate("enqueue", "order/42", "43")
        assert result.exit_code == 2
        assert "an entity's id is ''" in result.output

    def test_show_takes_one(self, goalstate: Command) -> None:
        assert "give one entity" in goalstate("show", "order", "42", "43").output


class TestShow:
    def test_scheduled(self, goalstate: Command) -> None:
        goalstate("enqueue", "order", "42", "--at", "2099-01-31T07:30Z")
        result = goalstate("show", "order", "42")
        assert result.exit_code == 0
        assert result.output.startswith("order/42: scheduled\n")
        assert "deadline       2099-01-31 07:30:00 UTC, in " in result.output
        assert "A worker evaluates it at its deadline." in result.output

    def test_retry(self, engine: Engine, goalstate: Command) -> None:
        goalstate("enqueue", "order", "42")
        evaluate(engine, "42", Verdict.FAILED, delay=240_000, failures=3, error="OSError: no route to host")
        result = goalstate("show", "order", "42")
        assert re.search(r"failures       3, since .* UTC, now\n", result.output)
        assert "error          OSError: no route to host\n" in result.output
        assert "in 4 min\n" in result.output
        assert "the retry after 3 failures in a row" in result.output

    def test_running(self, engine: Engine, goalstate: Command) -> None:
        goalstate("enqueue", "order", "42")
        evaluate(engine, "42", None)
        result = goalstate("show", "order", "42")
        assert result.output.startswith("order/42: running\n")
        assert "its lease ends in 33 s" in result.output
        goalstate("enqueue", "order", "42")
        assert "evaluated once more after that" in goalstate("show", "order", "42").output

    @pytest.mark.parametrize("id", ["42", "-42", "a/b", "$(id); 'it'"])
    def test_quarantined(self, engine: Engine, goalstate: Command, id: str) -> None:
        goalstate("enqueue", f"order/{id}")
        evaluate(engine, id, Verdict.QUARANTINED, failures=1, error="PermanentError: card stolen")
        result = goalstate("show", f"order/{id}")
        assert result.output.startswith(f"order/{id}: failed\n")
        [said] = re.findall(r"`(goalstate enqueue .*)`", result.output)
        [word] = shlex.split(said)[2:]
        assert goalstate("enqueue", word).exit_code == 0
        assert engine.is_scheduled(engine.ref("order", id))

    @pytest.mark.parametrize(
        ("converged", "said", "follows"),
        [
            (True, "goal reached", "Nothing is pending until it is enqueued."),
            (False, "goal not reached", "Nothing is pending, though its goal is not reached"),
        ],
    )
    def test_idle(self, engine: Engine, goalstate: Command, converged: bool, said: str, follows: str) -> None:
        goalstate("enqueue", "order", "42")
        evaluate(engine, "42", Verdict.DONE, converged=converged)
        output = goalstate("show", "order", "42").output
        assert said in output
        assert follows in output

    def test_paused(self, goalstate: Command) -> None:
        goalstate("enqueue", "order", "42")
        goalstate("pause", "order")
        assert "nothing starts until `goalstate resume order`" in goalstate("show", "order", "42").output

    def test_json(self, engine: Engine, goalstate: Command) -> None:
        goalstate("enqueue", "order", "42")
        evaluate(engine, "42", Verdict.QUARANTINED, failures=1, error="PermanentError: card stolen")
        shown = json.loads(goalstate("show", "order", "42", "--json").stdout)
        assert shown["status"] == "failed"
        assert shown["deadline"] is None
        assert shown["lateness"] == 0
        assert shown["paused"] is False
        assert datetime.fromisoformat(shown["quarantined"]).tzinfo is not None
        assert shown["next"].startswith("It is quarantined")

    def test_the_queue_that_its_message_is_on(self, engine: Engine, goalstate: Command) -> None:
        goalstate("enqueue", "order", "1")
        goalstate("enqueue", "parcel", "1")
        goalstate("enqueue", "parcel", "2", "--in", "1h")
        assert "message        on its way, by queue celery\n" in goalstate("show", "order", "1").output
        assert "message        on its way, by queue parcels\n" in goalstate("show", "parcel", "1").output
        assert "message" not in goalstate("show", "parcel", "2").output
        assert json.loads(goalstate("show", "parcel", "2", "--json").stdout)["queue"] == "parcels"

    def test_the_queue_that_a_route_names(self, engine: Engine, goalstate: Command) -> None:
        engine.app.conf.task_routes = {"goalstate.order": {"queue": "quick"}}
        goalstate("enqueue", "order", "1")
        assert "on its way, by queue quick\n" in goalstate("show", "order", "1").output

    def test_a_queue_that_does_not_exist(self, engine: Engine, goalstate: Command) -> None:
        engine.enqueue(engine.ref("parcel", "1"), timedelta(hours=1))
        engine.app.conf.task_create_missing_queues = False
        assert goalstate("show", "parcel", "1").exit_code == 0
        assert json.loads(goalstate("show", "parcel", "1", "--json").stdout)["queue"] is None

    def test_a_kind_of_another_app(self, engine: Engine, goalstate: Command) -> None:
        engine_of_others(engine, "order.old").enqueue(EntityRef("order.old", "1"))
        result = goalstate("show", "order.old", "1")
        assert result.exit_code == 0
        assert "message        on its way\n" in result.output
        assert "no entity class of kind 'order.old' is registered. Did you mean order?" in result.output
        assert result.output.endswith("A worker that does not know it drops its messages.\n")

    def test_unknown(self, goalstate: Command) -> None:
        result = goalstate("show", "order", "42")
        assert result.exit_code == 1
        assert result.stdout == ""
        assert "order/42 is not known: never enqueued" in result.stderr

    def test_unknown_kind(self, goalstate: Command) -> None:
        result = goalstate("show", "oder", "42", "--json")
        assert result.exit_code == 2
        assert result.stdout == ""
        assert "Did you mean order?" in result.stderr


def description(**fields: Any) -> Description:
    """Times are given from now: the tests are collected long before they run."""
    now = datetime.now(UTC)
    fields = {name: now + value if isinstance(value, timedelta) else value for name, value in fields.items()}
    absent = dict.fromkeys(Description.__dataclass_fields__)
    return Description(**{**absent, "kind": "order", "id": "42", "sent": False, "failures": 0, **fields})


@pytest.mark.parametrize(
    ("fields", "when", "follows"),
    [
        (
            {"status": Status.SCHEDULED, "deadline": timedelta(hours=2, minutes=31)},
            "in 2.5 h",
            "at its deadline",
        ),
        (
            {"status": Status.SCHEDULED, "deadline": -timedelta(minutes=10), "sent": True},
            "10 min overdue",
            "waits for a free worker",
        ),
        (
            {"status": Status.SCHEDULED, "deadline": -timedelta(minutes=10)},
            "10 min overdue",
            "no message is under way: is a worker of this app running",
        ),
        (
            {"status": Status.RUNNING, "started": -timedelta(days=3)},
            "for 3 d",
            "A worker evaluates it now",
        ),
        ({"status": Status.FAILED, "quarantined": -timedelta(days=900)}, "2.5 years ago", "quarantined"),
        ({"status": Status.IDLE, "finished": -timedelta(minutes=3)}, "3 min ago", "Nothing is pending"),
    ],
)
def test_words(fields: dict[str, Any], when: str, follows: str) -> None:
    assert output.when(description(**fields)) == when
    assert follows in output.what_follows(description(**fields), paused=False)


class TestList:
    def test_counts(self, engine: Engine, goalstate: Command) -> None:
        goalstate("enqueue", "order", "1", "2", "--in", "1h")
        goalstate("enqueue", "order", "3")
        evaluate(engine, "3", Verdict.QUARANTINED)
        goalstate("pause", "parcel")
        result = goalstate("list")
        assert result.exit_code == 0
        assert [line.split() for line in result.output.splitlines()] == [
            ["KIND", "SCHEDULED", "RUNNING", "IDLE", "FAILED"],
            ["order", "2", "0", "0", "1"],
            ["parcel", "0", "0", "0", "0", "paused"],
        ]
        assert json.loads(goalstate("list", "--json").stdout)["order"] == {
            "scheduled": 2,
            "running": 0,
            "idle": 0,
            "failed": 1,
            "paused": False,
            "registered": True,
            "complete": True,
        }

    def test_a_kind_that_nobody_registers_is_told_with_what_to_do(
        self, engine: Engine, goalstate: Command
    ) -> None:
        others = engine_of_others(engine, "old")
        others.enqueue_many([others.ref("old", "1"), others.ref("old", "2")], timedelta(hours=1))
        others.declare("gone")
        others.enqueue(others.ref("gone", "1"))
        others.delete(others.ref("gone", "1"))
        result = goalstate("list")
        assert [line.split() for line in result.stdout.splitlines()[2:]] == [
            ["parcel", "0", "0", "0", "0"],
            ["old", "2", "0", "0", "0", "not", "registered"],
        ]
        assert "`goalstate move old NEW_KIND`" in result.stderr
        assert "`goalstate delete old --all`" in result.stderr
        listed = json.loads(goalstate("list", "--json").stdout)
        assert list(listed) == ["order", "parcel", "old"]
        assert (listed["old"]["scheduled"], listed["old"]["registered"]) == (2, False)

    def test_rows(self, engine: Engine, goalstate: Command) -> None:
        goalstate("enqueue", "order", "1", "--in", "1h")
        goalstate("enqueue", "order", "2")
        evaluate(engine, "2", Verdict.QUARANTINED, failures=7, error=f"OSError: {'x' * 100}")
        goalstate("enqueue", "parcel", "3", "--in", "2h")
        lines = goalstate("list", "--kind", "order").output.splitlines()
        assert lines[0].split() == ["ENTITY", "STATUS", "WHEN", "GOAL", "FAILURES", "ERROR"]
        assert lines[1].startswith("order/2  failed     ")
        assert lines[1].endswith(f"7         OSError: {'x' * 50}…")
        assert lines[2] == "order/1  scheduled  in 60 min"
        assert len(lines) == 3

    def test_status_over_all_kinds(self, goalstate: Command) -> None:
        goalstate("enqueue", "order", "1", "--in", "1h")
        goalstate("enqueue", "parcel", "3", "--in", "2h")
        listed = json.loads(goalstate("list", "--status", "scheduled", "--json").stdout)
        assert [(each["kind"], each["id"]) for each in listed] == [("order", "1"), ("parcel", "3")]

    def test_limit(self, goalstate: Command) -> None:
        goalstate("enqueue", "order", *map(str, range(6)), "--in", "1h")
        result = goalstate("list", "--kind", "order", "--limit", "5")
        assert len(result.stdout.splitlines()) == 6
        assert "There are more than these 5: --after scheduled/order/" in result.stderr
        after = result.stderr.split("--after ")[1].split()[0]
        rest = goalstate("list", "--kind", "order", "--limit", "5", "--after", after)
        assert len(rest.stdout.splitlines()) == 2
        assert rest.stderr == ""
        nothing = goalstate("list", "--kind", "order", "--after", "idle/order/inf/5")
        assert (nothing.exit_code, nothing.stderr) == (1, "no further entities of kind order\n")

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_pages_over_kinds_and_statuses(self, goalstate: Command, engine: Engine, size: int) -> None:
        for kind in ("order", "parcel"):
            goalstate("enqueue", kind, "it's 1", "it's 2", "--in", "1h")
        goalstate("enqueue", "order", "failed")
        evaluate(engine, "failed", Verdict.QUARANTINED)
        found, arguments = [], ["list", "--kind", "order", "--limit", str(size), "--json"]
        for given in (arguments, ["list", "--status", "scheduled", "--limit", str(size), "--json"]):
            after: list[str] = []
            while after is not None:
                result = goalstate(*given, *after)
                page = json.loads(result.stdout)
                found += [f"{each['kind']}/{each['id']}" for each in page]
                more = result.stderr.partition(f"There are more than these {size}: ")[2]
                after = shlex.split(more) or None
        orders = ["order/it's 1", "order/it's 2"]
        assert found == ["order/failed", *orders, *orders, "parcel/it's 1", "parcel/it's 2"]

    def test_nothing(self, goalstate: Command) -> None:
        result = goalstate("list", "--kind", "order", "--status", "failed")
        assert result.exit_code == 1
        assert result.stderr == "no failed entities of kind order\n"
        assert goalstate("list", "--status", "failed", "--json").stdout == "[]\n"
        assert "Did you mean order?" in goalstate("list", "--kind", "oder").stderr

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--status", "lost"],
            ["--limit", "0"],
            ["--limit", "1001"],
            ["--kind", "Or der"],
            ["--after", "failed/order/1/1"],
            ["--kind", "order", "--after", "1"],
            ["--kind", "order", "--after", "failed/parcel/1/1"],
            ["--status", "failed", "--after", "idle/order/1/1"],
        ],
    )
    def test_bad_usage(self, goalstate: Command, arguments: list[str]) -> None:
        assert goalstate("list", *arguments).exit_code == 2

    @pytest.mark.parametrize("form", ['{"layout": 3}', '{"parts": 7}', "[]", "not JSON"])
    def test_a_foreign_kind_of_another_layout_is_in_no_other_s_way(
        self, engine: Engine, goalstate: Command, valkey: Valkey, form: str
    ) -> None:
        others = engine_of_others(engine, "future", "old")
        for kind in ("future", "old"):
            others.enqueue(others.ref(kind, "1"), 60)
        engine.enqueue(engine.ref("order", "1"), 60)
        with valkey.client() as client:
            client.set("gs:{default:future:0}:form", form)
        result = goalstate("list")
        assert result.exit_code == 0
        assert [line.split()[0] for line in result.stdout.splitlines()] == ["KIND", "order", "parcel", "old"]
        assert "not counted: the index keeps kind 'future' in layout " in result.stderr
        assert "run the release that the other processes run" in result.stderr
        found = json.loads(goalstate("list", "--json").stdout)
        assert found["order"]["scheduled"] == found["old"]["scheduled"] == 1
        assert found["future"]["registered"] is False
        assert "in layout " in found["future"]["error"]

    def test_the_name_of_a_foreign_kind_steers_no_terminal(
        self, engine: Engine, goalstate: Command, valkey: Valkey
    ) -> None:
        engine_of_others(engine, "old").enqueue(EntityRef("old", "1"), 60)
        evil = "o\x1b[2Jld"
        with valkey.client() as client:
            for key in client.scan_iter("gs:{default:old:0}*"):
                client.copy(key, key.replace("old", evil))
            client.sadd("gs:{default}:kinds", evil)
        result = goalstate("list")
        assert "\x1b" not in result.output
        assert "No entity class of kind o\\x1b[2Jld is registered here" in result.stderr


class Stage(enum.Enum):
    NEW = "new"
    PAID = "paid"
    SHIPPED = "shipped"


@pytest.fixture
def shop() -> Engine:
    """An engine whose index lives in this process: its code is asked here, and no index."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    engine = Engine(app)

    def never(ctx: Any, entity: Any) -> None:
        raise AssertionError("an action was run")

    @engine.register
    class Order(Entity):
        rules = Rules(
            {
                Stage.SHIPPED: {
                    Stage.NEW: [Action("charge", never), Action("ship", never)],
                    Stage.PAID: [Action("ship", never)],
                    Stage.SHIPPED: [],
                },
                "cancelled": {ANY: Action("refund", never)},
            }
        )

        @classmethod
        def from_id(cls, id: str) -> Order:
            if id == "gone":
                raise EntityGone
            return cls(id)

        def get_state(self) -> Any:
            if self.id == "broken":
                raise ConnectionError("no route\x1b[2J to host")
            return Stage.PAID

        def get_goal_state(self) -> Any:
            return "sold" if self.id == "odd" else Stage.SHIPPED

    @engine.register
    class Parcel(Order):
        def get_action_list(self, state: Any, goal_state: Any) -> Any:
            return ["sned"] if self.id == "typo" else super().get_action_list(state, goal_state)

    @engine.register
    class Invoice(Entity):
        def get_state(self) -> str:
            return "open"

        get_goal_state = get_state

        def get_action_list(self, state: Any, goal_state: Any) -> Any:
            return []

    engine.declare("elsewhere")
    return engine


@pytest.fixture
def asked(shop: Engine) -> Command:
    return lambda *arguments: run(shop.app, *arguments)


class TestExplain:
    @pytest.mark.parametrize(
        ("entity", "line"),
        [
            (["order", "42"], "PAID → SHIPPED: would run ship"),
            (["order/42"], "PAID → SHIPPED: would run ship"),
            (["order", "odd"], "PAID → sold: would run nothing, for no rule covers these"),
            (["invoice", "1"], "open → open: would run nothing"),
        ],
    )
    def test_what_would_run_and_nothing_does(
        self, shop: Engine, asked: Command, entity: list[str], line: str
    ) -> None:
        result = asked("explain", *entity)
        assert (result.exit_code, result.stdout, result.stderr) == (0, f"{line}\n", "")
        assert not any(any(counts.values()) for counts in shop.counts().values())

    @pytest.mark.parametrize(("id", "goal", "actions"), [("42", "SHIPPED", ["ship"]), ("odd", "sold", None)])
    def test_json(self, asked: Command, id: str, goal: str, actions: list[str] | None) -> None:
        assert json.loads(asked("explain", "order", id, "--json").stdout) == {
            "entity": f"order/{id}",
            "state": "PAID",
            "goal": goal,
            "actions": actions,
        }

    def test_an_error_is_told_with_its_traceback(self, asked: Command) -> None:
        result = asked("explain", "order", "broken")
        assert (result.exit_code, result.stdout) == (1, "")
        assert "Traceback (most recent call last):\n" in result.stderr
        assert "in get_state\n" in result.stderr
        assert result.stderr.endswith("ConnectionError: no route\\x1b[2J to host\n")
        result = asked("explain", "order", "broken", "--json")
        assert result.exit_code == 1
        assert json.loads(result.stdout)["error"].startswith("ConnectionError: no route")

    def test_a_list_that_names_no_method_is_an_error_too(self, asked: Command) -> None:
        result = asked("explain", "parcel", "typo")
        assert result.exit_code == 1
        assert "has no method 'sned'" in result.stderr

    def test_one_that_is_gone(self, asked: Command) -> None:
        result = asked("explain", "order", "gone")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == "order/gone is gone, as its class says: an evaluation would forget it\n"

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["order", "1", "2"], "give one entity"),
            (["order"], "which order?"),
            (["oder", "1"], "Did you mean order?"),
            (["elsewhere", "1"], "kind 'elsewhere' is only declared here"),
        ],
    )
    def test_bad_usage(self, asked: Command, arguments: list[str], told: str) -> None:
        result = asked("explain", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert told in result.stderr


class TestGraph:
    def test_the_matrix(self, asked: Command) -> None:
        result = asked("graph", "order")
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout.splitlines() == [
            "STATE    → SHIPPED     → cancelled",
            "NEW      charge, ship  refund (ANY state)",
            "PAID     ship          refund (ANY state)",
            "SHIPPED  nothing       refund (ANY state)",
            "ANY      no rule       refund",
        ]

    @pytest.mark.parametrize("entity", [["order", "42"], ["order/42"]])
    def test_the_present_cell(self, asked: Command, entity: list[str]) -> None:
        lines = asked("graph", *entity).stdout.splitlines()
        assert lines[2] == "PAID     * ship        refund (ANY state)"
        assert lines[-1] == "* order/42 is here: PAID → SHIPPED"

    def test_the_present_cell_is_outside_of_the_table(self, asked: Command) -> None:
        lines = asked("graph", "order", "odd").stdout.splitlines()
        assert lines[0].split(" → ")[-1] == "sold"
        assert lines[2].endswith("* no rule")

    def test_json(self, asked: Command) -> None:
        found = json.loads(asked("graph", "order", "42", "--json").stdout)
        assert (found["kind"], found["states"]) == ("order", ["NEW", "PAID", "SHIPPED", "ANY"])
        assert found["goals"] == ["SHIPPED", "cancelled"]
        assert found["rows"][1] == [
            {"state": "PAID", "goal": "SHIPPED", "actions": ["ship"], "inherited": "", "present": True},
            {
                "state": "PAID",
                "goal": "cancelled",
                "actions": ["refund"],
                "inherited": "ANY state",
                "present": False,
            },
        ]
        assert found["rows"][3][0]["actions"] is None

    def test_mermaid(self, shop: Engine, asked: Command) -> None:
        rules = shop.kind("order").entity_class.rules
        assert asked("graph", "order", "--mermaid").stdout == f"{rules.to_mermaid()}\n"

    def test_an_entity_that_cannot_be_read(self, asked: Command) -> None:
        result = asked("graph", "order", "broken")
        assert (result.exit_code, result.stdout) == (1, "")
        assert "in get_state\n" in result.stderr

    def test_rules_that_are_not_all(self, asked: Command) -> None:
        result = asked("graph", "parcel")
        assert result.exit_code == 0
        assert "get_action_list() may choose otherwise than its rules.\n" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["invoice"], "`goalstate explain invoice ID`"),
            (["elsewhere"], "kind 'elsewhere' is only declared here"),
            (["oder"], "Did you mean order?"),
            (["order", "1", "2"], "give one entity"),
            (["order", "1", "--mermaid"], "--mermaid takes a KIND alone"),
            (["order", "--json", "--mermaid"], "--mermaid takes a KIND alone"),
        ],
    )
    def test_bad_usage(self, asked: Command, arguments: list[str], told: str) -> None:
        result = asked("graph", *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert told in result.stderr


class TestDelete:
    def test_known_and_unknown(self, engine: Engine, goalstate: Command) -> None:
        goalstate("enqueue", "order", "42", "--in", "1h")
        result = goalstate("delete", "order", "42", "43")
        assert result.exit_code == 1
        assert result.stdout == "order/42: deleted\n"
        assert result.stderr == "not known: order/43\n"
        assert engine.describe(engine.ref("order", "42")) is None

    def test_json(self, goalstate: Command) -> None:
        goalstate("enqueue", "order", "42", "--in", "1h")
        result = goalstate("delete", "order", "42", "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout) == [{"entity": "order/42", "deleted": True}]

    def test_all_of_a_kind_that_is_no_more(self, engine: Engine, goalstate: Command) -> None:
        others = engine_of_others(engine, "old")
        others.enqueue_many((others.ref("old", id) for id in range(1500)), timedelta(hours=1))
        others.enqueue(others.ref("old", "now"))
        goalstate("enqueue", "order", "1", "--in", "1h")
        result = goalstate("delete", "old", "--all")
        assert (result.exit_code, result.output) == (0, "old: 1501 deleted\n")
        assert engine.orphans() == {}
        assert engine.is_scheduled(engine.ref("order", "1"))
        assert goalstate("delete", "old", "--all").exit_code == 1
        assert json.loads(goalstate("delete", "old", "--all", "--json").stdout) == {
            "kind": "old",
            "deleted": 0,
        }

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["order"], "kind 'order' is registered"),
            (["old", "1"], "one KIND and no ids"),
            (["Old"], "kind is 'Old'"),
        ],
    )
    def test_all_is_for_what_is_no_more(
        self, engine: Engine, goalstate: Command, arguments: list[str], said: str
    ) -> None:
        goalstate("enqueue", "order", "1", "--in", "1h")
        result = goalstate("delete", "--all", *arguments)
        assert result.exit_code == 2
        assert said in result.output
        assert engine.is_scheduled(engine.ref("order", "1"))


class TestPauseAndResume:
    def test_who_enqueues_is_told_of_the_pause(self, engine: Engine, goalstate: Command) -> None:
        engine.pause("order")
        assert goalstate("enqueue", "parcel", "1").stderr == ""
        for arguments in (["order", "1", "2"], ["order/3", "parcel/2", "--json"]):
            told = goalstate("enqueue", *arguments).stderr
            assert told == "The kind is paused: nothing starts until `goalstate resume order`.\n"

    def test_one_kind(self, engine: Engine, goalstate: Command) -> None:
        assert goalstate("pause", "order").output == "paused: order\n"
        assert (engine.paused("order"), engine.paused("parcel")) == (True, False)
        assert json.loads(goalstate("resume", "order", "--json").stdout) == {"resumed": ["order"]}
        assert not engine.paused("order")

    def test_all_kinds(self, engine: Engine, goalstate: Command) -> None:
        assert goalstate("pause").output == "paused: order, parcel\n"
        assert engine.paused("order")
        assert engine.paused("parcel")
        assert goalstate("resume").output == "resumed: order, parcel\n"

    def test_stop_is_for_the_whole_deployment_and_outlives_its_process(
        self, engine: Engine, goalstate: Command, caplog: pytest.LogCaptureFixture
    ) -> None:
        def stop() -> str:
            engine.stop()
            return caplog.text

        told = in_a_fork(stop)
        assert "WARNING" in told
        assert (
            "all kinds are paused on every worker (order, parcel), also when this process has ended" in told
        )
        assert (engine.paused("order"), engine.paused("parcel")) == (True, True)
        assert goalstate("resume").output == "resumed: order, parcel\n"
        assert (engine.paused("order"), engine.paused("parcel")) == (False, False)

    def test_unknown_kind(self, goalstate: Command) -> None:
        assert goalstate("pause", "oder").exit_code == 2


class TestResync:
    def test_what_is_not_converged(self, engine: Engine, goalstate: Command) -> None:
        goalstate("enqueue", "order", "2", "--in", "1h")
        result = goalstate("resync", "order", "--spread", "10m")
        assert (result.exit_code, result.output) == (0, "order: 1 enqueued\n")
        assert engine.is_scheduled(engine.ref("order", "1"))
        again = goalstate("resync", "order", "--json")
        assert json.loads(again.stdout) == {"kind": "order", "enqueued": 0}

    def test_revive(self, engine: Engine, goalstate: Command) -> None:
        goalstate("enqueue", "order", "1")
        evaluate(engine, "1", Verdict.QUARANTINED)
        assert goalstate("resync", "order").output == "order: 1 enqueued\n"
        assert goalstate("resync", "order", "--revive").output == "order: 1 enqueued\n"

    def test_a_kind_that_cannot(self, goalstate: Command) -> None:
        result = goalstate("resync", "parcel")
        assert result.exit_code == 2
        assert "define Parcel.iter_unconverged()" in result.output


class TestMove:
    """What the command says; what `moving.move` does is tested in tests/upgrades."""

    def test_another_name(self, engine: Engine, goalstate: Command) -> None:
        others = engine_of_others(engine, "old")
        others.enqueue_many([others.ref("old", "1"), others.ref("old", "2")], timedelta(hours=1))
        result = goalstate("move", "old", "order")
        assert (result.exit_code, result.output) == (0, "old to order: 2 moved\n")
        assert engine.is_scheduled(engine.ref("order", "1"))
        assert json.loads(goalstate("move", "old", "order", "--json").stdout) == {
            "kind": "old",
            "to": "order",
            "entities": 0,
            "running": 0,
        }

    def test_elsewhere(self, engine: Engine, goalstate: Command, valkey: Valkey) -> None:
        engine.enqueue(engine.ref("order", "1"), timedelta(hours=1))
        app = Celery("shop", broker=valkey.url, set_as_current=False)
        app.conf.goalstate_key_prefix = "new"
        moved = Engine(app)

        @moved.register
        class Order(Entity):
            rules = Rules({})

        result = run(app, "move", "order", "--from-prefix", "gs")
        assert (result.exit_code, result.output) == (0, "order to order: 1 moved\n")
        assert moved.is_scheduled(Order("1"))
        assert not engine.is_scheduled(engine.ref("order", "1"))

    def test_what_is_running_stays(self, engine: Engine, goalstate: Command) -> None:
        engine.app.conf.goalstate_lease = 1  # it looks for so long, and a fifth, whether the worker is lost
        engine_of_others(engine, "old").enqueue(EntityRef("old", "1"))
        index = open_index(engine.settings)
        [record] = index.describe("old", ["1"])
        [claim] = index.claim("old", [("1", record.token)], nonce="nonce", task_id="task")
        keeper = LeaseKeeper(index, engine.settings.lease)
        with keeper.keep("old", Run("1", claim.lease), claimed_at=keeper.clock(), max_run=60):
            result = goalstate("move", "old", "order")
        index.close()
        assert result.stdout == "old to order: 0 moved\n"
        assert "1 still being evaluated there" in result.stderr

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["order"], "kind 'order' is kept there already"),
            (["order", "parcel"], "kind 'order' is still registered"),
            (["old", "nothing"], "no entity class of kind 'nothing' is registered"),
            (["old", "order"], "keeps no kind 'old'; known there: parcel"),
            (["Old", "order"], "kind is 'Old'"),
            (["order", "--from-prefix", "G S"], "the old key prefix is 'G S'"),
            (["order", "--from-namespace", "ä"], "the old namespace is 'ä'"),
            (["order", "--from-index", "http://x"], "the old index is 'http://x'; accepted are the schemes"),
            (["order", "--from-index", "memory://"], "keeps no kind 'order'; known there: none"),
        ],
    )
    def test_bad_usage(self, engine: Engine, goalstate: Command, arguments: list[str], said: str) -> None:
        engine.enqueue(engine.ref("parcel", "1"), timedelta(hours=1))
        result = goalstate("move", *arguments)
        assert result.exit_code == 2
        assert said in " ".join(result.output.split())
        assert not engine.paused("order")

    def test_two_names_of_one_server(self, engine: Engine, goalstate: Command, valkey: Valkey) -> None:
        """It would forget what it has just moved to itself."""
        engine.enqueue(engine.ref("order", "1"), timedelta(hours=1))
        same = valkey.url.replace("127.0.0.1", "localhost")
        for paused in (False, True):
            if paused:
                goalstate("pause", "order")
            result = goalstate("move", "order", "--from-index", same)
            assert result.exit_code == 2
            assert engine.is_scheduled(engine.ref("order", "1"))
            assert engine.paused("order") == paused

    def test_to_a_kind_that_is_paused(self, engine: Engine, goalstate: Command) -> None:
        others = engine_of_others(engine, "old")
        others.enqueue(others.ref("old", "1"), timedelta(hours=1))
        assert goalstate("move", "old", "order").stderr == ""
        engine.pause("order")
        others.enqueue(others.ref("old", "2"), timedelta(hours=1))
        result = goalstate("move", "old", "order")
        assert "nothing starts until `goalstate resume order`" in result.stderr
        assert result.stdout == "old to order: 1 moved\n"

    @pytest.mark.parametrize("scheme", ["redis", pytest.param("redis+cluster", marks=needs_redis_py_8)])
    def test_an_index_that_does_not_answer(self, goalstate: Command, scheme: str) -> None:
        result = goalstate("move", "order", "--from-index", f"{scheme}://:secret@127.0.0.1:{free_port()}")
        assert result.exit_code == 3
        assert f"the old index on {scheme}://:**@127.0.0.1" in result.output
        assert result.output.count("://") == 1, "it also names the index that did answer"


class TestWhichEngine:
    def test_namespaces(self, engine: Engine, goalstate: Command) -> None:
        other = Engine(engine.app, namespace="billing")

        @other.register
        class Invoice(Entity):
            rules = Rules({})

        assert goalstate("--namespace", "billing", "enqueue", "invoice", "1").exit_code == 0
        assert "invoice" in goalstate("--namespace", "billing", "list").output
        assert "invoice" not in goalstate("list").output
        unknown = goalstate("--namespace", "biling", "list")
        assert unknown.exit_code == 2
        assert "no engine of namespace 'biling'; known: default, billing" in unknown.output

    def test_none(self) -> None:
        result = run(Celery("bare", set_as_current=False), "list")
        assert result.exit_code == 2
        assert "the Celery app 'bare' has no engine" in result.output

    def test_no_entity_classes(self, valkey: Valkey) -> None:
        app = Celery("bare", broker=valkey.url, set_as_current=False)
        Engine(app)
        result = run(app, "list")
        assert (result.exit_code, result.stderr) == (1, "no entity classes are registered\n")

    def test_an_index_that_cannot_be_seen_from_here(self) -> None:
        app = Celery("bare", broker="memory://", set_as_current=False)
        Engine(app)
        result = run(app, "list")
        assert result.exit_code == 2
        assert "memory://, which lives within one process" in result.output


SHOP = """
from celery import Celery
from celery_goalstate import Engine

app = Celery("shop", broker={url!r}, include=["shop_entities"])
app.conf.broker_transport_options = {{"socket_connect_timeout": 2}}
engine = Engine(app)
"""
ENTITIES = """
from celery_goalstate import Entity, Rules
from shop import engine

@engine.register
class Order(Entity):
    rules = Rules({})
"""


class TestRealProcess:
    """As it is called: through Celery's own command, with entities in modules that a worker imports."""

    def call(self, directory: Path, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (directory / "shop.py").write_text(SHOP.format(url=url))
        (directory / "shop_entities.py").write_text(ENTITIES)
        return subprocess.run(
            [sys.executable, "-m", "celery", "-A", "shop", "goalstate", *arguments],
            capture_output=True,
            text=True,
            cwd=directory,
            timeout=60,
            check=False,
        )

    def test_work(self, engine: Engine, valkey: Valkey, tmp_path: Path) -> None:
        enqueued = self.call(tmp_path, valkey.url, "enqueue", "order", "42", "--in", "5m")
        assert (enqueued.returncode, enqueued.stderr) == (0, "")
        assert enqueued.stdout == "order/42: scheduled in 5 min\n"
        assert engine.is_scheduled(engine.ref("order", "42"))
        assert self.call(tmp_path, valkey.url, "show", "order", "43").returncode == 1
        assert self.call(tmp_path, valkey.url, "pause", "oder").returncode == 2

    def test_the_index_does_not_answer(self, tmp_path: Path) -> None:
        url = f"redis://user:s3cret@127.0.0.1:{free_port()}/0"
        listed = self.call(tmp_path, url, "list")
        assert listed.returncode == 3
        assert listed.stdout == ""
        assert listed.stderr.startswith("Error: the index did not answer: ConnectionError: ")
        assert "(redis://user:**@127.0.0.1" in listed.stderr
        assert "s3cret" not in listed.stderr
        assert len(listed.stderr.splitlines()) == 1


class TestHostileText:
    """An id or an error may hold anything that its author could think of. A terminal must not obey it."""

    ID, ESCAPED = "\u202e24", r"\u202e24"
    ERROR = "ValueError: \x1b]0;owned\x07\x1b[2J \x9b31m \u202ekcab \ud83d!".encode(
        "utf-8", "replace"
    ).decode()

    @pytest.fixture
    def goalstate(self, engine: Engine, goalstate: Command) -> Command:
        """With one quarantined entity, as an older release stored its error."""
        engine.enqueue(engine.ref("order", self.ID))
        evaluate(engine, self.ID, Verdict.QUARANTINED, error=self.ERROR)
        return goalstate

    @pytest.mark.parametrize(
        "command",
        [
            ("list", "--kind", "order"),
            ("list", "--kind", "order", "--json"),
            ("show", "order", ID),
            ("show", "order", ID, "--json"),
            ("enqueue", "order", ID),
            ("enqueue", "order", ID, "--json"),
            ("delete", "order", ID),
            ("delete", "order", ID, "--json"),
            ("show", "parcel", ID),
            ("delete", "parcel", ID),
        ],
        ids=" ".join,
    )
    def test_it_is_shown_and_not_obeyed(self, goalstate: Command, command: tuple[str, ...]) -> None:
        result = goalstate(*command)
        assert result.output.replace("\n", "").isprintable(), ascii(result.output)
        assert self.ESCAPED in result.output

    def test_for_machines_it_is_what_it_was(self, goalstate: Command) -> None:
        [listed] = json.loads(goalstate("list", "--kind", "order", "--json").stdout)
        assert (listed["id"], listed["error"]) == (self.ID, self.ERROR)
        [enqueued] = json.loads(goalstate("enqueue", "order", self.ID, "--json").stdout)
        assert enqueued["entity"] == f"order/{self.ID}"
