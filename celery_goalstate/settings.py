"""What can be configured: `goalstate_*` in `app.conf`, and the options of `Engine.register`.

Everything is parsed and checked once, here, and frozen. Wherever a time is meant it is in seconds, and may
be given as a number or a timedelta.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypedDict

from celery_goalstate.backoff import Backoff, delay_seconds
from celery_goalstate.display import did_you_mean
from celery_goalstate.exceptions import ImproperlyConfigured
from celery_goalstate.index.url import EXAMPLE, checked_url, query_of, safe_url, scheme_of, with_query

if TYPE_CHECKING:
    from celery import Task
    from kombu import Exchange, Queue

# What is accepted --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Check:
    """How a value is read (`parse` raises `ValueError` or `TypeError`), and in words what is accepted."""

    accepted: str
    parse: Callable[[Any], Any]

    def __call__(self, name: str, value: Any) -> Any:
        try:
            return self.parse(value)
        except (TypeError, ValueError) as error:
            raise ImproperlyConfigured(f"{name} is {value!r}; accepted: {self.accepted}") from error


def _parse_seconds(minimum: float) -> Callable[[Any], float]:
    def parse(value: Any) -> float:
        seconds = delay_seconds(value)
        if seconds < minimum:
            raise ValueError(value)
        return seconds

    return parse


def _parse_positive_int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(value)
    return value


def _parse_count(value: Any) -> int:
    return 0 if value == 0 and isinstance(value, int) else _parse_positive_int(value)


def _parse_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value


_IN_A_NAME = re.compile(r"[a-z0-9_.-]+")


def _parse_name(value: Any) -> str:
    if not isinstance(value, str) or not _IN_A_NAME.fullmatch(value):
        raise ValueError(value)
    return value


def _parse_dotted_path(value: Any) -> str:
    if not isinstance(value, str) or not all(map(str.isidentifier, value.split("."))) or "." not in value:
        raise ValueError(value)
    return value


def _parse_web_address(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith(("http://", "https://")):
        raise ValueError(value)
    return value


def _parse_one_of(*choices: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(value)
        return str(value)

    return parse


def _or_none(check: _Check) -> _Check:
    return _Check(f"{check.accepted}, or None", lambda value: None if value is None else check.parse(value))


# The index counts in milliseconds, so a shorter time would be none.
_DURATION = _Check("seconds, 0.001 or more (a number or a timedelta)", _parse_seconds(0.001))
_LEASE = _Check("seconds, 1 or more (a number or a timedelta)", _parse_seconds(1.0))
_DURATION_OR_ZERO = _Check("seconds, 0 or more (a number or a timedelta)", _parse_seconds(0))
_COUNT = _Check("an integer, 1 or more", _parse_positive_int)
_COUNT_OR_ZERO = _Check("an integer, 0 or more", _parse_count)
_BOOL = _Check("True or False", _parse_bool)

_DOTTED_PATH = _Check("the dotted path of a class, 'package.module.Class'", _parse_dotted_path)
_WEB_ADDRESS = _Check("an address that begins with http:// or https://", _parse_web_address)
_IN_TRANSACTION = _Check("'warn', 'error' or 'allow'", _parse_one_of("warn", "error", "allow"))

#: Names that end up in index keys and task names: `NAME(what, value)` returns the value, or raises
#: `ImproperlyConfigured`.
NAME = _Check("lower-case letters, digits, '_', '.' and '-', at least one", _parse_name)


def _option(default: Any, check: _Check) -> Any:
    return dataclasses.field(default=default, metadata={"check": check})


def _checks(cls: type) -> dict[str, _Check]:
    """The settable fields of a dataclass, by name."""
    return {
        field.name: field.metadata["check"] for field in dataclasses.fields(cls) if "check" in field.metadata
    }


# The options of a kind ---------------------------------------------------------------------------


class RoutingKeywords(TypedDict, total=False):
    """The options of Celery tasks that say where a wake-up is published."""

    queue: str | Queue
    exchange: str | Exchange
    exchange_type: str
    routing_key: str
    priority: int
    delivery_mode: int | str


class KindKeywords(RoutingKeywords, total=False):
    """What `register` accepts: `KindOptions`, times also as a timedelta, and options of Celery tasks."""

    failure_retry_delay: float | timedelta
    max_retry_delay: float | timedelta
    jitter: bool
    max_failures: int | None
    respect_backoff: bool
    converge: bool
    resync_every: float | timedelta | None
    idle_ttl: float | timedelta | None
    max_run: float | timedelta
    batch_size: int

    acks_late: bool
    acks_on_failure: bool
    acks_on_failure_or_timeout: bool
    acks_on_timeout: bool
    base: type[Task[Any, Any]]
    ignore_result: bool
    rate_limit: str | float | None
    reject_on_worker_lost: bool
    resultrepr_maxsize: int
    send_events: bool
    soft_time_limit: float | None
    store_errors_even_if_ignored: bool
    throws: tuple[type[BaseException], ...]
    time_limit: float | None
    track_started: bool
    trail: bool


#: Celery task options that say where a wake-up is published. Celery deprecates them as attributes of a task
#: class (and warns), so they are given to each publish instead.
ROUTING_OPTIONS = RoutingKeywords.__optional_keys__

#: Celery task options that would break a kind's task, and why.
REFUSED_TASK_OPTIONS: Mapping[str, str] = {
    "name": "the task is named after the kind; set `kind` on the entity class",
    **dict.fromkeys(
        ("bind", "typing", "pydantic", "pydantic_strict", "pydantic_context", "pydantic_dump_kwargs"),
        "the task's arguments are the engine's own",
    ),
    **dict.fromkeys(("shared", "lazy", "filter"), "the engine itself creates the task, on its app"),
    "serializer": "wake-ups are JSON",
    "compression": "a wake-up is too small to gain from it",
    **dict.fromkeys(("expires", "countdown", "eta"), "the deadline is an argument of enqueue"),
    **dict.fromkeys(
        ("autoretry_for", "dont_autoretry_for", "retry_kwargs", "default_retry_delay"),
        "the engine retries after any failure but a PermanentError; see failure_retry_delay",
    ),
    **dict.fromkeys(
        ("retry_backoff", "retry_backoff_max", "retry_jitter"),
        "the back-off is the engine's; see failure_retry_delay, max_retry_delay and jitter",
    ),
    "max_retries": "see max_failures",
    "retry_on_worker_lost": "the engine itself retries when a worker was lost",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KindOptions:
    """How the entities of one kind are evaluated; times in seconds."""

    failure_retry_delay: float = _option(10.0, _DURATION)  #: after the first failure; doubles from there
    max_retry_delay: float = _option(3600.0, _DURATION)  #: the ceiling of the doubling
    jitter: bool = _option(True, _BOOL)  #: spread each of these delays over its upper half
    max_failures: int | None = _option(None, _or_none(_COUNT))  #: in a row, then quarantine; None: never
    respect_backoff: bool = _option(False, _BOOL)  #: an enqueue cannot come before the back-off
    converge: bool = _option(True, _BOOL)  #: go on until the goal is reached
    resync_every: float | None = _option(None, _or_none(_DURATION))  #: None: only when asked to
    idle_ttl: float | None = _option(604_800.0, _or_none(_DURATION_OR_ZERO))  #: None: until it is deleted
    max_run: float = _option(3600.0, _DURATION)  #: how long an evaluation's lease is renewed
    batch_size: int = _option(1, _COUNT)  #: entities that one message and one task may carry under load
    task_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  #: see `TASK_OPTIONS`

    @property
    def backoff(self) -> Backoff:
        """The delays between consecutive failures."""
        return Backoff(self.failure_retry_delay, self.max_retry_delay, self.jitter)

    @property
    def routing(self) -> Mapping[str, Any]:
        """The task options that go with each publish."""
        with_publish = ROUTING_OPTIONS | {"ignore_result"}
        return {name: value for name, value in self.task_options.items() if name in with_publish}

    @property
    def of_task(self) -> Mapping[str, Any]:
        """The task options that make the Celery task what it is."""
        return {name: value for name, value in self.task_options.items() if name not in ROUTING_OPTIONS}

    def override(self, **options: Any) -> KindOptions:
        """These options with others in their place, as given to `register`.

        Raises `ImproperlyConfigured` for a value that cannot work and for a refused or unknown option.
        """
        checks = _checks(KindOptions)
        own: dict[str, Any] = {}
        task_options = dict(self.task_options)
        for name, value in options.items():
            if name in checks:
                own[name] = checks[name](name, value)
            elif name in TASK_OPTIONS:
                task_options[name] = value
            elif name in REFUSED_TASK_OPTIONS:
                raise ImproperlyConfigured(f"{name}={value!r} cannot be given: {REFUSED_TASK_OPTIONS[name]}")
            else:
                raise ImproperlyConfigured(
                    f"unknown option {name}={value!r}.{did_you_mean(name, {*checks, *TASK_OPTIONS})}"
                    f" Accepted: {', '.join(checks)};"
                    f" of Celery's task options {', '.join(sorted(TASK_OPTIONS))}"
                )
        overridden = dataclasses.replace(self, task_options=task_options, **own)
        base = task_options.get("base")
        for name in TIME_LIMITS:
            refuse_limit_of_batch(
                name, task_options.get(name, getattr(base, name, None)), overridden.batch_size
            )
        return overridden


TIME_LIMITS = ("soft_time_limit", "time_limit")


def refuse_limit_of_batch(name: str, limit: float | None, batch_size: int) -> None:
    """Raise `ImproperlyConfigured` for one of Celery's time limits on the task of a kind that has batches."""
    if limit and batch_size > 1:
        raise ImproperlyConfigured(
            f"{name}={limit!r} and batch_size={batch_size} cannot go together: Celery's limits are of a task,"
            " which the entities of a batch share, so one would be interrupted for what others took. Bound"
            " each evaluation by ActionList(..., timeout=...), or set batch_size=1"
        )


