"""The engine's own page in the admin: each kind at a glance, and what can be done about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import PermissionDenied
from django.db import transaction
from django.http import HttpRequest, HttpResponse, HttpResponseBadRequest, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import NoReverseMatch, reverse

from celery_goalstate.cli.output import relative
from celery_goalstate.contrib.django.entity import ModelEntity
from celery_goalstate.description import Description, Status
from celery_goalstate.display import one_line
from celery_goalstate.engine import Engine
from celery_goalstate.exceptions import IndexUnavailable
from celery_goalstate.index.base import LONGEST_PAGE
from celery_goalstate.overview import Overview as KindOverview
from celery_goalstate.registry import current_engine
from celery_goalstate.resync import RESYNC_ID, Resync, resync_kind

#: Quarantined entities of a kind that the page names.
NAMED = 20


@dataclass(frozen=True)
class _Row:
    """A kind, for the template."""

    kind: str
    overview: KindOverview
    statuses: list[tuple[Status, int, str]]  #: with a link to the rows, if there is one
    paused: str
    can_resync: bool


class OverviewAdmin(admin.ModelAdmin):  # type: ignore[type-arg]  # it cannot be given at run time
    """A page without a table. On a site of your own: `site.register(Overview, OverviewAdmin)`."""

    def has_add_permission(self, request: HttpRequest) -> bool:  # noqa: ARG002
        """Nothing is added."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        """Nothing is changed; `operate_overview` is for the buttons."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        """Nothing is deleted."""
        return False

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:  # noqa: ARG002
        """The page, or what one of its buttons does."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        user: Any = request.user
        may_operate = user.has_perm("goalstate.operate_overview")
        if request.method == "POST":
            if not may_operate:
                raise PermissionDenied
            return self._press(request)
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "title": "Goal states",
            "may_operate": may_operate,
            "media": self.media,
        }
        try:
            context |= self._what_there_is(current_engine())
        except IndexUnavailable as error:
            messages.warning(request, f"The engine's index does not answer. {error}")
        request.current_app = self.admin_site.name
        return TemplateResponse(request, "admin/goalstate/overview.html", context)

    class Media:  # noqa: D106 - Django's
        css = {"all": ["goalstate/admin.css"]}  # noqa: RUF012 - as Django reads it

    # -- what there is

    def _what_there_is(self, engine: Engine) -> dict[str, Any]:
        overviews = engine.overview()
        rows = [self._row(engine, overviews[kind]) for kind in _own_kinds(engine)]
        failed = [
            (row.kind, [self._failed(engine, each) for each in engine.list(row.kind, "failed", NAMED)])
            for row in rows
            if row.overview.counts[Status.FAILED]
        ]
        return {"statuses": list(Status), "kinds": rows, "failed": failed, "orphans": engine.orphans()}

    def _row(self, engine: Engine, overview: KindOverview) -> _Row:
        statuses = [
            (status, count, self._list_url(engine, overview.kind, status) if count else "")
            for status, count in overview.counts.items()
        ]
        paused = overview.paused
        return _Row(
            kind=overview.kind,
            overview=overview,
            statuses=statuses,
            paused=f"{relative(paused.since)}, by {paused.by}" if paused else "",
            can_resync=_can_resync(engine, overview.kind),
        )

    def _list_url(self, engine: Engine, kind: str, status: Status) -> str:
        """The list of these rows, if it can be filtered so."""
        url = self._url(engine, kind, "changelist")
        return f"{url}?goalstate={status}" if url and status is not Status.IDLE else ""

    def _failed(self, engine: Engine, found: Description) -> dict[str, str]:
        return {
            "id": found.id,
            "url": self._url(engine, found.kind, "change", found.id),
            "since": relative(found.quarantined),
            "error": one_line(found.error or "", 200),
        }

    def _url(self, engine: Engine, kind: str, view: str, *args: str) -> str:
        """A page of the kind's model; empty if there is none, or not with our filters."""
        from celery_goalstate.contrib.django.admin import GoalStateAdmin

        cls = engine.kind(kind).entity_class
        if cls is None or not issubclass(cls, ModelEntity):
            return ""
        if not isinstance(self.admin_site._registry.get(cls.model), GoalStateAdmin):
            return ""
        options = cls.model._meta
        try:
            return reverse(
                f"admin:{options.app_label}_{options.model_name}_{view}",
                args=args,
                current_app=self.admin_site.name,
            )
        except NoReverseMatch:
            return ""

    # -- what can be done

    def _press(self, request: HttpRequest) -> HttpResponse:
        engine, verb, kind = current_engine(), request.POST.get("verb", ""), request.POST.get("kind", "")
        acts: dict[str, tuple[Callable[[], object], str]] = {
            "pause": (partial(engine.pause, kind), f"Paused: {kind}."),
            "resume": (partial(engine.resume, kind), f"Resumed: {kind}."),
            "resync": (
                partial(engine.enqueue, engine.ref(resync_kind(kind), RESYNC_ID)),
                f"Resync asked for: {kind}.",
            ),
            "retry": (partial(_retry, engine, kind), f"All that is quarantined is enqueued: {kind}."),
        }
        if verb not in acts or kind not in engine.kinds:
            return HttpResponseBadRequest(
                "give a verb and a kind that there are\n", content_type="text/plain"
            )
        act, done = acts[verb]

        def run() -> None:
            try:
                act()
            except IndexUnavailable as error:
                self.message_user(request, f"Not done: the index does not answer. {error}", messages.ERROR)
                return
            self.message_user(request, done, messages.SUCCESS)

        LogEntry.objects.create(
            user_id=request.user.pk,
            content_type=ContentType.objects.get_for_model(self.model, for_concrete_model=False),
            object_id=kind,
            object_repr=kind,
            action_flag=CHANGE,
            change_message=done,
        )
        transaction.on_commit(run)
        return HttpResponseRedirect(request.path)


def _own_kinds(engine: Engine) -> Iterator[str]:
    """The kinds, without those that resync them."""
    for name in engine.kinds:
        cls = engine.kind(name).entity_class
        if cls is None or not issubclass(cls, Resync):
            yield name


def _can_resync(engine: Engine, kind: str) -> bool:
    return resync_kind(kind) in engine.tasks.values()


def _retry(engine: Engine, kind: str) -> int:
    """Enqueue the quarantined entities, as many as are listed at once."""
    found = engine.list(kind, "failed", LONGEST_PAGE)
    return engine.enqueue_many(engine.ref(each.kind, each.id) for each in found)
