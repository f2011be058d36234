"""What is tried, and how much of it. All of it is bad: each input is to be refused, and nothing written."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, TypeVar
from uuid import uuid4

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

T = TypeVar("T")

#: How many of each sort there are in a hundred.
SHARES = {"ids": 20, "deadlines": 20, "settings": 15, "command lines": 10, "requests": 10, "messages": 25}
assert sum(SHARES.values()) == 100

#: Inputs of all sorts together.
_long = pytest.param(100_000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])
totals = pytest.mark.parametrize("total", [2_000, _long])

#: Examples that Hypothesis keeps in mind at a time.
ROUND = 1_000


def fire(total: int, sort: str, inputs: st.SearchStrategy[T], try_one: Callable[[T], None]) -> str:
    """Try this sort's share of all inputs; a line that tells how many it were."""
    wanted, tried = total * SHARES[sort] // 100, 0

    def one(value: T) -> None:
        nonlocal tried
        try_one(value)
        tried += 1

    for start in range(0, wanted, ROUND):
        _generate(min(ROUND, wanted - start), inputs, one, start)
    assert tried >= wanted * 0.9, "there are no more of them"
    return f"hostile input: {tried:,} {sort}, all refused, none written"


def sample(count: int, inputs: st.SearchStrategy[T]) -> list[T]:
    """So many inputs, always the same."""
    found: list[T] = []

    def one(value: T) -> None:
        found.append(value)

    _generate(count, inputs, one, 0)
    return found


def _generate(count: int, inputs: st.SearchStrategy[T], one: Callable[[T], None], start: int) -> None:
    chosen = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # after a worker has died, smaller inputs tell nothing new
        suppress_health_check=list(HealthCheck),
    )
    seed(start)(chosen(given(inputs)(one)))()


# Of what bad values are made ----------------------------------------------------------------------

texts = st.text(st.characters(codec=None), max_size=30)  # lone surrogates too
#: What JSON can say, and Python's module reads: NaN too.
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
no_json: st.SearchStrategy[Any] = st.one_of(
    st.binary(max_size=10), st.complex_numbers(), st.decimals(), st.fractions(), st.just(object())
)
controls = st.sampled_from([chr(n) for n in (*range(32), *range(127, 160))] + ["\ud800", "\udfff"])


@st.composite
def spoilt_texts(draw: st.DrawFn, spoiler: st.SearchStrategy[str] = controls) -> str:
    text = draw(st.text(max_size=20))
    at = draw(st.integers(0, len(text)))
    return text[:at] + draw(spoiler) + text[at:]


bad_id_texts: st.SearchStrategy[str] = st.one_of(
    st.just(""), spoilt_texts(), st.text("aü→🙂\\", min_size=513, max_size=600)
)
bad_ids: st.SearchStrategy[Any] = st.one_of(
    bad_id_texts,
    no_json,
    junk.filter(lambda value: isinstance(value, bool) or not isinstance(value, str | int)),
)

_CENTURY = timedelta(days=36_525)
_bad_numbers = st.one_of(
    st.floats(max_value=0, exclude_max=True),
    st.floats(min_value=1e9),
    st.just(math.nan),
    st.integers(max_value=-1),
    st.integers(min_value=10**9),
    st.booleans(),
)
_bad_spans = st.timedeltas(max_value=timedelta(microseconds=-1)) | st.timedeltas(
    min_value=_CENTURY + timedelta(seconds=1)
)
_no_times: st.SearchStrategy[Any] = (
    no_json | texts | st.lists(st.integers(), max_size=3) | st.dictionaries(texts, texts, max_size=2)
)
_offsets = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
#: Seconds or a span, but for None, which is a value of its own.
bad_delays: st.SearchStrategy[Any] = _bad_numbers | _bad_spans | _no_times
bad_deadlines: st.SearchStrategy[Any] = (
    bad_delays
    | st.datetimes()  # without a time zone
    | st.datetimes(min_value=datetime.now(UTC).replace(tzinfo=None) + timedelta(days=36_600)).flatmap(
        lambda when: _offsets.map(lambda offset: when.replace(tzinfo=offset))
    )
)
bad_names: st.SearchStrategy[Any] = (
    st.just("")
    | spoilt_texts(st.characters(codec="utf-8", exclude_characters="abcdefghijklmnopqrstuvwxyz0123456789_.-"))
) | junk.filter(lambda value: not isinstance(value, str))
bad_counts: st.SearchStrategy[Any] = (
    st.integers(max_value=0)
    | st.booleans()
    | st.floats()
    | texts
    | no_json
    | st.lists(st.integers(), max_size=2)
)
bad_flags: st.SearchStrategy[Any] = junk.filter(lambda value: not isinstance(value, bool)) | no_json
bad_urls: st.SearchStrategy[Any] = st.one_of(
    texts.filter(lambda text: text and "://" not in text),
    st.builds("{}://{}".format, st.sampled_from(["http", "amqp", "sqla+sqlite", "", "redis "]), texts),
    st.builds("redis://localhost:{}/0".format, st.integers(min_value=65_536) | st.text("abc-", min_size=1)),
    st.builds("redis://{};redis://{}".format, st.text("abc"), st.text("abc")),
    st.builds("sentinel://{}/0".format, st.text("abc", min_size=1)),  # which does not name its master
    st.integers(min_value=1),
    st.lists(texts, min_size=1, max_size=2),
)


