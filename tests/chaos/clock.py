"""Wall clocks that step, each of one process and its children: a small library that is preloaded into them.

Not libfaketime, which would do more than is asked: with Python's locks (`sem_clockwait`) it fails and hangs.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ENV = "GOALSTATE_CHAOS_CLOCK"  # the name of the file that holds how wrong the clock is
SOURCE = Path(__file__).with_name("clock.c")


def build(directory: Path) -> tuple[Path | None, str]:
    """The library, or why there is none."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None, "no C compiler (cc) is installed"
    library = directory / "clock.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None, f"{SOURCE.name} cannot be compiled: {done.stderr.strip().splitlines()[-1]}"
    return library, ""


class Clock:
    """How wrong the wall clock of a process and its children is."""

    def __init__(self, library: Path, file: Path) -> None:
        self._file = file
        self.offset = 0  #: seconds
        self.env = {"LD_PRELOAD": str(library), ENV: str(file)}
        file.write_bytes(self._bytes())

    def step(self, seconds: int) -> None:
        self.offset += seconds
        with self._file.open("r+b") as file:  # in place: it is mapped
            file.write(self._bytes())

    def _bytes(self) -> bytes:
        return self.offset.to_bytes(8, "little", signed=True)
