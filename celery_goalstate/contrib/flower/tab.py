"""Flower's templates, with a tab for the goal states and the templates of its pages."""

from __future__ import annotations

import logging
from importlib.resources import files
from pathlib import Path

from flower import urls
from tornado.template import BaseLoader, DictLoader

logger = logging.getLogger(__name__)

HERE = files("celery_goalstate.contrib.flower") / "templates"

#: The tab after which ours comes, and what that is.
NEIGHBOUR = "reverse_url('broker')"
TAB = """
        <li class="nav-item">
          <a class="nav-link{% if active_tab == 'goalstate' %} active{% end %}"
            href="{{ reverse_url('goalstate') }}"
            {% if active_tab == 'goalstate' %}aria-current="page"{% end %}>Goal states</a>
        </li>"""

#: What our pages fill in Flower's frame.
BLOCKS = ("title", "navbar", "container", "extra_scripts")


def missing() -> list[str]:
    """What Flower's templates lack that is needed here."""
    if "template_loader" in urls.settings:
        return [] if isinstance(urls.settings["template_loader"], Templates) else ["its own template loader"]
    frame = _flowers().get("base.html", "")
    return [f"the block {name!r} of base.html" for name in BLOCKS if f"{{% block {name} %}}" not in frame]


class Templates(DictLoader):
    """Flower's templates and ours."""


def loader() -> BaseLoader:
    """What gives tornado Flower's templates and ours."""
    ours = {f"goalstate/{each.name}": each.read_text("utf-8") for each in (HERE / "goalstate").iterdir()}
    flowers = _flowers()
    navbar = flowers.get("navbar.html", "")
    if (with_tab := _with_tab(navbar)) is None:
        logger.warning("no tab for the Goal states, as Flower's navbar.html is another one: see /goalstate")
        return Templates(flowers | ours)
    return Templates(flowers | ours | {"navbar.html": with_tab})


def add(loader: BaseLoader) -> None:
    """Have Flower use this loader."""
    urls.settings["template_loader"] = loader


def _flowers() -> dict[str, str]:
    templates = Path(urls.settings["template_path"]).glob("*.html")
    return {path.name: path.read_text("utf-8") for path in templates}


def _with_tab(navbar: str) -> str | None:
    """The navigation with our tab after its last one; None: it is not built as we know it."""
    before, neighbour, after = navbar.partition(NEIGHBOUR)
    rest, end, others = after.partition("</li>")
    is_as_known = '<li class="nav-item">' in before and end and NEIGHBOUR not in after
    return f"{before}{neighbour}{rest}{end}{TAB}{others}" if is_as_known else None
