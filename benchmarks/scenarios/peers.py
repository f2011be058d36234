"""The same jobs in other queues, each from its own environment, all in turns: see `benchmarks.peers`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from benchmarks.bench import Bench, progress
from benchmarks.peers import BASE, PEERS, ROOT, Peer
from benchmarks.scenarios.store import used_memory
from tests.servers import PostgreSQL, Process


def run(bench: Bench, peers: Sequence[Peer] = PEERS) -> None:
    with tempfile.TemporaryDirectory(prefix="peers-") as temporary, ExitStack() as stack:
        directory = Path(temporary)
        contenders: list[Contender] = []
        for peer in peers:
            try:
                peer.install()
                server = stack.enter_context(PostgreSQL(directory / "postgres")) if peer.postgres else None
            except (subprocess.CalledProcessError, pytest.skip.Exception) as error:
                bench.remark(f"{peer.name} is left out: {error}")
                continue
            contenders.append(Contender(bench, peer, directory, server))
            installed = ", ".join([*peer.versions(), peer.working])
            bench.remark(f"{peer.name}: {installed}; {bench.size(peer.jobs, 50):,} jobs a round.")
        for number in range(max(1, bench.rounds // 3)):
            for contender in list(contenders):
                try:
                    contender.measure(first=number == 0)
                except (RuntimeError, TimeoutError, subprocess.TimeoutExpired) as error:
                    if contender.peer is BASE:
                        raise
                    contenders.remove(contender)
                    contender.withdraw(error)


class Contender:
    """One of them, on the server that all share in turns, or on a PostgreSQL."""

    def __init__(self, bench: Bench, peer: Peer, directory: Path, postgres: PostgreSQL | None = None) -> None:
        self.bench = bench
        self.peer = peer
        self.postgres = postgres
        self.server = postgres.url if postgres else os.environ["BENCHMARK_SERVER"]
        self.directory = directory
        self.ran = directory / f"{peer.program}.ran"
        self.env = {"PEER_SERVER": self.server, "PEER_RAN": str(self.ran), "PYTHONPATH": str(ROOT)}

    def measure(self, *, first: bool) -> None:
        """One round. Raises `RuntimeError`, `TimeoutError` or `TimeoutExpired`."""
        self.flush()
        for what, value in json.loads(self.do("costs", self.bench.size(300, 20))).items():
            self.note(what, value)
        if first and not self.postgres:  # it hardly varies
            self.note("bytes", self.bytes_per_job())
        self.flush()
        self.note("jobs", self.jobs_a_second())

    def bytes_per_job(self) -> float:
        """Of the server's memory, for each job that waits for an hour."""
        jobs = self.bench.size(5000, 200)
        self.flush()
        self.do("fill", 1)  # scripts and groups are there
        before = used_memory(self.bench)
        self.do("fill", jobs)
        return (used_memory(self.bench) - before) / jobs

    def jobs_a_second(self) -> float:
        """From the first to the last of some that are there before the worker."""
        jobs = self.bench.size(self.peer.jobs, 50)
        self.do("publish", jobs)
        self.ran.unlink(missing_ok=True)
        program, *options = self.peer.worker.split()
        module = f"benchmarks.peers.{self.peer.program}"
        options = [each.format(module=module, server=self.server) for each in options]
        log = self.directory / f"{self.peer.program}.log"
        worker = Process([str(self.peer.directory / program), *options], log=log, env=self.env, cwd=ROOT)
        worker.start()

        def done() -> int:
            if not worker.alive:
                raise RuntimeError(f"the worker ended: {worker.output()[-1000:].strip()}")
            return self.ran.stat().st_size if self.ran.exists() else 0

        try:
            return jobs / progress(lambda: done() >= jobs, lambda: done() > 0)
        finally:
            worker.kill()

    def do(self, command: str, number: int) -> str:
        """Run its program; what it prints."""
        program = [str(self.peer.directory / "python"), "-m", "benchmarks.peers", self.peer.program]
        run = subprocess.run(
            [*program, command, str(number)],
            env={**os.environ, **self.env},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if run.returncode:
            raise RuntimeError(f"{command}: {run.stderr[-1000:].strip()}")
        return run.stdout

    def flush(self) -> None:
        """Empty its server."""
        if not self.postgres:
            self.bench.flush()
            return
        with psycopg.connect(self.server, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")

    def note(self, what: str, value: float) -> None:
        self.bench.note(f"{self.peer.name}: {what}", value)

    def withdraw(self, error: Exception) -> None:
        """Forget what was measured, since its rounds are not as many as the others', and say why."""
        for name in [each for each in self.bench.measured if each.startswith(f"{self.peer.name}: ")]:
            del self.bench.measured[name]
        print(error)
        self.bench.remark(f"{self.peer.name} is left out: {str(error).splitlines()[-1]}")
