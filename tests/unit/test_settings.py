from __future__ import annotations

import dataclasses
import ssl
from datetime import timedelta
from types import ModuleType
from typing import Any

import pytest
import redis
from celery import Celery

from celery_goalstate.backoff import Backoff
from celery_goalstate.exceptions import ImproperlyConfigured
from celery_goalstate.index.url import safe_url
from celery_goalstate.settings import (
    NAME,
    REFUSED_TASK_OPTIONS,
    ROUTING_OPTIONS,
    TASK_OPTIONS,
    KindKeywords,
    KindOptions,
    RoutingKeywords,
    Settings,
)
from tests.versions import CELERY

MEMORY = {"goalstate_index_url": "memory://"}

# The options of a kind ---------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_docs() -> None:
    assert KindOptions() == KindOptions(
        failure_retry_delay=10,
        max_retry_delay=3600,
        jitter=True,
        max_failures=None,
        respect_backoff=False,
        converge=True,
        resync_every=None,
        idle_ttl=604_800,
        max_run=3600,
        task_options={},
    )


@pytest.mark.parametrize(("lease", "seconds"), [(30.0, 1.0), (10.0, 1.0), (2.0, 0.2)])
def test_a_sweep_waits_for_a_second_or_a_tenth_of_a_lease(lease: float, seconds: float) -> None:
    assert Settings(index_url="memory://", lease=lease).sweep_timeout == seconds


def test_an_option_takes_the_place_of_its_default() -> None:
    options = KindOptions(max_failures=3).override(failure_retry_delay=timedelta(minutes=1), converge=False)
    assert options == KindOptions(max_failures=3, failure_retry_delay=60.0, converge=False)


def test_the_backoff_follows_the_options() -> None:
    options = KindOptions(failure_retry_delay=1, max_retry_delay=60, jitter=False)
    assert options.backoff == Backoff(first=1, ceiling=60, jitter=False)


def test_celery_task_options_are_passed_on_unchanged() -> None:
    options = KindOptions().override(queue="orders", soft_time_limit=30, rate_limit="10/s", max_failures=5)
    assert options.task_options == {"queue": "orders", "soft_time_limit": 30, "rate_limit": "10/s"}
    assert options.max_failures == 5
    assert options.override(queue="other").task_options["soft_time_limit"] == 30


def test_where_a_message_goes_is_told_apart_from_what_the_task_is() -> None:
    options = KindOptions().override(queue="orders", priority=3, time_limit=60)
    assert options.routing == {"queue": "orders", "priority": 3}
    assert options.of_task == {"time_limit": 60}


def test_celery_knows_every_task_option_that_is_accepted() -> None:
    task = Celery("options", set_as_current=False).Task
    known = {name for name in TASK_OPTIONS if hasattr(task, name)}
    if CELERY < (5, 7):
        known |= {"acks_on_failure", "acks_on_timeout"}  # refused there when a kind is registered
    assert TASK_OPTIONS - known <= ROUTING_OPTIONS | {"base"}  # `base` is an argument of the decorator
    assert not TASK_OPTIONS & REFUSED_TASK_OPTIONS.keys()


def test_type_checkers_know_what_is_accepted() -> None:
    """`register(**options: Unpack[KindKeywords])`: an editor sees a typo in a keyword, or a wrong type."""
    of_kinds = {field.name for field in dataclasses.fields(KindOptions) if field.metadata}
    assert KindKeywords.__optional_keys__ == of_kinds | TASK_OPTIONS
    assert not KindKeywords.__required_keys__
    assert RoutingKeywords.__optional_keys__ == ROUTING_OPTIONS
    for name in of_kinds:
        KindOptions().override(**{name: getattr(KindOptions(), name)})


@pytest.mark.parametrize("name", sorted(REFUSED_TASK_OPTIONS))
def test_what_would_break_the_task_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(
        ImproperlyConfigured, match=f"{name}='x' cannot be given: {REFUSED_TASK_OPTIONS[name]}"
    ):
        KindOptions().override(**{name: "x"})


