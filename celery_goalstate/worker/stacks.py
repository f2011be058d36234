"""What a thread or a greenlet is executing, read from outside while it goes on: places in code, no values."""

from __future__ import annotations

import site
import sys
import sysconfig
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from celery_goalstate import evaluation

#: Calls that are named, the innermost first.
CALLS = 3
#: Where code lies that is not the user's own.
_LIBRARIES = (
    sysconfig.get_path("stdlib"),
    *site.getsitepackages(),
    site.getusersitepackages(),
    "<frozen ",
    str(Path(__file__).parent.parent),
)


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The stack of one thread, or of one greenlet of it."""

    thread: int
    greenlet: Any = None  #: None: the thread itself

    @classmethod
    def of_caller(cls) -> Stack:
        """The stack of who calls."""
        greenlets = sys.modules.get("greenlet")
        current = greenlets.getcurrent() if greenlets is not None else None
        # The one that each thread has by itself has no parent.
        return cls(threading.get_ident(), None if current is None or current.parent is None else current)

    def calls(self) -> str:
        """`app.py:7 call_carrier < app.py:8 ship`: the innermost call, then those of the user's own code.

        Empty if nothing of that is being executed.
        """
        frame = sys._current_frames().get(self.thread) if self.greenlet is None else self.greenlet.gr_frame
        return " < ".join(_named(frame))


def _named(frame: FrameType | None) -> Iterator[str]:
    found = 0
    while frame is not None and found < CALLS and frame.f_code.co_filename != evaluation.__file__:
        code = frame.f_code
        if found == 0 or not code.co_filename.startswith(_LIBRARIES):
            found += 1
            yield f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
        frame = frame.f_back
