"""A view for Prometheus to scrape, where there is no room for `celery goalstate exporter`.

    path("metrics/goalstate", MetricsView.as_view(token=os.environ["METRICS_TOKEN"]))

Needs the extra `celery-goalstate[prometheus]`.
"""

from __future__ import annotations

import hmac
from functools import cache
from typing import Any

from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.utils.decorators import method_decorator
from django.views import View
from django.views.decorators.cache import never_cache
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from celery_goalstate.engine import Engine
from celery_goalstate.metrics import registry_of
from celery_goalstate.registry import current_engine

_registry = cache(registry_of)  # whose collector knows whether it has told that the index is away


@method_decorator(never_cache, name="dispatch")
class MetricsView(View):
    """The metrics of an engine, and none of the process: whichever web process answers, they are the same.

    For staff, and for whoever sends `Authorization: Bearer <token>`; any other gets a 403. Without a token,
    which is the default, for staff only.
    """

    http_method_names = ["get", "head", "options"]  # noqa: RUF012 - as Django's own

    token: str | None = None
    engine: Engine | None = None  #: by default that of Celery's current app

    def get(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:  # noqa: ARG002
        """Read the index, for `goalstate_index_timeout` at most."""
        if not (self._has_token(request) or self._is_staff(request)):
            raise PermissionDenied
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return HttpResponse(encode(self._metrics()), content_type=content_type)

    def _metrics(self) -> CollectorRegistry:
        return _registry(self.engine or current_engine())

    def _has_token(self, request: HttpRequest) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if not self.token or scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode(), self.token.encode())

    @staticmethod
    def _is_staff(request: HttpRequest) -> bool:
        user = getattr(request, "user", None)  # there may be no authentication at all
        return bool(user and user.is_active and user.is_staff)
