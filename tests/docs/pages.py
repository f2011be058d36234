"""The README, the changelog and the pages of docs/, and the code blocks in them.

What stands after a block's language says what the block is:

    ```python               is run, in one namespace per page
    ```python file=shop.py  is appended to a file, which the other blocks then use
    ```console              holds commands after `$ `, each with the output that it must have
    ```console shown        is only looked at: its commands would change the reader's machine

In a python block `expression  # → text` says what the expression must become, within some seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(page.relative_to(ROOT) for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

_BLOCK = re.compile(r"^```(?P<info>\w.*)\n(?P<text>(?:.*\n)*?)^```$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int  #: of its first line of text
    language: str
    attributes: tuple[str, ...]
    text: str

    @property
    def file(self) -> str | None:
        """The file that the block is a part of."""
        return next((each.partition("=")[2] for each in self.attributes if each.startswith("file=")), None)

    @property
    def shown(self) -> bool:
        """Whether the block is not to be run."""
        return "shown" in self.attributes

    def commands(self) -> Iterator[tuple[str, str]]:
        """The commands of a console block, each with its output."""
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command.split("  # ")[0].strip(), output


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page, from top to bottom."""
    text = (ROOT / page).read_text()
    for found in _BLOCK.finditer(text):
        language, *attributes = found["info"].split()
        line = text.count("\n", 0, found.start("text")) + 1
        yield Block(page, line, language, tuple(attributes), found["text"])


def prose(page: Path) -> str:
    """A page without its blocks."""
    return _BLOCK.sub("", (ROOT / page).read_text())
