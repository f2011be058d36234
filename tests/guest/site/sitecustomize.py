"""Imported as Python starts, in each process that has this directory in PYTHONPATH: pytest and workers."""

import tests.guest.hook  # noqa: F401 - importing it hooks it in
