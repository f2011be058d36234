"""The pages: who may do what, and nothing that waits on Flower's event loop."""

from __future__ import annotations

import inspect
import logging
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from flower import options as flower_options
from flower import urls
from flower.utils.blocking import BlockingOperationRunner
from flower.utils.tasks import get_task_by_id
from flower.views import BaseHandler
from tornado.web import HTTPError, RequestHandler, StaticFileHandler, authenticated, url

from celery_goalstate.cli.output import moment, relative, span
from celery_goalstate.contrib.flower import content
from celery_goalstate.display import LONGEST_NAME, printable
from celery_goalstate.engine import Engine
from celery_goalstate.entity import EntityRef
from celery_goalstate.exceptions import GoalStateError, UnknownKind

logger = logging.getLogger(__name__)

T = TypeVar("T")

STATIC = files("celery_goalstate.contrib.flower") / "static"

#: What a page says once something was done: in the URL is only the name.
NOTICES = {
    "enqueued": "It is evaluated as soon as a worker is free.",
    "unchanged": "Its schedule is as it was before: it is due already.",
    "deleted": "The entity is forgotten.",
    "unknown": "There was nothing to forget: the entity is not known.",
    "paused": "The kind is paused: nothing of it starts until it is resumed. What runs now finishes.",
    "resumed": "The kind is resumed.",
}


def missing() -> list[str]:
    """What this Flower lacks that the pages use."""
    last, get_argument = urls.handlers[-1], inspect.signature(BaseHandler.get_argument)
    found = {
        "flower.urls.handlers, whose last one is for all other URLs": (
            isinstance(last, tuple) and last[0] == ".*"
        ),
        "BaseHandler.unauthenticated_api": hasattr(BaseHandler, "unauthenticated_api"),
        "BaseHandler.get_argument(escape=)": "escape" in get_argument.parameters,
        "BlockingOperationRunner.run": hasattr(BlockingOperationRunner, "run"),
        **{
            f"the option {name}": name in flower_options.default_options
            for name in ("auth", "basic_auth", "read_only", "url_prefix")
        },
    }
    return [name for name, is_there in found.items() if not is_there]


def add(namespace: str | None) -> None:
    """Put the pages before Flower's handler for all other URLs, unless they are there already."""
    if any(getattr(handler, "name", None) == "goalstate" for handler in urls.handlers):
        return
    given = {"namespace": namespace}
    urls.handlers[-1:-1] = [
        url(r"/goalstate", BoardPage, given, name="goalstate"),
        url(r"/goalstate/([^/]+)", KindPage, given),
        url(r"/goalstate/([^/]+)/(.+)", EntityPage, given),
        # Not below /goalstate, where any name may be a kind's.
        url(r"/goalstate-static/(.*)", StaticFileHandler, {"path": str(STATIC)}, name="goalstate-static"),
    ]


