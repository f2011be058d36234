"""Runs the examples of one page: `python -m tests.docs.run_page PAGE REDIS_URL`, in an empty directory.

In a process of its own, since the examples create Celery apps, which are global things. What the reader is
taken to have already (a warehouse, a Django project) comes from `stage/`.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.docs.pages import Block, blocks
from tests.servers import Process, free_port

STAGE = Path(__file__).parent / "stage"
#: Commands that go on beside the others, and what they print when they are ready.
SERVERS = {"worker": " ready.", "exporter": "/metrics"}
PATIENCE = 20.0  #: seconds, for what a worker does meanwhile
REDIS = re.compile(r"redis://localhost:6379\b")
EXPORTER = re.compile(r"\b9808\b")

_VARYING = [
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"), "TIME"),
    (re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "UUID"),
    (re.compile(r"\b(in )?\d+(\.\d+)? ?(ms|s|min|h|d)\b( ago)?|\bnow\b"), "TIME"),
    (re.compile(r"^ *message .*$", re.MULTILINE), ""),  # it is sent some seconds ahead, and time goes by here
    (re.compile(r"\s+"), " "),
]


def alike(text: str) -> str:
    """The text without what differs from run to run: times, ids, white space."""
    for pattern, word in _VARYING:
        text = pattern.sub(word, text)
    return text.strip()


class Stage:
    """Where the examples of one page run: the current directory, one namespace, and servers."""

    def __init__(self, page: Path, url: str) -> None:
        self.url = url.removesuffix("/0")
        self.port = str(free_port())
        self.namespace: dict[str, Any] = {"__name__": "__page__"}
        self.servers: list[Process] = []
        own = STAGE / page.stem
        for props in (STAGE / "common", own):
            if props.is_dir():
                shutil.copytree(props, ".", dirs_exist_ok=True)
        for file in Path().rglob("*.py"):
            file.write_text(self.localized(file.read_text()))
        sys.path.insert(0, str(Path.cwd()))
        self.prologue = Path("prologue.py")

    def play(self, block: Block) -> None:
        if block.file:
            path = Path(block.file)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write("\n" + self.localized(block.text))
            return
        if block.shown or block.language not in {"python", "console"}:
            return
        if self.prologue.exists():
            exec(compile(self.prologue.read_text(), "prologue.py", "exec"), self.namespace)
            self.prologue.unlink()
        if block.language == "python":
            self.run_python(block)
        else:
            for command, output in block.commands():
                self.run_command(block, self.localized(command), output)

    def localized(self, text: str) -> str:
        return EXPORTER.sub(self.port, REDIS.sub(self.url, text))

    def run_python(self, block: Block) -> None:
        source = "\n" * (block.line - 1) + self.localized(block.text)
        lines = source.splitlines()
        for node in ast.parse(source).body:
            assert node.end_lineno is not None
            _, arrow, wanted = lines[node.end_lineno - 1].partition("  # → ")
            if isinstance(node, ast.Expr) and arrow:
                expression = compile(ast.Expression(node.value), str(block.page), "eval")
                self.wait_for(
                    f"{block.page}:{node.lineno}", wanted, lambda e=expression: str(eval(e, self.namespace))
                )
            else:
                exec(compile(ast.Module([node], []), str(block.page), "exec"), self.namespace)

    def run_command(self, block: Block, command: str, output: str) -> None:
        for server, its_sign in SERVERS.items():
            if re.search(rf"\bcelery .* {server}\b", command):
                self.start(command, its_sign)
                return

        def run() -> str:
            done = subprocess.run(
                command, shell=True, text=True, capture_output=True, timeout=60, check=False
            )
            return (done.stdout + done.stderr).replace(self.url, "redis://localhost:6379")

        only_looks = re.search(r" (show|list|status|doctor)\b", command)
        if only_looks:
            self.wait_for(f"{block.page}:{block.line}: {command}", output, run)
        else:
            got = run()
            assert alike(got) == alike(output), f"{block.page}:{block.line}: {command}\n{got}"

    @staticmethod
    def wait_for(where: str, wanted: str, get: Callable[[], str]) -> None:
        ends = time.monotonic() + PATIENCE
        while alike(got := get()) != alike(wanted):
            assert time.monotonic() < ends, f"{where}\nwanted: {wanted}\ngot:    {got}"
            time.sleep(0.05)  # polls: `assert` above has the deadline

    def start(self, command: str, sign: str) -> None:
        server = Process(shlex.split(command), log=Path(f"server{len(self.servers)}.log"))
        self.servers.append(server)
        server.start()
        server.poll_until(f"{command} is ready", lambda: sign in server.output(), timeout=2 * PATIENCE)

    def clear(self) -> None:
        for server in self.servers:
            server.end()


def main(page: Path, url: str) -> None:
    stage = Stage(page, url)
    try:
        for block in blocks(page):
            stage.play(block)
    finally:
        stage.clear()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