@pytest.mark.parametrize(
    ("name", "meant"),
    [("max_failure", "max_failures"), ("queu", "queue"), ("softtime_limit", "soft_time_limit")],
)
def test_an_unknown_option_is_refused_with_a_guess_and_the_list(name: str, meant: str) -> None:
    with pytest.raises(
        ImproperlyConfigured, match=f"unknown option {name}=1. Did you mean {meant}?"
    ) as raised:
        KindOptions().override(**{name: 1})
    assert "idle_ttl" in str(raised.value)
    assert "routing_key" in str(raised.value)


def test_task_options_is_no_option_itself() -> None:
    with pytest.raises(ImproperlyConfigured, match="unknown option task_options"):
        KindOptions().override(task_options={"name": "x"})


SECONDS = [0, -1, float("nan"), float("inf"), True, "10", 1_764_000_000, timedelta(0)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("failure_retry_delay", value) for value in [*SECONDS, None]],
        *[("max_retry_delay", value) for value in [*SECONDS, None]],
        *[("max_run", value) for value in [*SECONDS, None]],
        *[("resync_every", value) for value in SECONDS],
        ("idle_ttl", -1),
        ("idle_ttl", "week"),
        ("max_failures", 0),
        ("max_failures", 1.5),
        ("max_failures", True),
        ("jitter", 1),
        ("jitter", None),
        ("converge", "yes"),
        ("respect_backoff", 0),
    ],
)
def test_a_value_that_cannot_work_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ImproperlyConfigured) as raised:
        KindOptions().override(**{name: value})
    assert str(raised.value).startswith(f"{name} is {value!r}; accepted: ")

    with pytest.raises(ImproperlyConfigured) as raised:
        Settings.from_conf({**MEMORY, f"goalstate_{name}": value})
    assert str(raised.value).startswith(f"goalstate_{name} is {value!r}; accepted: ")


@pytest.mark.parametrize("name", ["max_failures", "resync_every", "idle_ttl"])
def test_none_is_a_value_where_the_docs_say_so(name: str) -> None:
    assert getattr(KindOptions().override(**{name: None}), name) is None


# The settings of an engine -----------------------------------------------------------------------


def test_without_settings_the_defaults_hold() -> None:
    settings = Settings.from_conf(MEMORY)
    assert settings == Settings(
        index_url="memory://",
        namespace="default",
        key_prefix="gs",
        shards=1,
        eta_horizon=30.0,
        lease=30.0,
        sweep_interval=1.0,
        resend_after=60.0,
        window=10_000,
        index_timeout=5.0,
        broker_timeout=5.0,
        keep_client=True,
        index_credentials=None,
        history=10,
        metrics=True,
        enqueue_in_transaction="warn",
        flower_url=None,
        kind=KindOptions(),
    )


def test_settings_are_read_from_the_conf() -> None:
    settings = Settings.from_conf(
        {
            **MEMORY,
            "goalstate_shards": 4,
            "goalstate_lease": timedelta(seconds=90),
            "goalstate_eta_horizon": 0,
            "goalstate_failure_retry_delay": 1,
            "goalstate_idle_ttl": None,
            "task_default_queue": "celery",
        }
    )
    assert (settings.shards, settings.lease, settings.eta_horizon) == (4, 90.0, 0.0)
    assert settings.kind == KindOptions(failure_retry_delay=1.0, idle_ttl=None)


def test_a_given_namespace_wins_over_the_setting() -> None:
    conf = {**MEMORY, "goalstate_namespace": "shop"}
    assert Settings.from_conf(conf).namespace == "shop"
    assert Settings.from_conf(conf, namespace="depot").namespace == "depot"
    with pytest.raises(ImproperlyConfigured, match="namespace is 'De pot'; accepted: lower-case letters"):
        Settings.from_conf(conf, namespace="De pot")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("namespace", ""),
        ("namespace", "Shop"),
        ("namespace", "a:b"),
        ("namespace", "a}b"),
        ("namespace", "shop\n"),
        ("namespace", None),
        ("key_prefix", "g s"),
        ("shards", 0),
        ("shards", "4"),
        ("shards", None),
        ("window", 0),
        ("lease", 0),
        ("eta_horizon", -1),
        ("sweep_interval", 0),
        ("resend_after", "1m"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ImproperlyConfigured) as raised:
        Settings.from_conf({**MEMORY, f"goalstate_{name}": value})
    assert str(raised.value).startswith(f"goalstate_{name} is {value!r}; accepted: ")