# Messages -----------------------------------------------------------------------------------------

#: What Celery or this package reads of a message, and some that look as if it did.
HEADERS = (
    "id", "retries", "timelimit", "eta", "expires", "group", "group_index", "root_id", "parent_id", "shadow",
    "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers", "stamps",
    "lang", "self", "task_id", "hostname", "delivery_info", "children", "called_directly", "reply_to",
)  # fmt: skip
EMBEDDED = ("callbacks", "errbacks", "chain", "chord")

_known_ids = st.sampled_from(["parked", "sent", "running", "idle", "failed"])
_pairs = st.lists(
    st.one_of(
        st.tuples(_known_ids | texts, st.integers(0, 10**15).map(str)),  # a token that nobody was given
        st.tuples(_known_ids, junk),
        junk,
    ),
    max_size=3,
)
_arguments = st.lists(_pairs | junk, max_size=2)
_keywords = st.dictionaries(
    st.sampled_from(["resent_at", "self", "args", "kwargs"]) | texts, junk, max_size=2
)
_forged = st.fixed_dictionaries({"resent_at": st.integers(0, 2**53)})
_embed = st.dictionaries(st.sampled_from(EMBEDDED), junk, max_size=4)
_bodies: st.SearchStrategy[Any] = st.one_of(
    st.tuples(_arguments, _keywords | _forged, _embed),
    st.tuples(junk, junk, junk),
    st.fixed_dictionaries({}, optional={"args": _arguments | junk, "kwargs": _keywords | junk, "id": junk}),
    junk,
)
_raw_bodies = _bodies.map(lambda body: json.dumps(body).encode()) | st.binary(max_size=50)


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    """Some of it as it should be, some of it not."""
    headers: dict[str, Any] = {"task": "goalstate.order", "id": str(uuid4()), "lang": "py", "retries": 0}
    headers |= draw(st.dictionaries(st.sampled_from(HEADERS), junk, max_size=3))
    old = draw(st.integers(0, 9)) == 0
    raw = draw(_raw_bodies)
    if old:  # version 1 of Celery's protocol has its headers in the body
        body = {**headers, "args": draw(_arguments | junk), "kwargs": draw(_keywords | _forged | junk)}
        # What the message's own headers say wins over these.
        headers = draw(st.dictionaries(st.sampled_from(HEADERS), junk, max_size=2))
        raw = json.dumps(body).encode()
    odd = draw(st.integers(0, 9)) == 0
    return message(
        raw,
        headers,
        draw(st.sampled_from(_CONTENT_TYPES) | texts) if odd else "application/json",
        draw(st.sampled_from(_ENCODINGS) | texts) if odd else "utf-8",
        **draw(st.dictionaries(st.sampled_from(["reply_to", "correlation_id"]), texts, max_size=1)),
    )


def message(
    body: bytes,
    headers: dict[str, Any],
    content_type: str | None = "application/json",
    encoding: str | None = "utf-8",
    **properties: Any,
) -> dict[str, Any]:
    """A message as it lies in a queue of Redis."""
    return {
        "body": base64.b64encode(body).decode(),
        "content-type": content_type,
        "content-encoding": encoding,
        "headers": headers,
        "properties": {
            "body_encoding": "base64",
            "delivery_tag": str(uuid4()),
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            "delivery_mode": 2,
            "priority": 0,
            **properties,
        },
    }


_CONTENT_TYPES = [
    None,
    "application/x-python-serialize",
    "application/x-yaml",
    "application/data",
    "text/plain",
]
_ENCODINGS = [None, "binary", "utf-16", "idna", "no-such"]