class Refusal(HTTPError):
    """An answer that is no page: its status, and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(status, "%s", why)


class Page(BaseHandler):  # type: ignore[misc]  # Flower has no types
    """What all pages have in common."""

    def initialize(self, namespace: str | None) -> None:
        """Tornado's constructor: of which engine the pages are."""
        self.namespace = namespace

    def set_default_headers(self) -> None:
        """Flower's, but for leave to read this from other sites; and no other site may frame the buttons."""
        super().set_default_headers()
        for name in ("Origin", "Headers", "Methods"):
            self.clear_header(f"Access-Control-Allow-{name}")
        self.set_header("Content-Security-Policy", "frame-ancestors 'self'")

    # -- who may change something

    def check_xsrf_cookie(self) -> None:
        """Refuse what another site sent: always, where Flower asks only those who have to log in."""
        site, origin = (self.request.headers.get(name) for name in ("Sec-Fetch-Site", "Origin"))
        if site and site != "same-origin":
            raise Refusal(403, f"this was sent by another site (Sec-Fetch-Site: {printable(site)})")
        # No browser lets a page forge either of the two. Over plain HTTP it sends Origin alone.
        if origin and not site and origin.partition("://")[2] != self.request.host:
            raise Refusal(
                403,
                f"this was sent from {printable(origin)}, and Flower is {printable(self.request.host)}."
                " If a proxy is between you, let it pass the Host header on",
            )
        RequestHandler.check_xsrf_cookie(self)

    def prepare(self) -> Any:
        """Refuse changes where nobody may make any."""
        if self.request.method == "POST" and (why := self.changes_nothing_because):
            raise Refusal(*why)
        return super().prepare()

    @property
    def changes_nothing_because(self) -> tuple[int, str] | None:
        """The status and the reason with which all changes are refused; None: they are not."""
        options = self.application.options
        if options.read_only:
            return 403, "Flower is read-only"
        if not (options.basic_auth or options.auth or self.unauthenticated_api):
            return 401, (
                "changes need a Flower that knows who asks: start it with --basic-auth or --auth, or with"
                " FLOWER_UNAUTHENTICATED_API=true in its environment"
            )
        return None

    @property
    def user(self) -> str:
        """Who asks, as far as Flower knows."""
        name = ""
        if isinstance(self.current_user, str):
            name = self.current_user
        elif self.application.options.basic_auth:  # checked by now
            credentials = b64decode(self.request.headers["Authorization"].split()[1]).decode()
            name = credentials.partition(":")[0]
        return printable(name.strip())[:LONGEST_NAME] or "flower"

    # -- asking the index

    async def ask(self, about: str, question: Callable[..., T], *args: Any) -> T:
        """What `question(app, namespace, *args)` returns, asked in a thread of Flower's."""
        answer = await self.application.blocking_runner.run(
            "goalstate", about, _answer, question, self.capp, self.namespace, *args
        )
        if isinstance(answer, GoalStateError):
            raise answer
        return answer  # type: ignore[no-any-return]

    async def change(self, about: str, what: Callable[[Engine], str]) -> str:
        """What `what(engine)` returns, the name of a notice; and a line in the log."""

        def change(app: Any, namespace: str | None) -> str:
            with content.opened(app, namespace) as engine:
                return what(engine)

        try:
            notice = await self.ask(about, change)
        except UnknownKind as error:
            raise Refusal(404, str(error)) from error
        except GoalStateError as error:
            raise Refusal(503, str(error)) from error
        logger.info("%s: %s, by %s", about, notice, self.user)
        return notice

    # -- answering

    def board_url(self, **asked: str | None) -> str:
        """The page of all kinds, with what is asked of it."""
        return f"{self.reverse_url('goalstate')}{_query(asked)}"

    def kind_url(self, kind: str, /, **asked: str | None) -> str:
        """Where a kind is paused and resumed; then it goes to the `board_url` of what is asked."""
        return f"{self.reverse_url('goalstate')}/{quote(kind, safe='')}{_query(asked)}"

    def entity_url(self, kind: str, id: str) -> str:
        """The page of an entity. All of an id is escaped, its slashes too: a proxy may merge some."""
        return f"{self.reverse_url('goalstate')}/{quote(kind, safe='')}/{quote(id, safe='')}"

    def task_url(self, task_id: str | None) -> str | None:
        """Flower's page of a task; None if it does not know it."""
        if task_id is None or get_task_by_id(self.application.events, task_id) is None:
            return None
        return str(self.reverse_url("task", task_id))

    def our_static_url(self, path: str) -> str:
        """Where a file of this package is, with its version."""
        place = {"static_path": str(STATIC), "static_url_prefix": self.reverse_url("goalstate-static", "")}
        return str(StaticFileHandler.make_static_url(place, path))

    @property
    def notice(self) -> str | None:
        """What has just been done."""
        return NOTICES.get(self.get_argument("done", "", escape=False))

    def show(self, template: str, *, troubles: Sequence[str] = (), **values: Any) -> None:
        """Render one of our templates."""
        self.render(
            f"goalstate/{template}.html",
            page=self,
            troubles=troubles,
            moment=moment,
            printable=printable,
            relative=relative,
            span=span,
            may_change=self.changes_nothing_because is None,
            **values,
        )

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """A page with the reason, in Flower's frame."""
        error = kwargs.get("exc_info", (None, None))[1]
        if not isinstance(error, HTTPError) or status_code == 500 or self._asks_for_a_password(error):
            super().write_error(status_code, **kwargs)
            return
        if not hasattr(self, "_current_user"):
            self.current_user = None  # not asked for by the frame, which would be one more error
        why = error.get_message() or self._reason
        self.show("error", status=status_code, why=why[:1].upper() + why[1:])

    def _asks_for_a_password(self, error: HTTPError) -> bool:
        return error.status_code == 401 and not isinstance(error, Refusal)


