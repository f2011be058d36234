"""CORE 2: the dedupe index, in memory and on Redis. See `base`."""

from __future__ import annotations

import importlib
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

# By name: this package has a module `redis` of its own.
from redis import VERSION, Redis, RedisCluster, Sentinel
from redis import __version__ as redis_py
from redis import exceptions as errors
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode
from redis.connection import parse_url
from redis.credentials import CredentialProvider
from redis.retry import Retry

from celery_goalstate.exceptions import ImproperlyConfigured
from celery_goalstate.index.base import Index, Limits
from celery_goalstate.index.cluster import REDIS_ERRORS
from celery_goalstate.index.memory import MemoryIndex
from celery_goalstate.index.redis import RedisIndex, in_our_words
from celery_goalstate.index.url import safe_url, without_credentials, without_option

#: Seconds to wait for a connection, if `index_timeout` allows for so many: a server that is there is quick.
CONNECT_TIMEOUT = 2.0

#: The release of redis-py that sentinels and clusters need. One server can do with any that kombu takes.
REDIS_PY = 8

#: A thread or greenlet that talks to the index has a connection meanwhile. redis-py's own bound (100) would
#: fail the next one, as if the index were away. `?max_connections=` in the URL sets another.
MAX_CONNECTIONS = 10_000


class IndexSettings(Protocol):
    """What an index has to know of the settings; times in seconds."""

    @property
    def index_url(self) -> str: ...
    @property
    def namespace(self) -> str: ...
    @property
    def key_prefix(self) -> str: ...
    @property
    def shards(self) -> int: ...
    @property
    def eta_horizon(self) -> float: ...
    @property
    def lease(self) -> float: ...
    @property
    def resend_after(self) -> float: ...
    @property
    def window(self) -> int: ...
    @property
    def history(self) -> int: ...
    @property
    def metrics(self) -> bool: ...
    @property
    def index_timeout(self) -> float: ...
    @property
    def index_credentials(self) -> str | None: ...


def limits_of(settings: IndexSettings) -> Limits:
    """The part of the settings that an index has to know."""
    return Limits(
        eta_horizon=round(settings.eta_horizon * 1000),
        lease=round(settings.lease * 1000),
        resend_after=round(settings.resend_after * 1000),
        window=settings.window,
        history=settings.history,
        metrics=settings.metrics,
    )


def open_index(settings: IndexSettings) -> Index:
    """The index that the settings name. Connects when it is first used.

    But for a cluster, which is asked for its nodes at once: that may raise `IndexUnavailable`.
    """
    limits = limits_of(settings)
    if settings.index_url == "memory://":
        return MemoryIndex(limits)
    try:
        client = _client(settings.index_url, settings.index_timeout, settings.index_credentials)
    except ValueError as error:  # redis-py's, of an option
        raise ImproperlyConfigured(
            f"the index's URL {safe_url(settings.index_url)!r} cannot be used: {error}"
        ) from error
    return RedisIndex(
        client,
        limits,
        namespace=settings.namespace,
        key_prefix=settings.key_prefix,
        shards=settings.shards,
    )


def _client(url: str, timeout: float, credentials: str | None) -> Redis | RedisCluster:
    # The client repeats nothing by itself: the transitions are safe to repeat (see `base`).
    options: dict[str, Any] = {
        "retry": Retry(NoBackoff(), 0),
        "decode_responses": True,
        "socket_timeout": timeout,
        "socket_connect_timeout": min(CONNECT_TIMEOUT, timeout),
        "max_connections": MAX_CONNECTIONS,
    }
    url, of_url = without_option(url, "credential_provider")
    if path := credentials or of_url:
        options["credential_provider"] = _credential_provider(path)
        url = without_credentials(url)
    scheme = urlsplit(url).scheme
    if scheme in {"redis", "rediss", "unix"}:
        return _usable(Redis.from_url(url, **options))
    if VERSION[0] < REDIS_PY:
        raise ImproperlyConfigured(
            f"an index at {scheme}:// needs redis-py {REDIS_PY} or later, and this is {redis_py}: before,"
            " sentinels' errors show passwords, and a cluster's silent nodes hold up all others"
        )
    return _cluster(url, options) if scheme.endswith("+cluster") else _sentinel_master(url, options)


