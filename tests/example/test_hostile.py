"""Whatever a browser, or what pretends to be one, sends to the site: refused, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import hypothesis.strategies as st
import pytest
from django.test import Client

from example_project.celery import engine
from example_project.fleet.models import Event, Host
from tests.hostile import fuzz

pytestmark = pytest.mark.usefixtures("fleet")

words = st.text(st.characters(codec="utf-8"), max_size=30)
#: No part of these is a name that the fleet has.
strange = words.filter(lambda word: not word.startswith(("web-", "db-", "r0", "r1")))
paths = st.one_of(
    *(
        strange.map(lambda word, path=path: path.format(quote(word, safe="")))
        for path in ("/hosts/{}/goal", "/hosts/{}/pool", "/racks/{}/goal", "/hosts/{}/", "/hosts/web-017/{}x")
    )
)
known = st.sampled_from(["/hosts/web-017/goal", "/hosts/web-017/pool", "/racks/r04/goal"])
forms = st.dictionaries(st.sampled_from(["goal", "pool", "rack"]) | words, strange, max_size=3).filter(
    lambda form: form.get("goal") not in {"UP", "DOWN"} and form.get("pool") not in {"web", "db"}
)
types = st.sampled_from(
    [
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=x",
        "text/plain; charset=no-such",
        "",
    ]
)


def asking(method: str, path: Any, **more: Any) -> st.SearchStrategy[dict[str, Any]]:
    given = {"method": method, "path": path, **more}
    return st.fixed_dictionaries(
        {name: part if isinstance(part, st.SearchStrategy) else st.just(part) for name, part in given.items()}
    )


REQUESTS = st.one_of(
    asking("post", paths, data={"goal": "DOWN", "pool": "web"}),
    asking("post", known, data=forms),
    asking("generic", known, data=st.binary(max_size=60), content_type=types),
    asking("get", known | paths),
    asking("put", known),
    asking("delete", known),
    asking("post", "/fleet.json"),
    asking("get", "/fleet.json", data=strange.filter(bool).map(lambda rack: {"rack": rack})),
)


@fuzz.totals
def test_requests(client: Client, total: int, record_property: Callable[[str, object], None]) -> None:
    index: Any = engine.parts.index

    def stored() -> Any:
        return (
            repr(index._kinds),
            Event.objects.count(),
            list(Host.objects.order_by("name").values_list("name", "state", "goal", "pool", "goal_pool")),
        )

    before = stored()

    def try_one(request: dict[str, Any]) -> None:
        method, *more = ("generic", "POST") if request["method"] == "generic" else (request["method"],)
        answer = getattr(client, method)(*more, **{k: v for k, v in request.items() if k != "method"})
        assert 400 <= answer.status_code < 500, (answer.status_code, request)
        assert stored() == before, request

    record_property("summary", fuzz.fire(total, "requests", REQUESTS, try_one))
