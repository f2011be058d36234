"""What the consumer looks at before Celery does: how long a message may be held."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from celery_goalstate.messages.envelope import SKEW, check, limit_hold
from celery_goalstate.messages.wakeup import rejection

HORIZON = timedelta(seconds=30)


def eta(*, seconds: float, zone: str = "+00:00") -> str:
    ahead = datetime.now(UTC) + timedelta(seconds=seconds)
    if zone in {"", "Z"}:
        return ahead.replace(tzinfo=None).isoformat() + zone
    return ahead.astimezone(datetime.fromisoformat(f"2000-01-01T00:00:00{zone}").tzinfo).isoformat()


def new(**headers: Any) -> Any:
    """A message in version 2 of Celery's protocol."""
    return SimpleNamespace(headers={"task": "goalstate.order", "id": "1", **headers}, payload=[[], {}, {}])


def old(body: dict[str, Any], **headers: Any) -> Any:
    """A message in version 1: what its headers say wins over its body."""
    return SimpleNamespace(headers=headers, payload={"id": "1", "args": [], "kwargs": {}, **body})


@pytest.mark.parametrize("seconds", [-3600, 0, 29, 34])
def test_what_is_ahead_for_no_longer_than_anybody_publishes_is_left_alone(seconds: float) -> None:
    message = new(eta=(said := eta(seconds=seconds)))
    assert limit_hold(message, HORIZON) is None
    assert message.headers["eta"] == said


@pytest.mark.parametrize("zone", ["", "Z", "+00:00", "+14:00", "-11:30"])
@pytest.mark.parametrize("seconds", [37, 3600, 10**9])
def test_what_is_further_ahead_is_held_only_shortly(seconds: float, zone: str) -> None:
    message = new(eta=eta(seconds=seconds, zone=zone))
    ahead = limit_hold(message, HORIZON)
    assert ahead is not None
    assert seconds - 1 < ahead.total_seconds() <= seconds
    held = datetime.fromisoformat(message.headers["eta"]) - datetime.now(UTC)
    assert SKEW - timedelta(seconds=1) < held <= SKEW


@pytest.mark.parametrize("message", [new(), new(eta=None), old({}), old({"eta": None})])
def test_what_has_no_time_stays_without(message: Any) -> None:
    assert limit_hold(message, HORIZON) is None
    assert not message.headers.get("eta")


@pytest.mark.parametrize(
    "message",
    [
        old({"eta": eta(seconds=3600)}),
        old({}, eta=eta(seconds=3600)),
        old({"eta": eta(seconds=1)}, eta=eta(seconds=3600)),
    ],
)
def test_it_is_so_in_the_old_protocol_too(message: Any) -> None:
    assert limit_hold(message, HORIZON)
    read = {**message.payload, **message.headers}["eta"]
    assert datetime.fromisoformat(read) - datetime.now(UTC) <= SKEW


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"id": [1]}, "id"),
        ({"timelimit": 5}, "timelimit"),
        ({"stamped_headers": 5}, "stamped_headers"),
        ({"eta": "0001-01-01T00:00:00"}, "eta"),
        ({"expires": "9999-12-31T23:59:59"}, "expires"),
    ],
)
def test_headers_are_checked_in_both_protocols(headers: dict[str, Any], named: str) -> None:
    check(new())
    check(old({}))
    for message in (new(**headers), old({}, **headers), old(headers), old(headers, **headers)):
        with pytest.raises(ValueError, match=named):
            check(message)


@pytest.mark.parametrize(
    ("task", "kind", "public"),
    [
        ("goalstate.order", "order", "goalstate.enqueue"),
        ("goalstate.shop.order.line", "order.line", "goalstate.shop.enqueue"),
    ],
)
def test_whoever_sends_something_else_is_told_what_to_send(task: str, kind: str, public: str) -> None:
    assert rejection(task, kind, "no, thanks") == (
        f"{task} rejected a malformed message: no, thanks. Only the engine sends this task;"
        f" to enqueue an entity, send {public}(kind, id, deadline=None)"
    )