def _query(asked: Mapping[str, str | None]) -> str:
    given = {name: value for name, value in asked.items() if value}
    return f"?{urlencode(given)}" if given else ""


def _answer(question: Callable[..., T], *args: Any) -> T | GoalStateError:
    """The answer, or the error that has one: Flower would take that for one of its own."""
    try:
        return question(*args)
    except GoalStateError as error:
        return error


class BoardPage(Page):
    """`/goalstate`: all kinds, and lists of what fails, is late, runs, or comes next."""

    @authenticated
    async def get(self) -> None:
        """The page; with `?entity=order/42`, that of the entity."""
        asked = {
            name: self.get_argument(name, "", escape=False) or None for name in ("list", "kind", "entity")
        }
        if asked["entity"]:
            kind, _, id = asked["entity"].partition("/")
            ref_of(kind, id)
            self.redirect(self.entity_url(kind, id))
            return
        board = await self.ask("all kinds", content.board, asked["list"], asked["kind"])
        self.show("board", troubles=board.troubles, board=board, tabs=content.TABS, asked=asked)


class KindPage(Page):
    """`/goalstate/<kind>`: pause and resume."""

    @authenticated
    def get(self, kind: str) -> None:
        """The lists, of this kind alone."""
        self.redirect(self.board_url(kind=kind))

    @authenticated
    async def post(self, kind: str) -> None:
        """`do` is `pause` or `resume`; then back to the page that this came from."""
        ref_of(kind, "any")
        do, user = self.get_body_argument("do", ""), self.user

        def pause(engine: Engine) -> str:
            engine.pause(kind, by=user)
            return "paused"

        def resume(engine: Engine) -> str:
            engine.resume(kind)
            return "resumed"

        done = await self.change(kind, chosen(do, {"pause": pause, "resume": resume}))
        came_from = {name: self.get_query_argument(name, None) for name in ("list", "kind")}
        self.redirect(self.board_url(**came_from, done=done), status=303)


class EntityPage(Page):
    """`/goalstate/<kind>/<id>`: all that is known of one entity."""

    @authenticated
    async def get(self, kind: str, id: str) -> None:
        """The page; 404 if the entity is not known."""
        ref, sheet, troubles = ref_of(kind, id), None, []
        try:
            sheet = await self.ask(str(ref), content.sheet, ref)
        except UnknownKind as error:
            raise Refusal(404, str(error)) from error
        except GoalStateError as error:
            troubles.append(printable(str(error)))
        if sheet is not None and not sheet.status:
            self.set_status(404)
        self.show("entity", troubles=troubles, ref=ref, sheet=sheet, took=content.took)

    @authenticated
    async def post(self, kind: str, id: str) -> None:
        """`do` is `enqueue` or `delete`."""
        ref = ref_of(kind, id)

        def enqueue(engine: Engine) -> str:
            return "enqueued" if engine.enqueue(ref).changed else "unchanged"

        def delete(engine: Engine) -> str:
            return "deleted" if engine.delete(ref) else "unknown"

        do = self.get_body_argument("do", "")
        done = await self.change(str(ref), chosen(do, {"enqueue": enqueue, "delete": delete}))
        there = self.board_url(done=done) if do == "delete" else f"{self.entity_url(kind, id)}?done={done}"
        self.redirect(there, status=303)


def ref_of(kind: str, id: str) -> EntityRef:
    """The entity that is asked for. Raises `Refusal` if there can be none of that name."""
    try:
        return EntityRef(kind, id)
    except ValueError as error:
        raise Refusal(404, f"give an entity as KIND/ID, as in order/42: {error}") from error


def chosen(do: str, choices: dict[str, T]) -> T:
    """What is to be done. Raises `Refusal` if that is not among the choices."""
    if do not in choices:
        raise Refusal(400, f"do is {printable(do)!r}; send one of {', '.join(choices)}")
    return choices[do]
