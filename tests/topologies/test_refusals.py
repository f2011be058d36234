"""A server that answers, and refuses: what passes is waited for, what does not is told with what to do."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis

from celery_goalstate.exceptions import AccessDenied, IndexUnavailable
from tests.servers import HOST, RedisServer, Valkey, poll
from tests.topologies.polling import Worker, open_app


def own_address() -> str:
    """One of this machine's that is not the loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # which sends nothing
        if not (address := probe.getsockname()[0]).startswith("127."):
            return str(address)
    pytest.skip("this machine has no address but the loopback's")


# What does not pass ------------------------------------------------------------------------------


@contextmanager
def no_password(directory: Path) -> Iterator[str]:
    with RedisServer(directory) as server, server.client() as admin:
        admin.config_set("requirepass", "right")
        yield server.url


@contextmanager
def wrong_password(directory: Path) -> Iterator[str]:
    with no_password(directory) as url:
        yield url.replace("//", "//:wrong@")


@contextmanager
def protected_mode(directory: Path) -> Iterator[str]:
    with RedisServer(directory, "--bind", "*", "--protected-mode", "yes") as server:
        yield server.url.replace(HOST, own_address())


REFUSALS = [
    pytest.param(no_password, "the index refused the user or the password: ", id="NOAUTH"),
    pytest.param(wrong_password, "the index refused the user or the password: ", id="WRONGPASS"),
    pytest.param(protected_mode, "the index's Redis is in protected mode", id="DENIED"),
]

Refusing = Callable[[Path], "contextmanager[str]"]


@pytest.mark.parametrize(("refusing", "words"), REFUSALS)
def test_a_refusal_is_told_with_what_to_do(refusing: Refusing, words: str, tmp_path: Path) -> None:
    with refusing(tmp_path / "index") as url, Valkey(tmp_path / "broker") as broker:
        settings = {"broker_url": broker.url, "goalstate_index_url": url}
        app, engine = open_app(settings)
        for call in (lambda: engine.enqueue(engine.ref("kind-0", 1)), engine.counts, engine.pause):
            with pytest.raises(AccessDenied, match=f"^{words}") as caught:
                call()
            assert "\n" not in str(caught.value)
            assert len(str(caught.value)) < 300
        app.close()
        with Worker(tmp_path, settings) as worker:
            assert worker.wait(60) == 1, "it does not wait for what does not pass"
            [line] = worker.lines("CRITICAL")
            assert f"this worker ends, since it cannot use the index: {words}" in line
            assert worker.lines("Traceback") == []
            assert "wrong" not in worker.output()


# What passes -------------------------------------------------------------------------------------


class Trouble:
    """A server, how it comes to refuse, and how that passes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.server = RedisServer(directory, *self.options)

    options: tuple[str, ...] = ()

    def begin(self, admin: redis.Redis) -> None: ...

    def end(self, admin: redis.Redis) -> None: ...


class Full(Trouble):
    def begin(self, admin: redis.Redis) -> None:
        admin.config_set("maxmemory", "1")

    def end(self, admin: redis.Redis) -> None:
        admin.config_set("maxmemory", "0")


class CannotSave(Trouble):
    options = ("--save", "3600 1", "--enable-protected-configs", "yes")

    def begin(self, admin: redis.Redis) -> None:
        self.place = self.directory / "data"
        self.place.mkdir()
        admin.config_set("dir", str(self.place))
        shutil.rmtree(self.place)
        admin.set("something", "changed")
        admin.bgsave()
        poll("it could not save", lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "err")

    def end(self, admin: redis.Redis) -> None:
        admin.config_set("stop-writes-on-bgsave-error", "no")


class Loading(Trouble):
    def begin(self, admin: redis.Redis) -> None:
        for n in range(4_000):
            admin.set(f"key-{n}", os.urandom(1_000))  # nothing to be compressed
        admin.save()
        admin.config_set("save", "")
        self.server.kill()
        # Each key takes so many microseconds; it answers in between.
        self.server.command += [
            "--key-load-delay",
            "20000",
            "--loading-process-events-interval-bytes",
            "1024",
        ]
        super(RedisServer, self.server).start()
        poll("it listens", lambda: f"port={self.server.port}" in self.server.output())

    def end(self, admin: redis.Redis) -> None:
        admin.config_set("key-load-delay", "0")


TROUBLES = [
    pytest.param(Full, "the index is full, and takes nothing new", id="OOM"),
    pytest.param(
        CannotSave, "the index takes nothing new until its Redis can save its data again", id="MISCONF"
    ),
    pytest.param(Loading, "the index's Redis has just started", id="LOADING"),
]


@pytest.mark.parametrize(("kind", "words"), TROUBLES)
def test_what_passes_is_waited_for(kind: type[Trouble], words: str, tmp_path: Path) -> None:
    trouble = kind(tmp_path / "index")
    with trouble.server as server, Valkey(tmp_path / "broker") as broker, server.client() as admin:
        settings = {"broker_url": broker.url, "goalstate_index_url": server.url}
        app, engine = open_app(settings)
        trouble.begin(admin)
        with pytest.raises(IndexUnavailable, match=f"^{words}") as caught:
            engine.enqueue(engine.ref("kind-0", 1))
        assert not isinstance(caught.value, AccessDenied)
        with Worker(tmp_path, settings) as worker:
            worker.poll_until("it waits", lambda: bool(worker.lines(words)), timeout=60)
            trouble.end(admin)
            worker.poll_until("it works", lambda: bool(worker.lines("the sweeper works again")), timeout=60)
            engine.enqueue(engine.ref("kind-0", 1))
            worker.poll_until("it evaluates", lambda: worker.evaluations()["kind-0"] > 0, timeout=60)
            assert len(worker.lines(words)) == 1
            assert worker.lines("Traceback") == []
        app.close()
