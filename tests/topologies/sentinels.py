"""A master, its replica, and the sentinels that watch them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import redis

from tests.chaos.proxy import Proxy
from tests.servers import HOST, Process, RedisServer, free_port, poll, require

MASTER = "shop"


class Sentinels:
    """A master, its replica, and three sentinels that watch them."""

    def __init__(
        self, directory: Path, *options: str, tls: dict[str, str] | None = None, proxied: bool = False
    ) -> None:
        """`options` are those of both servers.

        With `tls`, options that name certificates, they all speak TLS with each other; the servers take
        anything else, too. If `proxied`, sentinels and replica know the master by `link` only.
        """
        self.ports = [free_port() for _ in range(3)]
        self._ca = (tls or {}).get("tls-ca-cert-file", "")
        together = {**tls, "tls-replication": "yes"} if tls else {}
        options += tuple(word for name, value in together.items() for word in (f"--{name}", value))
        self.addresses: dict[RedisServer, int] = {}  #: the ports by which sentinels and servers speak to them

        def server(name: str, *more: str) -> RedisServer:
            tls_port = free_port()
            listening = ("--tls-port", str(tls_port)) if tls else ()
            server = RedisServer(directory / name, *options, *listening, *more)
            self.addresses[server] = tls_port if tls else server.port
            return server

        self.master = server("one")
        self.link = Proxy(self.master.port) if proxied else None
        if self.link:
            self.addresses[self.master] = self.link.port
            # It will be a replica one day.
            self.master.command += ["--replica-announce-port", str(self.link.port)]
        self.replica = server("two", "--replicaof", f"{HOST} {self.addresses[self.master]}")
        self.processes: list[Process] = []  #: the sentinels themselves, in the order of `url`
        for port in self.ports:
            file = directory / f"sentinel-{port}.conf"
            lines = [
                *(["port 0", f"tls-port {port}"] if tls else [f"port {port}"]),
                *(f"{name} {value}" for name, value in together.items()),
                f"bind {HOST}",
                f"sentinel monitor {MASTER} {HOST} {self.addresses[self.master]} 2",
                f"sentinel down-after-milliseconds {MASTER} 500",
                f"sentinel failover-timeout {MASTER} 2000",
            ]
            file.write_text("".join(f"{line}\n" for line in lines))
            command = [require("redis-server"), str(file), "--sentinel"]
            self.processes.append(Process(command, log=directory / f"sentinel-{port}.log"))

    @property
    def url(self) -> str:
        scheme = "rediss+sentinel" if self._ca else "sentinel"
        nodes = ";".join(f"{scheme}://{HOST}:{port}" for port in self.ports)
        return f"{nodes}?master_name={MASTER}{self._ca and f'&ssl_ca_certs={self._ca}'}"

    def _clients(self) -> Iterable[redis.Redis]:
        options: dict[str, Any] = {"ssl": True, "ssl_ca_certs": self._ca} if self._ca else {}
        for port in self.ports:
            with redis.Redis(host=HOST, port=port, decode_responses=True, **options) as client:
                yield client

    def swap(self) -> None:
        self.master, self.replica = self.replica, self.master

    def in_sync(self) -> None:
        with self.replica.client() as client:
            poll(
                "the replica is in sync",
                lambda: client.info("replication").get("master_link_status") == "up",
                timeout=30,
            )

    def promoted(self) -> None:
        """Wait until the sentinels have replaced the master."""
        with self.replica.client() as client:
            poll("the replica is promoted", lambda: client.role()[0] == "master", timeout=30)
        address = self.addresses[self.replica]
        for client in self._clients():
            poll(
                "every sentinel knows",
                lambda client=client: client.sentinel_get_master_addr_by_name(MASTER)[1] == address,
                timeout=30,
            )
        self.swap()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            if self.link:
                stack.enter_context(self.link)
            for server in (self.master, self.replica, *self.processes):
                stack.enter_context(server)
            self.in_sync()
            for client in self._clients():
                poll("it knows them all", lambda client=client: self._knows_all(client), timeout=30)
            self._stack = stack.pop_all()
        return self

    @staticmethod
    def _knows_all(client: redis.Redis) -> bool:
        known = client.sentinel_master(MASTER)
        return known["num-slaves"] == 1 and known["num-other-sentinels"] == 2

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()