#: All Celery task options that `register` accepts and passes on unchanged.
TASK_OPTIONS = KindKeywords.__optional_keys__ - _checks(KindOptions).keys()


# The settings of an engine -----------------------------------------------------------------------

_MISSING = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one engine; times in seconds."""

    index_url: str = dataclasses.field(repr=False)  #: may hold a password; see `safe_url`
    namespace: str = _option("default", NAME)  #: keeps engines on one index apart
    key_prefix: str = _option("gs", NAME)  #: of every key in the index
    shards: int = _option(1, _COUNT)  #: per kind
    eta_horizon: float = _option(30.0, _DURATION_OR_ZERO)  #: a message is published this long ahead
    lease: float = _option(30.0, _LEASE)  #: after which a worker that fell silent is given up
    sweep_interval: float = _option(1.0, _DURATION)  #: at most; see `sweep_every`
    resend_after: float = _option(60.0, _DURATION)  #: when an overdue message may be lost
    window: int = _option(10_000, _COUNT)  #: messages under way per shard
    index_timeout: float = _option(5.0, _DURATION)  #: the longest wait for a reply of the index
    broker_timeout: float = _option(5.0, _DURATION)  #: the longest wait for a broker that does not answer
    keep_client: bool = _option(True, _BOOL)  #: let the consumer's channel on Redis keep one client
    index_credentials: str | None = _option(None, _or_none(_DOTTED_PATH))  #: of a provider of redis-py's
    history: int = _option(10, _COUNT_OR_ZERO)  #: failures that are kept of an entity; the newest in any case
    metrics: bool = _option(True, _BOOL)  #: count what happens, for monitoring
    # Read by `contrib.django` alone.
    enqueue_in_transaction: str = _option("warn", _IN_TRANSACTION)  #: inside one of the database's
    flower_url: str | None = _option(None, _or_none(_WEB_ADDRESS))  #: for links to Flower
    kind: KindOptions = dataclasses.field(default_factory=KindOptions)  #: the defaults of every kind

    @property
    def sweep_every(self) -> float:
        """How often the sweeper sweeps: often enough to count a lease, whatever the interval."""
        return min(self.sweep_interval, self.lease / 10)

    @property
    def sweep_timeout(self) -> float:
        """The longest wait for index or broker in a sweep, in seconds: the worker stands still meanwhile."""
        return min(1.0, self.lease / 10)

    @classmethod
    def from_conf(cls, conf: Mapping[str, Any], *, namespace: str | None = None) -> Settings:
        """Read `goalstate_*` from a Celery app's `conf`; a `namespace` given here wins over the setting.

        Raises `ImproperlyConfigured` for anything that cannot work, unknown settings included.
        """
        _need_json(conf)
        own, of_kinds = _checks(cls), _checks(KindOptions)
        _refuse_unknown(conf, {"index_url", *own, *of_kinds})

        def read(checks: Mapping[str, _Check]) -> dict[str, Any]:
            given = {name: conf.get(f"goalstate_{name}", _MISSING) for name in checks}
            return {
                name: checks[name](f"goalstate_{name}", value)
                for name, value in given.items()
                if value is not _MISSING
            }

        values = read(own)
        if namespace is not None:
            values["namespace"] = NAME("namespace", namespace)
        return cls(index_url=_find_index_url(conf), kind=KindOptions(**read(of_kinds)), **values)

    def elsewhere(
        self, *, index_url: str | None = None, namespace: str | None = None, key_prefix: str | None = None
    ) -> Settings:
        """These settings for entities that are kept elsewhere. Raises `ImproperlyConfigured`."""
        return dataclasses.replace(
            self,
            index_url=self.index_url if index_url is None else checked_url("the old index", index_url),
            namespace=self.namespace if namespace is None else NAME("the old namespace", namespace),
            key_prefix=self.key_prefix if key_prefix is None else NAME("the old key prefix", key_prefix),
        )


def _need_json(conf: Mapping[str, Any]) -> None:
    """Wake-ups are JSON: an app that accepts none would reject each of them."""
    accepted = conf.get("accept_content")
    if accepted is not None and not {"json", "application/json"}.intersection(accepted):
        raise ImproperlyConfigured(
            f"accept_content is {accepted!r}, and the engine's messages are JSON: workers would reject all of"
            ' them. Add "json" to it'
        )


def _refuse_unknown(conf: Mapping[str, Any], known: set[str]) -> None:
    accepted = sorted(f"goalstate_{name}" for name in known)
    for key in conf:
        # With a namespace (Django's CELERY_) Celery lists all names in the settings module, as spelled there;
        # this package's are those that it finds again without the namespace.
        _, found, rest = key.lower().partition("goalstate_")
        name = found + rest
        if found and name not in accepted and conf.get(name, _MISSING) is not _MISSING:
            raise ImproperlyConfigured(
                f"unknown setting {key}.{did_you_mean(name, accepted)} Accepted: {', '.join(accepted)}"
            )


# Where the index is ------------------------------------------------------------------------------

_CELERY_SCHEMES = {"redis", "rediss", "redis+socket", "unix", "sentinel"}  # of its Redis brokers and backends


def _find_index_url(conf: Mapping[str, Any]) -> str:
    given = conf.get("goalstate_index_url")
    if given:
        if not isinstance(given, str):
            raise ImproperlyConfigured(
                f"goalstate_index_url is of type {type(given).__name__}; give a URL, {EXAMPLE}"
            )
        return checked_url("goalstate_index_url", given)

    broker = _urls(conf, "broker_url")
    if conf.get("task_always_eager") or any(scheme_of(url) == "memory" for url in broker):
        return "memory://"

    backend = _urls(conf, "result_backend")
    return (
        _index_on("broker_url", broker, conf.get("broker_use_ssl"), conf.get("broker_transport_options"))
        or _index_on(
            "result_backend",
            backend,
            conf.get("redis_backend_use_ssl"),
            conf.get("result_backend_transport_options"),
        )
        or _no_index(broker, backend)
    )


def _no_index(broker: list[str], backend: list[str]) -> str:
    raise ImproperlyConfigured(
        "there is no place for the index: neither the broker"
        f" ({safe_url(';'.join(broker)) or 'not set'}) nor the result backend"
        f" ({safe_url(';'.join(backend)) or 'not set'}) is Redis. Set {EXAMPLE}"
    )


def _urls(conf: Mapping[str, Any], name: str) -> list[str]:
    """The URLs of a Celery setting: one, several separated by ";", or a list."""
    # As an attribute Celery's own conf also knows what is set in the environment.
    value = getattr(conf, name, None) or conf.get(name)
    urls = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    return [part.strip() for url in urls if isinstance(url, str) for part in url.split(";") if part.strip()]


def _index_on(setting: str, urls: list[str], use_ssl: Any, transport_options: Any) -> str | None:
    """The index's URL on the first Redis among `urls`, or on all the Sentinels, which are one Redis."""
    url = next((url for url in urls if scheme_of(url) in _CELERY_SCHEMES), None)
    if url is None:
        return None
    if scheme_of(url) == "sentinel":
        if use_ssl:
            raise ImproperlyConfigured(
                f"the TLS options of {setting} ({safe_url(url)}) cannot be used for the index with Sentinel;"
                " set goalstate_index_url, to rediss+sentinel://... if the sentinels speak TLS too"
            )
        url = ";".join(each for each in urls if scheme_of(each) == "sentinel")
        master_name = (transport_options or {}).get("master_name")
        if master_name and "master_name" not in query_of(url):
            url = with_query(url, {"master_name": master_name})
    elif use_ssl and scheme_of(url) in {"redis", "rediss"}:
        url = f"rediss://{url.partition('://')[2]}"
        if isinstance(use_ssl, Mapping):
            given = {name: value for name, value in use_ssl.items() if value is not None}
            url = with_query(url, {name: _tls_value(value) for name, value in given.items()})
    return checked_url(setting, url)


def _tls_value(value: Any) -> str:
    """An option of `broker_use_ssl` for a URL; those given as constants of the `ssl` module go by name."""
    return str(getattr(value, "name", value))