def test_an_unknown_setting_is_refused_with_a_guess() -> None:
    with pytest.raises(
        ImproperlyConfigured, match=r"unknown setting goalstate_leese\. Did you mean goalstate_lease\?"
    ):
        Settings.from_conf({**MEMORY, "goalstate_leese": 30})


@pytest.mark.parametrize("name", ["order", "a", "web-017", "a.b_c", "0"])
def test_names_that_are_accepted(name: str) -> None:
    assert NAME("kind", name) == name


def test_the_password_of_the_index_is_not_shown() -> None:
    settings = Settings.from_conf({"goalstate_index_url": "redis://:s3cret@host/0"})
    assert settings.index_url == "redis://:s3cret@host/0"
    assert "s3cret" not in repr(settings)


# From a real Celery app --------------------------------------------------------------------------


def celery_app(**conf: Any) -> Celery:
    app = Celery("shop", set_as_current=False)
    app.conf.update(conf)
    return app


def test_an_app_with_a_redis_broker_needs_no_setting() -> None:
    app = Celery("shop", broker="redis://broker/3", set_as_current=False)
    assert Settings.from_conf(app.conf).index_url == "redis://broker/3"


def test_the_broker_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://from-env/1")
    assert Settings.from_conf(celery_app().conf).index_url == "redis://from-env/1"


def test_settings_of_a_module_with_a_prefix_as_django_projects_have_it() -> None:
    module = ModuleType("project.settings")
    vars(module).update(CELERY_BROKER_URL="redis://broker", CELERY_GOALSTATE_LEASE=12, GOALSTATE_PAGE="mine")
    app = Celery("shop", set_as_current=False)
    app.config_from_object(module, namespace="CELERY")
    assert Settings.from_conf(app.conf).lease == 12.0

    module.CELERY_GOALSTATE_LEESE = 30
    app = Celery("shop", set_as_current=False)
    app.config_from_object(module, namespace="CELERY")
    with pytest.raises(
        ImproperlyConfigured, match=r"CELERY_GOALSTATE_LEESE\. Did you mean goalstate_lease\?"
    ):
        Settings.from_conf(app.conf)


