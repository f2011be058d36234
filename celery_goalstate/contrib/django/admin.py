"""`GoalStateAdmin`: an admin of rows that the engine brings to their goals; and the engine's own page.

No template of the site is replaced: columns, filters, actions and one fieldset are added by methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.helpers import ACTION_CHECKBOX_NAME
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.admin.options import IS_POPUP_VAR
from django.contrib.admin.utils import quote, unquote
from django.core.exceptions import PermissionDenied
from django.db import router, transaction
from django.db.models import F, Model, Q, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseNotAllowed, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import path, reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString, mark_safe

from celery_goalstate.cli.output import relative, when
from celery_goalstate.contrib.django.columns import key_of, unconverged
from celery_goalstate.contrib.django.entity import ModelEntity, entity_class_of
from celery_goalstate.contrib.django.models import Overview
from celery_goalstate.contrib.django.overview import OverviewAdmin
from celery_goalstate.contrib.django.scheduling import (
    enqueue_on_commit,
    set_goal,
)
from celery_goalstate.description import Description, Status
from celery_goalstate.display import matrix_html, one_line
from celery_goalstate.exceptions import IndexUnavailable
from celery_goalstate.index.base import LONGEST_PAGE
from celery_goalstate.registry import current_engine
from celery_goalstate.rules import Rules

#: Goals that are actions of their own; of more, one is chosen on a page.
GOAL_ACTIONS = 8

#: Characters of an error in the list.
ERROR_WIDTH = 80

#: In a cell when the index does not answer, and where it knows nothing.
AWAY, NOTHING = "?", "–"

AWAY_TEXT = "The engine's index does not answer: what it knows is not shown. {}"

admin.site.register(Overview, OverviewAdmin)


# Filters -----------------------------------------------------------------------------------------


class ConvergenceFilter(admin.SimpleListFilter):
    """By the two columns: whether a row is at its goal."""

    title = "convergence"
    parameter_name = "converged"

    def __init__(self, request: HttpRequest, params: Any, model: Any, model_admin: Any) -> None:
        self.entity_class: type[ModelEntity] = model_admin.entity_class
        super().__init__(request, params, model, model_admin)

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:  # noqa: ARG002
        """Both."""
        return [("no", "on its way"), ("yes", "at its goal")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:  # noqa: ARG002
        """The rows that are meant."""
        state, goal = self.entity_class.state_field, self.entity_class.goal_field
        match self.value():
            case "no":
                return queryset.filter(unconverged(state, goal))
            case "yes":
                return queryset.filter(Q(**{f"{goal}__isnull": True}) | Q(**{state: F(goal)}))
        return queryset


class EngineFilter(admin.SimpleListFilter):
    """By what the index knows: at most as many rows as it lists at once."""

    title = "engine"
    parameter_name = "goalstate"

    def __init__(self, request: HttpRequest, params: Any, model: Any, model_admin: Any) -> None:
        self.entity_class: type[ModelEntity] = model_admin.entity_class
        super().__init__(request, params, model, model_admin)

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:  # noqa: ARG002
        """The lists of `Engine.list`."""
        return [
            ("failed", "quarantined"),
            ("failing", "failing, will be tried again"),
            ("overdue", "overdue"),
            ("running", "being evaluated"),
            ("scheduled", "scheduled"),
        ]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        """The rows that are meant."""
        wanted = self.value()
        if wanted not in dict(self.lookup_choices):
            return queryset
        try:
            found = current_engine().list(self.entity_class.kind, wanted, LONGEST_PAGE)
        except IndexUnavailable as error:
            messages.warning(request, AWAY_TEXT.format(error))
            return queryset.none()
        if len(found) == LONGEST_PAGE:
            messages.warning(
                request, f"There may be more: the filter “{self.title}” finds {LONGEST_PAGE:,} rows at most."
            )
        keys = []
        for each in found:
            try:
                keys.append(key_of(self.entity_class.model, each.id))
            except (TypeError, ValueError):  # somebody enqueued what is no row
                continue
        return queryset.filter(pk__in=keys)


# The admin ---------------------------------------------------------------------------------------


class _Described:
    """Of a `ChangeList`: its rows know what the index knows of them, asked for once for each page."""

    def get_results(self: Any, request: HttpRequest) -> None:
        """As Django's."""
        super().get_results(request)  # type: ignore[misc]
        if request.method == "GET":
            self.model_admin.describe_rows(request, list(self.result_list))


