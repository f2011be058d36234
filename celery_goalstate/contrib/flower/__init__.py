"""Flower: a tab **Goal states**, with what fails, is late or hangs, and what is known of each entity.

Its `/metrics` has those of the goal states, too.

In Flower's `flowerconfig.py`:

    from celery_goalstate.contrib.flower import install

    install()

Flower has no interface for pages. This uses what 2.2 has inside; a Flower that lacks any of it stays as it
is, and says so in one line of its log.
"""

from __future__ import annotations

import logging

__all__ = ["install"]

logger = logging.getLogger(__name__)


def install(*, namespace: str | None = None) -> None:
    """Add the tab, its pages and metrics to this process' Flower. Never raises: an error would end Flower.

    `namespace` is that of the engine, if the app has several. Calling it again changes nothing.
    """
    try:
        why_not = _install(namespace)
    except Exception as error:  # noqa: BLE001 - whatever another Flower does
        why_not = f"{type(error).__name__}: {error}"
    if why_not:
        logger.warning("no Goal states in Flower, for they need 2.2 or later: %s", why_not)


def _install(namespace: str | None) -> str:
    """Install it; or why not, and then nothing is changed."""
    from celery_goalstate.contrib.flower import metrics, pages, tab  # which import what not every Flower has

    if missing := [*pages.missing(), *metrics.missing(), *tab.missing()]:
        return f"this one lacks {', '.join(missing)}"
    loader = tab.loader()
    pages.add(namespace)
    metrics.add(namespace)
    tab.add(loader)
    return ""
