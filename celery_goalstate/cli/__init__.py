"""`celery goalstate`: see how entities stand, and operate the engine, from a shell.

Loads what a worker of the app loads, so it knows the same kinds. Exit codes: 0 done, 1 not found (or, said by
`status`, something needs a person; by `doctor`, something fails), 2 bad usage, 3 the index does not answer.
"""

from celery_goalstate.cli import doctor, exporter, lists, status  # noqa: F401 - they add their commands
from celery_goalstate.cli.commands import goalstate

__all__ = ["goalstate"]
