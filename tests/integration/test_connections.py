"""Connections to the index: as many as there are threads that talk to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis.cluster
from celery import Celery
from redis.credentials import CredentialProvider

from celery_goalstate import Engine
from celery_goalstate.exceptions import ImproperlyConfigured, IndexUnavailable
from celery_goalstate.index import open_index
from celery_goalstate.settings import Settings
from tests.integration.conftest import Truth
from tests.servers import Cluster, Valkey
from tests.versions import needs_redis_py_8

THREADS = 150


@pytest.fixture(params=[Valkey, pytest.param(Cluster, marks=needs_redis_py_8)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    with request.param(tmp_path) as server:
        yield server.url


@pytest.fixture
def describe_at_once(make_app: Callable[..., Any], truth: Truth) -> Callable[[str], Any]:
    def describe_at_once(url: str) -> Any:
        engine = Engine(make_app(goalstate_index_url=url))
        entity = engine.register(truth.entity())
        primaries = engine.parts.index._client
        options = {"target_nodes": "primaries"} if "cluster" in url else {}
        primaries.execute_command("CLIENT", "PAUSE", 500, "ALL", **options)
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(engine.describe, map(entity, range(THREADS))))

    return describe_at_once


def test_many_threads_at_once(url: str, describe_at_once: Callable[[str], Any]) -> None:
    assert describe_at_once(url) == [None] * THREADS


def test_a_bound_of_ones_own(valkey: Valkey, describe_at_once: Callable[[str], Any]) -> None:
    with pytest.raises(IndexUnavailable, match="Too many connections"):
        describe_at_once(f"{valkey.url}?max_connections=20")


@pytest.mark.parametrize(
    "url",
    [
        "redis://nobody?{}",
        pytest.param("sentinel://nobody?master_name=m&{}", marks=needs_redis_py_8),
    ],
)
def test_what_the_url_says_goes_before(url: str) -> None:
    index = open_index(Settings(index_url=url.format("max_connections=7&socket_timeout=2")))
    pool = index._client.connection_pool
    assert pool.max_connections == 7
    assert pool.connection_kwargs["socket_timeout"] == 2


class Tokens(CredentialProvider):
    """Passwords that live for minutes."""

    def get_credentials(self) -> tuple[str, str]:
        return "svc", "of this minute"


TOKENS = f"{__name__}.Tokens"


@pytest.fixture
def with_tokens(tmp_path: Path) -> Iterator[Valkey]:
    """A server that lets in nobody but who has a token."""
    with Valkey(tmp_path) as server:
        with server.client() as admin:
            admin.execute_command("ACL", "SETUSER", "svc", "on", ">of this minute", "~*", "&*", "+@all")
            admin.execute_command("ACL", "SETUSER", "default", "resetpass", ">another")
        yield server


@pytest.mark.parametrize(
    "conf",
    [
        {"broker_url": "{url}?credential_provider=" + TOKENS},
        {"goalstate_index_url": "{url}?credential_provider=" + TOKENS + "&socket_timeout=2"},
        {"goalstate_index_url": "{url}", "goalstate_index_credentials": TOKENS},
        {"goalstate_index_url": "{url_with_password}", "goalstate_index_credentials": TOKENS},
    ],
    ids=["broker's URL", "index's URL", "setting", "instead of a password"],
)
def test_a_credential_provider_logs_in(with_tokens: Valkey, conf: dict[str, str]) -> None:
    urls = {"url": with_tokens.url, "url_with_password": with_tokens.url.replace("//", "//default:no@")}
    app = Celery("shop", broker="amqp://nowhere", set_as_current=False)
    app.conf.update({name: value.format(**urls) for name, value in conf.items()})
    index = Engine(app).parts.index
    index.note(["order"])
    assert index.kinds() == ["order"]
    index.close()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.Tokens", r"'nowhere.Tokens' cannot be made: ModuleNotFoundError"),
        (f"{__name__}.Missing", r"Missing' cannot be made: AttributeError"),
        ("collections.OrderedDict", r"'collections.OrderedDict' is no redis.credentials.CredentialProvider"),
    ],
)
def test_a_credential_provider_that_is_none(path: str, message: str) -> None:
    with pytest.raises(ImproperlyConfigured, match=message):
        open_index(Settings(index_url="redis://nobody", index_credentials=path))


#: Every option of a URL, with a value.
OPTIONS = {
    **dict.fromkeys(("username", "password", "client_name"), "me"),
    **dict.fromkeys(("db", "max_connections", "health_check_interval", "socket_timeout"), "1"),
    **dict.fromkeys(("socket_connect_timeout", "socket_read_size", "socket_keepalive"), "1"),
    "protocol": "3",
    **dict.fromkeys(("ssl_ca_certs", "ssl_ca_data", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"), "file"),
    **dict.fromkeys(("ssl_password", "ssl_ciphers"), "me"),
    "ssl_cert_reqs": "optional",
    "ssl_check_hostname": "false",
    "ssl_min_version": "771",
    **dict.fromkeys(("ssl_include_verify_flags", "ssl_exclude_verify_flags"), "[VERIFY_X509_STRICT]"),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "url",
    [
        "redis://nobody?{}",
        "rediss://nobody?{}",
        "unix:///nowhere?{}",
        pytest.param("sentinel://nobody?master_name=m&{}", marks=needs_redis_py_8),
        pytest.param("rediss+sentinel://nobody?master_name=m&{}", marks=needs_redis_py_8),
    ],
)
def test_an_option_of_the_url_is_taken_or_refused(url: str, name: str) -> None:
    """By whom it is read there, redis-py, or before anything is written."""
    option, tls = f"{name}={OPTIONS[name]}", url.startswith("rediss")
    conf = {"goalstate_index_url": url.format(option)}
    if (name.startswith("ssl_") and not tls) or (url.startswith("unix") and name == "socket_keepalive"):
        with pytest.raises(ImproperlyConfigured, match=f"has no option '{name}'"):
            Settings.from_conf(conf)
        return
    settings = Settings.from_conf(conf)
    if name.startswith("ssl_") and name not in inspect.signature(redis.SSLConnection).parameters:
        with pytest.raises(ImproperlyConfigured, match=f"redis-py .* says: .*{name}"):
            open_index(settings)
        return
    index: Any = open_index(settings)
    assert index._client.connection_pool.make_connection()


def test_a_value_that_redis_py_refuses() -> None:
    """Before anything is written."""
    settings = Settings(index_url="rediss://nobody?ssl_cert_reqs=nonsense")
    with pytest.raises(ImproperlyConfigured, match=r"cannot be used: redis-py .* says: .*nonsense"):
        open_index(settings)


@needs_redis_py_8
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_a_clusters_url_is_passed_on_or_refused(name: str) -> None:
    conf = {"goalstate_index_url": f"rediss+cluster://nobody?{name}={OPTIONS[name]}"}
    if name in redis.cluster.REDIS_ALLOWED_KEYS and name != "db":
        Settings.from_conf(conf)
    else:
        with pytest.raises(ImproperlyConfigured, match=f"has no option '{name}'"):
            Settings.from_conf(conf)


@pytest.mark.parametrize(
    ("url", "needed"),
    [
        ("redis://nobody", False),
        ("rediss://nobody", False),
        ("unix:///nowhere", False),
        ("sentinel://nobody?master_name=m", True),
        ("rediss+sentinel://nobody?master_name=m", True),
        ("redis+cluster://nobody", True),
    ],
)
def test_who_needs_a_new_redis_py(url: str, needed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("celery_goalstate.index.VERSION", (7, 4, 1))
    monkeypatch.setattr("celery_goalstate.index.redis_py", "7.4.1")
    settings = Settings(index_url=url)
    if needed:
        with pytest.raises(ImproperlyConfigured, match=r"needs redis-py 8 or later, and this is 7\.4\.1"):
            open_index(settings)
    else:
        open_index(settings).close()
