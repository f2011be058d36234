"""Whatever is given as an id, a deadline, a setting or a command line: refused, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from celery import Celery
from celery.bin.base import CLIContext
from celery.contrib.testing.worker import start_worker
from celery.signals import task_postrun
from click.testing import CliRunner
from kombu.utils.uuid import uuid

from celery_goalstate import Engine, Entity, Rules, Status, cli
from celery_goalstate.exceptions import GoalStateError, ImproperlyConfigured
from celery_goalstate.index.base import Claim, Report, Verdict
from celery_goalstate.settings import REFUSED_TASK_OPTIONS, Settings
from tests.hostile import fuzz
from tests.servers import Valkey, poll

#: Messages that are put into the queue together.
TOGETHER = 25

REFUSED = (ValueError, TypeError, GoalStateError)


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    with Valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def engine(valkey: Valkey) -> Iterator[Engine]:
    """With entities in all statuses: there is something that could be changed."""
    app = Celery(uuid(), broker="memory://", set_as_current=False)
    app.conf.update(
        task_default_queue=app.main,
        broker_transport_options={"polling_interval": 0.001},
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        goalstate_index_url=valkey.url,
        # What is in the index stays as it is, however long the test takes.
        goalstate_lease=10**6,
        goalstate_resend_after=10**6,
    )
    engine = Engine(app)

    @engine.register
    class Order(Entity):
        rules = Rules({})

        @classmethod
        def iter_unconverged(cls) -> list[str]:
            return ["1", "2"]

    fill(engine)
    yield engine
    app.close()
    with valkey.client() as client:
        client.flushall()


def fill(engine: Engine) -> None:
    """One entity in each status, named after it."""
    index = engine.parts.index
    for name in ("sent", "running", "idle", "failed"):
        engine.enqueue(engine.ref("order", name))
        [record] = index.describe("order", [name])
        assert record
        if name != "sent":
            [claim] = index.claim("order", [(name, record.token)], nonce=uuid(), task_id=uuid())
            assert isinstance(claim, Claim)
            if name != "running":
                verdict = Verdict.DONE if name == "idle" else Verdict.QUARANTINED
                index.finish("order", [Report(name, claim.lease, verdict, None)])
    engine.enqueue(engine.ref("order", "parked"), 10**6)
    engine.app.control.purge()


@pytest.fixture
def stored(valkey: Valkey) -> Iterator[Callable[[], Any]]:
    """All that is stored, byte for byte, but for who sweeps and what was counted."""
    with valkey.client() as client:
        dump = client.register_script(
            "local all = {} for _, key in ipairs(redis.call('KEYS', '*')) do"
            " if not string.match(key, ':sweeper$') and not string.match(key, ':metrics$') then"
            " all[#all + 1] = key .. redis.sha1hex(redis.call('DUMP', key)) end end"
            " table.sort(all) return all"
        )
        yield dump


@fuzz.totals
def test_ids(
    engine: Engine, stored: Callable[[], Any], total: int, record_property: Callable[[str, object], None]
) -> None:
    before = stored()

    class Evasive(Entity):
        kind = "evasive"
        rules = Rules({})
        told: Any = None

        def get_id(self) -> Any:
            return self.told

    engine.register(Evasive)

    def spoken(id: Any) -> Any:
        entity = Evasive("fine")
        entity.told = id
        return entity

    calls: list[Callable[[Any], Any]] = [
        lambda id: engine.enqueue(engine.ref("order", id)),
        lambda id: engine.enqueue_many([engine.ref("order", "fine"), spoken(id)]),
        lambda id: engine.enqueue(spoken(id)),
        lambda id: engine.delete(spoken(id)),
        lambda id: engine.describe(spoken(id)),
        engine.enqueue,
        lambda id: engine.delete_many([engine.ref("order", "sent"), id]),
    ]

    def try_one(chosen: tuple[Callable[[Any], Any], Any]) -> None:
        call, id = chosen
        with pytest.raises(REFUSED) as caught:
            call(id)
        assert str(caught.value)
        assert stored() == before

    inputs = st.tuples(st.sampled_from(calls), fuzz.bad_ids)
    record_property("summary", fuzz.fire(total, "ids", inputs, try_one))


@fuzz.totals
def test_deadlines(
    engine: Engine, stored: Callable[[], Any], total: int, record_property: Callable[[str, object], None]
) -> None:
    before = stored()
    entity = engine.ref("order", "parked")
    options = st.one_of(
        *(
            st.fixed_dictionaries({name: values})
            for name, values in {"deadline": fuzz.bad_deadlines, "eta": fuzz.bad_deadlines}.items()
        ),
        st.fixed_dictionaries({"countdown": fuzz.bad_delays}),
        st.fixed_dictionaries({"max_wait": fuzz.bad_delays, "replace": st.booleans()}),
        st.fixed_dictionaries({"deadline": st.just(5), "countdown": st.just(5) | fuzz.bad_delays}),
    )
    calls: list[Callable[..., Any]] = [
        lambda **options: engine.enqueue(entity, **options),
        lambda **options: engine.enqueue_many([entity, engine.ref("order", "new")], **options),
        lambda **options: engine.prepare(entity, **options),
    ]
    bad_calls = st.tuples(st.sampled_from(calls), options) | st.tuples(
        st.just(calls[1]), st.fixed_dictionaries({"spread": fuzz.bad_delays})
    )

    def try_one(chosen: tuple[Callable[..., Any], dict[str, Any]]) -> None:
        call, options = chosen
        with pytest.raises(REFUSED) as caught:
            call(**options)
        assert str(caught.value)
        assert stored() == before

    record_property("summary", fuzz.fire(total, "deadlines", bad_calls, try_one))


DURATIONS = ("failure_retry_delay", "max_retry_delay", "max_run", "resync_every", "idle_ttl")
OF_A_KIND = {
    **dict.fromkeys(DURATIONS, fuzz.bad_delays),
    **dict.fromkeys(("max_failures", "batch_size"), fuzz.bad_counts),
    **dict.fromkeys(("jitter", "respect_backoff", "converge"), fuzz.bad_flags),
}
OF_AN_ENGINE = {
    **OF_A_KIND,
    **dict.fromkeys(("eta_horizon", "lease", "sweep_interval", "resend_after"), fuzz.bad_delays),
    **dict.fromkeys(("shards", "window"), fuzz.bad_counts),
    **dict.fromkeys(("namespace", "key_prefix"), fuzz.bad_names),
    "index_url": fuzz.bad_urls,
}


def one_of(options: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.sampled_from(sorted(options)).flatmap(lambda name: st.fixed_dictionaries({name: options[name]}))


@fuzz.totals
def test_settings(engine: Engine, total: int, record_property: Callable[[str, object], None]) -> None:
    tasks = set(engine.app.tasks)

    class Refused(Entity):
        rules = Rules({})

    def configure(options: dict[str, Any]) -> None:
        conf = {"broker_url": "redis://localhost", **{f"goalstate_{name}": v for name, v in options.items()}}
        Settings.from_conf(conf)

    def register(options: dict[str, Any]) -> None:
        engine.register(**options)(Refused)

    unknown = {f"no_{name}": fuzz.junk.filter(lambda value: value is not None) for name in OF_A_KIND}
    inputs = st.one_of(
        st.tuples(st.just(configure), one_of({**OF_AN_ENGINE, **unknown})),
        st.tuples(st.just(register), one_of({**OF_A_KIND, **unknown})),
        st.tuples(st.just(register), one_of(dict.fromkeys(REFUSED_TASK_OPTIONS, fuzz.junk))),
    )

    def try_one(chosen: tuple[Callable[[dict[str, Any]], None], dict[str, Any]]) -> None:
        call, options = chosen
        with pytest.raises(ImproperlyConfigured) as caught:
            call(options)
        assert next(iter(options)) in str(caught.value)
        assert engine.kinds == ("order",)
        assert set(engine.app.tasks) == tasks

    record_property("summary", fuzz.fire(total, "settings", inputs, try_one))


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)


def but(*prefixes: str) -> st.SearchStrategy[str]:
    return words.filter(lambda word: not word.startswith(prefixes))


def line(*parts: str | st.SearchStrategy[str]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.tuples(*(st.just(part) if isinstance(part, str) else part for part in parts))


commands = sorted(cli.goalstate.commands)
a_kind, an_id = but("order", "-"), fuzz.bad_id_texts.filter(lambda id: not id.startswith("-"))
a_span = words.filter(lambda word: not set(word) <= set("0123456789dhms"))
COMMAND_LINES = st.one_of(
    line(st.sampled_from(["enqueue", "show", "delete"]), "order", an_id),
    line(st.sampled_from(["enqueue", "delete"]), "order", "sent", an_id),
    line(st.sampled_from(["enqueue", "pause", "resume", "resync"]), a_kind),
    line("enqueue", a_kind, words),
    line("delete", "order", st.text("xyz", min_size=1)),  # which nobody knows
    line("enqueue", "order", "sent", st.sampled_from(["--in", "--at"]), a_span),
    line("enqueue", "order", "sent", "--in", st.integers(10**11).map("{}d".format)),
    line("enqueue", "order", "sent", "--in", "5m", "--at", "2099-01-31T07:30Z", words),
    line("resync", "order", "--spread", a_span),
    line("list", "--limit", words.filter(lambda word: not word.isdecimal())),
    line("list", st.sampled_from(["--status", "--kind"]), but(*Status, "order")),
    line(but(*commands, "-"), words),
    line(st.sampled_from(commands), words.map("--x{}".format)),
    line("--namespace", words, "list"),
)


@fuzz.totals
def test_command_lines(
    engine: Engine, stored: Callable[[], Any], total: int, record_property: Callable[[str, object], None]
) -> None:
    before = stored()
    context = CLIContext(app=engine.app, no_color=True, workdir=None)

    def try_one(arguments: tuple[str, ...]) -> None:
        result = CliRunner().invoke(cli.goalstate, list(arguments), obj=context)
        assert isinstance(result.exception, SystemExit), (result.exception, result.output)
        assert result.exit_code in {1, 2}, result.output
        assert "Traceback" not in result.output
        assert stored() == before

    record_property("summary", fuzz.fire(total, "command lines", COMMAND_LINES, try_one))


@pytest.mark.usefixtures("logging_as_it_was")
@fuzz.totals
def test_messages(
    engine: Engine, stored: Callable[[], Any], total: int, record_property: Callable[[str, object], None]
) -> None:
    """By way of a worker's consumer, in this process."""
    app = engine.app
    ended: set[str] = set()

    def note(task_id: str, **_: Any) -> None:
        ended.add(task_id)

    def last(id: str) -> dict[str, Any]:
        """One that is well-formed, but for a token that nobody was given."""
        headers = {"task": "goalstate.order", "id": id, "lang": "py"}
        return fuzz.message(json.dumps([[[["sent", "1"]]], {}, {}]).encode(), headers)

    task_postrun.connect(note)
    try:
        with (
            start_worker(
                app, pool="solo", perform_ping_check=False, shutdown_timeout=10, loglevel="CRITICAL"
            ),
            app.connection_for_write() as connection,
            connection.channel() as channel,
        ):
            engine._open_sweeper("first").prepare()
            before = stored()

            waiting: list[dict[str, Any]] = []

            def deliver() -> None:
                id = uuid()
                for each in (*waiting, last(id)):
                    channel._put(app.main, each)
                poll(f"the worker goes on after one of {waiting}", lambda: id in ended, timeout=60)
                assert stored() == before
                waiting.clear()

            def try_one(message: dict[str, Any]) -> None:
                waiting.append(message)
                if len(waiting) == TOGETHER:
                    deliver()

            told = fuzz.fire(total, "messages", fuzz.messages(), try_one)
            deliver()
            record_property("summary", told)
    finally:
        task_postrun.disconnect(note)
