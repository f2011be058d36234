"""What all programs share: where the server is, and what a job does."""

from __future__ import annotations

import os

SERVER = os.environ["PEER_SERVER"]
HOUR = 3600.0

_ran = os.open(os.environ["PEER_RAN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def ran() -> None:
    """All that a job does: a file gets a byte longer. Whoever watches the file sees how many have run."""
    os.write(_ran, b".")
