"""The words that the code itself uses: what it logs, and what its strings hold.

Docstrings and comments are neither: nobody who runs the code ever sees them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import celery

from tests.docs.pages import ROOT

PACKAGE = ROOT / "celery_goalstate"
CELERY_S_WORKER = Path(celery.__file__).parent / "worker"

_LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
_LUA_STRING = re.compile(r"'([^'\n]*)'|\"([^\"\n]*)\"")


def logged(source: str) -> Iterator[str]:
    """The texts that a module hands to its logger."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr=level, value=ast.Name(id="logger"))) if level in _LEVELS:
                for argument in node.args:
                    yield from _strings(argument)


def literals(source: str) -> Iterator[str]:
    """All texts of a module but its docstrings."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    yield from (text for node in ast.walk(tree) if id(node) not in docstrings for text in _own_string(node))


def pages_named(source: str) -> Iterator[str]:
    """The pages of the documentation to which the texts of a module lead: what follows `DOCS` in them."""
    for text in ast.walk(ast.parse(source)):
        if isinstance(text, ast.JoinedStr):
            for before, after in pairwise(text.values):
                match before, after:
                    case ast.FormattedValue(value=ast.Name(id="DOCS")), ast.Constant(value=str(rest)):
                        yield rest.split()[0]


def lua_literals(source: str) -> Iterator[str]:
    """All texts of a Lua script."""
    for line in source.splitlines():
        for single, double in _LUA_STRING.findall(line.partition("--")[0]):
            yield single or double


def _strings(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        yield from _own_string(each)


def _own_string(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


@cache
def of_the_log() -> tuple[str, ...]:
    """What a worker's log can say: the package's own lines, and those of Celery's worker."""
    own = [text for file in PACKAGE.rglob("*.py") for text in logged(file.read_text())]
    celery_s = [text for file in CELERY_S_WORKER.rglob("*.py") for text in literals(file.read_text())]
    return *own, *celery_s


@cache
def of_the_code() -> tuple[str, ...]:
    """What errors, commands and records of the package can say."""
    python = [text for file in PACKAGE.rglob("*.py") for text in literals(file.read_text())]
    lua = [text for file in PACKAGE.rglob("*.lua") for text in lua_literals(file.read_text())]
    return *python, *lua


def occurs(words: str, texts: tuple[str, ...]) -> bool:
    """Whether one of the texts holds these words; a quoted name stands for what the code fills in."""
    wanted = re.sub(r"'[^']+'", "%s", words.removesuffix("...").strip())
    return any(wanted in text for text in texts)
