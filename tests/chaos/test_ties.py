"""What a runner has started ends with it, even if the runner is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.servers import poll
from tests.supervised import ROOT

RUNNER = """
import signal, sys
from pathlib import Path
from tests.servers import RedisServer, Valkey, poll
from tests.supervised import Supervised

directory = Path(sys.argv[1])
if sys.argv[2] == "Valkey":
    server = Valkey(directory)
    server.start()
    print(server.pid)
elif sys.argv[2] == "RedisServer":
    server = RedisServer(directory)
    server.start()
    print(server.pid)
else:  # a program, which has started another one
    program = '''
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]).pid, flush=True)
import signal; signal.pause()
'''
    process = Supervised("program", ["-c", program], directory=directory, env={}, ready="\\n")
    process.start()
    poll("the program has started the other one", process.is_ready, timeout=60)
    print(process.pid, int((directory / "program.log").read_text()))
sys.stdout.flush()
signal.pause()
"""


@pytest.mark.parametrize("what", ["Valkey", "RedisServer", "Supervised"])
def test_nothing_outlives_a_runner_that_is_killed(what: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUNNER, str(tmp_path / "server"), what]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as runner:
        assert runner.stdout
        pids = [int(pid) for pid in runner.stdout.readline().split()]
        assert pids
        assert all(map(psutil.pid_exists, pids))
        runner.kill()
    poll("all have ended", lambda: not any(map(_runs, pids)), timeout=20)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # nobody may be there to reap it
    except psutil.NoSuchProcess:
        return False
