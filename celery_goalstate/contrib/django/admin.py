"""The admin."""

from __future__ import annotations


class GoalStateAdmin:
    """Placeholder."""
