"""The view of metrics: for staff, or whoever has the token, and for nobody else."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

SITE = """
import types
import django
from django.conf import settings

settings.configure(
    CELERY_BROKER_URL="memory://",
    ROOT_URLCONF="__main__",
    SECRET_KEY="secret",
    MIDDLEWARE=["__main__.authenticate"],
)
django.setup()

from celery import Celery
from celery_goalstate import Engine, Entity, Rules
from celery_goalstate.contrib.django.metrics import MetricsView
from django.test import Client
from django.urls import path

app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
engine = Engine(app)

@engine.register
class Order(Entity):
    rules = Rules({{}})

def authenticate(get_response):
    def middleware(request):
        user = {user!r}
        if user is not None:
            request.user = types.SimpleNamespace(**user)
        return get_response(request)
    return middleware

urlpatterns = [path("metrics", MetricsView.as_view({options}))]
reply = Client().{method}("/metrics", headers={headers!r})
print(reply.status_code, reply["Content-Type"], reply.get("Cache-Control"))
print(reply.content.decode())
"""
STAFF = {"is_active": True, "is_staff": True}


def reply(
    user: dict[str, bool] | None = None, options: str = "", authorization: str = "", method: str = "get"
) -> str:
    headers = {"Authorization": authorization} if authorization else {}
    script = SITE.format(user=user, options=options, headers=headers, method=method)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], text=True, capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "known",
    [
        {"user": STAFF},
        {"user": STAFF, "options": "token=''"},
        {"options": "token='t0ken'", "authorization": "Bearer t0ken"},
        {"options": "token='tök', engine=engine", "authorization": "bearer t%C3%B6k".replace("%C3%B6", "ö")},
    ],
    ids=str,
)
def test_it_shows_the_metrics(known: dict[str, Any]) -> None:
    told = reply(**known)
    assert told.startswith("200 text/plain")
    assert "no-store" in told
    assert 'goalstate_sweeper_up{kind="order"} 0.0' in told
    assert "python_info" not in told


@pytest.mark.parametrize(
    "unknown",
    [
        {},
        {"user": {"is_active": True, "is_staff": False}},
        {"user": {"is_active": False, "is_staff": True}},
        {"options": "token=''", "authorization": "Bearer "},
        {"authorization": "Bearer None"},
        {"options": "token='t0ken'", "authorization": "Bearer other"},
        {"options": "token='t0ken'", "authorization": "Basic t0ken"},
        {"options": "token='t0ken'", "method": "head"},
    ],
    ids=str,
)
def test_it_refuses_all_others(unknown: dict[str, Any]) -> None:
    told = reply(**unknown)
    assert told.startswith("403 ")
    assert "goalstate" not in told


def test_it_changes_nothing_so_there_is_nothing_to_post() -> None:
    assert reply(user=STAFF, method="post").startswith("405 ")