# Where the index is ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conf", "index_url"),
    [
        # What is set wins.
        ({"goalstate_index_url": "redis://index", "broker_url": "redis://broker"}, "redis://index"),
        ({"goalstate_index_url": "redis+cluster://a:7000"}, "redis+cluster://a:7000"),
        ({"goalstate_index_url": "rediss+cluster://a:7000"}, "rediss+cluster://a:7000"),
        (
            {"goalstate_index_url": "redis+cluster://a;redis+cluster://b"},
            "redis+cluster://a;redis+cluster://b",
        ),
        ({"goalstate_index_url": "unix:///run/redis.sock?db=2"}, "unix:///run/redis.sock?db=2"),
        ({"goalstate_index_url": "redis://h", "task_always_eager": True}, "redis://h"),
        ({"goalstate_index_url": "memory://localhost/"}, "memory://"),
        ({"goalstate_index_url": None, "broker_url": "redis://broker"}, "redis://broker"),
        ({"goalstate_index_url": "", "broker_url": "redis://broker"}, "redis://broker"),
        # Within one process.
        ({"task_always_eager": True, "broker_url": "redis://broker"}, "memory://"),
        ({"broker_url": "memory://", "result_backend": "redis://results"}, "memory://"),
        # The broker, else the result backend.
        ({"broker_url": "redis://broker/1", "result_backend": "redis://results"}, "redis://broker/1"),
        ({"broker_url": "amqp://broker", "result_backend": "redis://results/2"}, "redis://results/2"),
        ({"broker_url": "amqp://a;redis://b/0;redis://c/0"}, "redis://b/0"),
        ({"broker_url": ["amqp://a", "rediss://b", "redis://c"]}, "rediss://b"),
        # As Celery spells it.
        ({"broker_url": "redis+socket:///run/redis.sock"}, "unix:///run/redis.sock"),
        (
            {"broker_url": "redis+socket:///run/redis.sock?virtual_host=3"},
            "unix:///run/redis.sock?db=3",
        ),
        (
            {"broker_url": "amqp://a", "result_backend": "rediss://r?ssl_cert_reqs=CERT_NONE"},
            "rediss://r?ssl_cert_reqs=none",
        ),
        (
            {"broker_url": "rediss://r/0?protocol=3&ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs=/ca.pem"},
            "rediss://r/0?protocol=3&ssl_cert_reqs=required&ssl_ca_certs=/ca.pem",
        ),
        ({"broker_url": "rediss://r?ssl_cert_reqs=optional"}, "rediss://r?ssl_cert_reqs=optional"),
        ({"broker_url": "redis://r/1", "broker_use_ssl": True}, "rediss://r/1"),
        ({"broker_url": "redis://r/1", "broker_use_ssl": {"ssl_ca_certs": None}}, "rediss://r/1"),
        (
            {
                "broker_url": "redis://r/1",
                "broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_NONE, "ssl_ca_certs": "/ca.pem"},
            },
            "rediss://r/1?ssl_cert_reqs=none&ssl_ca_certs=%2Fca.pem",
        ),
        (
            {
                "broker_url": "amqp://",
                "result_backend": "redis://r",
                "redis_backend_use_ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED},
            },
            "rediss://r?ssl_cert_reqs=required",
        ),
        # Sentinel needs all of them, and the name of the master.
        (
            {
                "broker_url": "sentinel://a:26379;sentinel://b:26379",
                "broker_transport_options": {"master_name": "main"},
            },
            "sentinel://a:26379;sentinel://b:26379?master_name=main",
        ),
        (
            {
                "broker_url": ["sentinel://:pw@a:1/2", "sentinel://:pw@b:1/2?protocol=3"],
                "broker_transport_options": {"master_name": "main"},
            },
            "sentinel://:pw@a:1/2;sentinel://:pw@b:1/2?protocol=3&master_name=main",
        ),
        (
            {
                "broker_url": "amqp://a",
                "result_backend": "sentinel://a:1/0;sentinel://b:1/0",
                "result_backend_transport_options": {"master_name": "main"},
            },
            "sentinel://a:1/0;sentinel://b:1/0?master_name=main",
        ),
        (
            {"goalstate_index_url": "sentinel://a:1;sentinel://b:1/0?master_name=main"},
            "sentinel://a:1;sentinel://b:1/0?master_name=main",
        ),
    ],
)
def test_where_the_index_is(conf: dict[str, Any], index_url: str) -> None:
    assert Settings.from_conf(conf).index_url == index_url
    assert Settings.from_conf(celery_app(**conf).conf).index_url == index_url