def _credential_provider(path: str) -> CredentialProvider:
    """The object that logs in with passwords which change, as kombu makes it for the broker."""
    module, _, name = path.rpartition(".")
    try:
        provider = getattr(importlib.import_module(module), name)()
    except Exception as error:
        raise ImproperlyConfigured(
            f"the index's credential provider {path!r} cannot be made: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(provider, CredentialProvider):
        raise ImproperlyConfigured(
            f"the index's credential provider {path!r} is no redis.credentials.CredentialProvider"
        )
    return provider


def _usable(client: Redis) -> Redis:
    """The client, if this redis-py knows the options of its URL. Raises `ValueError`."""
    pool = client.connection_pool
    try:
        pool.connection_class(**pool.connection_kwargs)  # which does not connect
    except (TypeError, errors.RedisError) as error:
        raise ValueError(f"redis-py {redis_py} says: {error}") from error
    return client


def _cluster(url: str, options: dict[str, Any]) -> RedisCluster:
    """`redis+cluster://[user:password@]host:port[;redis+cluster://host:port...][?options]`.

    Any of these nodes knows all the others.
    """
    open_node: Any = ClusterNode  # untyped in redis-py
    first, *others = [urlsplit(part) for part in url.split(";")]
    query = "&".join(part.query for part in (first, *others) if part.query)
    try:
        client = RedisCluster.from_url(
            first._replace(scheme=first.scheme.removesuffix("+cluster"), query=query).geturl(),
            startup_nodes=[open_node(part.hostname or "localhost", part.port or 6379) for part in others],
            # A slot without a node is an error for its own keys only.
            require_full_coverage=False,
            # While it is opened, it asks a node of its choice, and if that does not answer, another.
            **{**options, "retry": Retry(NoBackoff(), 3)},
        )
    except REDIS_ERRORS as error:
        raise in_our_words(error) from error
    client.set_retry(options["retry"])
    return client


def _sentinel_master(url: str, options: dict[str, Any]) -> Redis:
    """`sentinel://[user:password@]host:port[/db][;sentinel://...]?master_name=...`, as kombu has it.

    The credentials are those of the Redis server; those of the sentinels go by `sentinel_password`.
    `rediss+sentinel://` uses TLS with both, by the same `ssl_...` options.
    """
    parts = [urlsplit(part) for part in url.split(";")]
    query = dict(parse_qsl("&".join(part.query for part in parts)))
    master_name = query.pop("master_name")
    sentinel_password = query.pop("sentinel_password", None)
    first = parts[0]
    # All other options of the URL are read by redis-py's own parser.
    parse: Any = parse_url  # untyped in redis-py
    parsed = parse(urlunsplit(("redis", "localhost", first.path, urlencode(query), "")))
    del parsed["host"]
    if first.scheme == "rediss+sentinel":
        parsed["ssl"] = True
    open_sentinel: Any = Sentinel  # untyped in redis-py
    sentinel = open_sentinel(
        [(part.hostname or "localhost", part.port or 26379) for part in parts],
        sentinel_kwargs={
            **{name: value for name, value in parsed.items() if name.startswith("ssl")},
            "password": sentinel_password,
            "retry": options["retry"],
            # They are asked one after the other, until one answers.
            "socket_timeout": options["socket_timeout"] / len(parts),
            "socket_connect_timeout": options["socket_connect_timeout"] / len(parts),
        },
    )
    credentials = {
        name: unquote(value)
        for name, value in (("username", first.username), ("password", first.password))
        if value
    }
    master: Redis = sentinel.master_for(master_name, **{**options, **parsed, **credentials})
    return master


__all__ = ["limits_of", "open_index"]