class GoalStateAdmin(admin.ModelAdmin):  # type: ignore[type-arg]  # it cannot be given at run time
    """An admin of a model whose rows are entities. With another theme's `ModelAdmin`, name this class first.

    `kind` says which, if rows of the model are of several kinds. The form never writes the state. A goal is
    written, like any other column, if it was changed; the row is then enqueued on commit.
    """

    kind: str | None = None

    class Media:  # noqa: D106 - Django's
        css = {"all": ["goalstate/admin.css"]}  # noqa: RUF012 - as Django reads it

    @property
    def entity_class(self) -> type[ModelEntity]:
        """The class whose entities are the rows. Raises `UnknownKind`."""
        return entity_class_of(current_engine(), self.model, self.kind)

    # -- the list

    def get_changelist(self, request: HttpRequest, **options: Any) -> type[Any]:
        """One whose rows are described."""
        return type("ChangeList", (_Described, super().get_changelist(request, **options)), {})

    def describe_rows(self, request: HttpRequest, rows: Sequence[Model]) -> None:
        """Have each row know what the index knows of it, in one call for all of them."""
        try:
            found = current_engine().describe_many(map(self.entity_class, rows))
        except IndexUnavailable as error:
            messages.warning(request, AWAY_TEXT.format(error))
            return
        for row, description in zip(rows, found, strict=True):
            row._goalstate = description  # type: ignore[attr-defined]  # for the columns

    def get_list_display(self, request: HttpRequest) -> Any:
        """The class's own columns, and three."""
        own = [*super().get_list_display(request)]
        return own + [name for name in ("goal_state", "next_evaluation", "last_error") if name not in own]

    def get_list_filter(self, request: HttpRequest) -> Any:
        """The class's own filters, and two."""
        return [*super().get_list_filter(request), ConvergenceFilter, EngineFilter]

    @admin.display(description="goal state")
    def goal_state(self, row: Model) -> str:
        """A column: `Packed → Shipped`, or `✓ Shipped`."""
        cls = self.entity_class
        state, goal = getattr(row, cls.state_field), getattr(row, cls.goal_field)
        if goal is None:
            return _label(row, cls.state_field)
        if state == goal:
            return f"✓ {_label(row, cls.state_field)}"
        return f"{_label(row, cls.state_field)} → {_label(row, cls.goal_field)}"

    @admin.display(description="next evaluation")
    def next_evaluation(self, row: Model) -> str:
        """A column: when, or why there is none."""
        return _of_index(row, _next_of)

    @admin.display(description="last error")
    def last_error(self, row: Model) -> str:
        """A column: how many failures in a row, and the error of the last one."""
        return _of_index(row, _error_of)

    # -- actions

    def get_actions(self, request: HttpRequest, action_location: Any = None) -> dict[str, Any]:
        """The class's own actions, and for who may change rows: set a goal, evaluate now, forget."""
        # Django 6.1 has lists of actions in several places, earlier ones only one.
        where = {} if action_location is None else {"action_location": action_location}
        actions: dict[str, Any] = super().get_actions(request, **where)
        wanted = self.actions is not None and IS_POPUP_VAR not in request.GET
        if wanted and self.has_change_permission(request):
            for function in self._actions():
                found = self.get_action(function, **where)
                if found is not None:
                    actions[function.__name__] = found
        return actions

    def _actions(self) -> Iterable[Any]:
        goals = self.entity_class.goal_choices()
        if len(goals) > GOAL_ACTIONS:
            yield _action("goalstate_goal", "Set a goal …", GoalStateAdmin._choose_goal)
        else:
            for number, (goal, label) in enumerate(goals):
                call = partial(GoalStateAdmin._set_goal, goal=goal, label=label)
                yield _action(f"goalstate_goal_{number}", f"Set goal to {label}", call)
        yield _action("goalstate_evaluate", "Evaluate now", GoalStateAdmin._evaluate)
        yield _action("goalstate_forget", "Forget what the engine knows …", GoalStateAdmin._confirm_forget)

    def _set_goal(self, request: HttpRequest, rows: Iterable[Any], *, goal: Any, label: str) -> None:
        keys = [row.pk for row in rows]
        database = router.db_for_write(self.model)
        with transaction.atomic(using=database):
            meant = self.model._default_manager.using(database).filter(pk__in=keys)
            set_goal(meant, goal, kind=self.entity_class.kind)
            self._log(request, rows, f"Goal set to {label}.")
        self.message_user(request, f"{_count(keys)}: the goal is {label}.", messages.SUCCESS)

    def _choose_goal(self, request: HttpRequest, rows: Iterable[Any]) -> HttpResponse | None:
        goals = self.entity_class.goal_choices()
        chosen = request.POST.get("goal", "")
        if chosen.isdecimal() and int(chosen) < len(goals):
            goal, label = goals[int(chosen)]
            self._set_goal(request, rows, goal=goal, label=label)
            return None
        labels = list(enumerate(label for _, label in goals))
        return self._page(request, rows, "Which goal?", "Set goal", action="goalstate_goal", choices=labels)

    def _evaluate(self, request: HttpRequest, rows: Iterable[Any]) -> None:
        rows = list(rows)
        entities = list(map(self.entity_class, rows))
        self._log(request, rows, "Evaluation asked for.")
        self._on_commit(
            request,
            partial(current_engine().enqueue_many, entities),
            f"{_count(rows)} will be evaluated now.",
        )

    def _confirm_forget(self, request: HttpRequest, rows: Iterable[Any]) -> HttpResponse | None:
        if "confirmed" not in request.POST:
            return self._page(
                request,
                rows,
                "Forget what the engine knows?",
                "Forget",
                action="goalstate_forget",
                text="Schedules, failures and quarantines of these are forgotten. The rows stay as they are.",
            )
        rows = list(rows)
        entities = list(map(self.entity_class, rows))
        self._log(request, rows, "Forgotten by the engine.")
        self._on_commit(
            request,
            partial(current_engine().delete_many, entities),
            f"{_count(rows)} forgotten by the engine.",
        )
        return None

    def _on_commit(self, request: HttpRequest, call: Callable[[], object], done: str) -> None:
        def run() -> None:
            try:
                call()
            except IndexUnavailable as error:
                self.message_user(request, f"Not done: the index does not answer. {error}", messages.ERROR)
            else:
                self.message_user(request, done, messages.SUCCESS)

        transaction.on_commit(run, using=router.db_for_write(self.model))

    def _log(self, request: HttpRequest, rows: Iterable[Any], message: str) -> None:
        LogEntry.objects.log_actions(request.user.pk, list(rows), CHANGE, message)  # type: ignore[arg-type]

    def _page(
        self,
        request: HttpRequest,
        rows: Iterable[Any],
        title: str,
        button: str,
        *,
        action: str,
        text: str = "",
        choices: Sequence[tuple[int, str]] = (),
    ) -> HttpResponse:
        """Asks before something is done to the rows."""
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "title": title,
            "text": text,
            "button": button,
            "rows": list(rows),
            "choices": choices,
            "action": action,
            "action_checkbox_name": ACTION_CHECKBOX_NAME,
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(request, "admin/goalstate/confirm.html", context)

    # -- the form

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        """The class's own, the state, and what the engine knows."""
        own = [*super().get_readonly_fields(request, obj)]
        state = self.entity_class.state_field
        fields = own if state in own else [*own, state]
        return fields if obj is None else [*fields, self._panel_of(request)]

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """What the engine knows, and then the class's own."""
        if obj is None:
            return super().get_fieldsets(request, obj)
        panel: Any = self._panel_of(request)
        own = [
            (title, {**options, "fields": [field for field in options["fields"] if field is not panel]})
            for title, options in super().get_fieldsets(request, obj)
        ]
        return [("Goal state", {"fields": [panel]}), *own]

    def _panel_of(self, request: Any) -> Callable[[Any], str]:
        """A readonly field; the same one whoever asks, as long as the request lasts."""
        panel: Callable[[Any], str] | None = getattr(request, "_goalstate_panel", None)
        if panel is None:

            @admin.display(description="engine")
            def goalstate(row: Any) -> str:
                return self._panel(request, row)

            panel = request._goalstate_panel = goalstate
        return panel

    def _panel(self, request: HttpRequest, row: Any) -> SafeString:
        cls = self.entity_class
        parts = [self._record(cls(row))]
        if isinstance(cls.rules, Rules):
            present = getattr(row, cls.state_field), getattr(row, cls.goal_field)
            # It escapes all that it holds.
            parts.append(mark_safe(matrix_html(cls.rules.matrix(present))))  # noqa: S308
        if self.has_change_permission(request, row):
            parts.append(self._buttons(row))
        return format_html('<div class="goalstate-panel">{}</div>', format_html_join("", "{}", zip(parts)))

    def _record(self, entity: ModelEntity) -> SafeString:
        engine = current_engine()
        try:
            found = engine.describe(entity)
        except IndexUnavailable as error:
            return format_html("<p>{}</p>", AWAY_TEXT.format(error))
        if found is None:
            return format_html("<p>The engine does not know {}.</p>", entity.ref)
        task, flower = found.task_id, engine.settings.flower_url
        lines = {
            "Entity": entity.ref,
            "Status": format_html("<strong>{}</strong>", found.status),
            "Next evaluation": _next_of(found),
            "Last evaluation": "never" if found.finished is None else relative(found.finished),
            "Failures in a row": found.failures or "",
            "Last error": found.error or "",
            "Celery task": (
                format_html('<a href="{}/task/{}">{}</a>', flower.rstrip("/"), task, task)
                if task and flower
                else task or ""
            ),
        }
        rows = format_html_join(
            "", '<tr><th scope="row">{}</th><td>{}</td></tr>', ((k, v) for k, v in lines.items() if v != "")
        )
        return format_html('<table class="goalstate-record">{}</table>', rows)

    def _buttons(self, row: Any) -> SafeString:
        buttons = format_html_join(
            " ",
            '<button type="submit" class="button" formaction="{}" formnovalidate>{}</button>',
            (
                (self._url("goalstate", quote(row.pk), verb), text)
                for verb, text in (("evaluate", "Evaluate now"), ("forget", "Forget …"))
            ),
        )
        # The key Enter presses the first button of a form: that one is to save, as ever.
        return format_html(
            '<div class="goalstate-buttons"><button type="submit" name="_save" hidden></button>{}</div>',
            buttons,
        )

    def _url(self, view: str, *args: Any) -> str:
        name = f"{self.opts.app_label}_{self.opts.model_name}_{view}"
        return reverse(f"admin:{name}", args=args, current_app=self.admin_site.name)

    def get_urls(self) -> list[Any]:
        """Django's, and that of the buttons."""
        name = f"{self.opts.app_label}_{self.opts.model_name}_goalstate"
        view = self.admin_site.admin_view(self._press)
        return [path("<path:object_id>/goalstate/<str:verb>/", view, name=name), *super().get_urls()]

    def _press(self, request: HttpRequest, object_id: str, verb: str) -> HttpResponse:
        """A button of the form was pressed."""
        if request.method != "POST":
            return HttpResponseNotAllowed(["POST"])
        row = self.get_object(request, unquote(object_id))
        act = {"evaluate": self._evaluate, "forget": self._confirm_forget}.get(verb)
        if row is None or act is None:
            raise Http404
        if not self.has_change_permission(request, row):
            raise PermissionDenied
        return act(request, [row]) or HttpResponseRedirect(self._url("change", quote(row.pk)))

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        """Writes all columns but the state, and the goal only if the form changed it; enqueues on commit."""
        cls = self.entity_class
        if change:
            left_out = {cls.state_field} | ({cls.goal_field} - set(form.changed_data))
            obj.save(
                update_fields=[
                    field.name
                    for field in obj._meta.concrete_fields
                    if not field.primary_key and not field.generated and field.name not in left_out
                ]
            )
        else:
            super().save_model(request, obj, form, change)
        enqueue_on_commit(obj, kind=cls.kind)


def _action(name: str, description: str, call: Callable[..., Any]) -> Any:
    def action(model_admin: Any, request: HttpRequest, queryset: QuerySet[Any]) -> Any:
        return call(model_admin, request, queryset)

    action.__name__ = name
    action.short_description = description.replace("%", "%%")  # type: ignore[attr-defined]
    return action


def _count(rows: Sequence[object]) -> str:
    return "1 row" if len(rows) == 1 else f"{len(rows):,} rows"


def _label(row: Any, field: str) -> str:
    display = getattr(row, f"get_{field}_display", None)
    return str(display() if display is not None else getattr(row, field))


def _of_index(row: Any, text: Callable[[Description], str]) -> str:
    if not hasattr(row, "_goalstate"):
        return AWAY
    found: Description | None = row._goalstate
    return NOTHING if found is None else text(found) or NOTHING


def _next_of(found: Description) -> str:
    if found.status is Status.FAILED:
        return "quarantined"
    return "" if found.status is Status.IDLE else when(found)


def _error_of(found: Description) -> str:
    if not found.error:
        return ""
    times = f"{found.failures}× " if found.failures > 1 else ""
    return one_line(f"{times}{found.error}", ERROR_WIDTH)