@pytest.mark.parametrize(
    ("conf", "says"),
    [
        ({}, r"neither the broker \(not set\) nor the result backend \(not set\) is Redis. Set e.g. goalst"),
        (
            {"broker_url": "amqp://me:s3cret@rabbit//", "result_backend": "db+postgresql://me:s3cret@db/x"},
            r"broker \(amqp://me:\*\*@rabbit//\) nor the result backend \(db\+postgresql://me:\*\*@db/x\)",
        ),
        (
            {"goalstate_index_url": "http://:s3cret@host"},
            r"'http://:\*\*@host'; accepted are the schemes redis",
        ),
        ({"goalstate_index_url": "localhost:6379"}, "accepted are the schemes redis"),
        ({"goalstate_index_url": 6379}, "of type int; give a URL"),
        ({"goalstate_index_url": "redis://:s3cret/x@host"}, r"'redis://:\*\*@host', which is no valid URL"),
        ({"goalstate_index_url": "redis://host:port"}, "no valid URL"),
        ({"goalstate_index_url": "redis://:12?s3cret=s3cret@host"}, "no valid URL"),
        (
            {"goalstate_index_url": "redis://:s3cret@host?socket_timeot=3"},
            r"socket_timeot=3'; redis:// has no option 'socket_timeot'\. Did you mean socket_timeout\?",
        ),
        ({"goalstate_index_url": "redis://host?ssl_ca_certs=/ca.pem"}, "no option 'ssl_ca_certs'"),
        ({"goalstate_index_url": "unix:///s?socket_keepalive=1"}, "unix:// has no option 'socket_keepalive'"),
        (
            {"goalstate_index_url": "sentinel://a?master_name=m;sentinel://b?nonsense=1"},
            "sentinel:// has no option 'nonsense'",
        ),
        ({"goalstate_index_url": "redis+cluster://a?db=1"}, r"redis\+cluster:// has no option 'db'"),
        ({"broker_url": "redis://host?heartbeat=10"}, "broker_url is .* has no option 'heartbeat'"),
        ({"goalstate_index_url": "redis://:s3cret@a;redis://b"}, "only by sentinel, rediss\\+sentinel"),
        ({"goalstate_index_url": "sentinel://a;redis://b"}, "accepted are the schemes"),
        ({"goalstate_index_url": "sentinel://:s3cret@a:1"}, "does not name its master; append"),
        ({"goalstate_index_url": "rediss+sentinel://:s3cret@a:1"}, "does not name its master; append"),
        ({"broker_url": "sentinel://a:1"}, "broker_url is 'sentinel://a:1', which does not name its master"),
        (
            {
                "broker_url": "sentinel://a:1",
                "broker_use_ssl": True,
                "broker_transport_options": {"master_name": "m"},
            },
            r"TLS options of broker_url .* goalstate_index_url, to rediss\+sentinel://",
        ),
    ],
)
def test_no_place_for_the_index(conf: dict[str, Any], says: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=says) as raised:
        Settings.from_conf(conf)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("redis://host/0", "redis://host/0"),
        ("redis://user@host/0", "redis://user@host/0"),
        ("redis://:s3cret@host:6379/0", "redis://:**@host:6379/0"),
        ("redis://user:s3cret@host/0", "redis://user:**@host/0"),
        ("redis://:s3cr@et/s3c@host/0", "redis://:**@host/0"),
        ("redis://:s3?cret;s3cret@host", "redis://:**@host"),
        ("redis://host?password=s3cret&db=1", "redis://host?password=**&db=1"),
        ("redis://host?db=1&sentinel_password=s3cret", "redis://host?db=1&sentinel_password=**"),
        ("unix://:s3cret@/run/redis.sock", "unix://:**@/run/redis.sock"),
        ("sentinel://:s3cret@a:1;sentinel://u:s3cret@b:1", "sentinel://:**@a:1;sentinel://u:**@b:1"),
        ("sentinel://a:1?password=s3cret;sentinel://b", "sentinel://a:1?password=**;sentinel://b"),
        (":s3cret@host", ":**@host"),
        ("", ""),
    ],
)
def test_a_safe_url_shows_no_password(url: str, safe: str) -> None:
    assert safe_url(url) == safe
    assert "s3c" not in safe_url(url)


@pytest.mark.parametrize("verify", ["CERT_NONE", "cert_required", "optional"])
def test_redis_py_understands_the_url_of_a_broker_over_tls(verify: str) -> None:
    url = Settings.from_conf({"broker_url": f"rediss://broker/1?ssl_cert_reqs={verify}"}).index_url
    connection = redis.Redis.from_url(url).connection_pool.make_connection()
    assert isinstance(connection, redis.SSLConnection)
    assert connection.cert_reqs is ssl.VerifyMode[f"CERT_{verify.upper().removeprefix('CERT_')}"]
