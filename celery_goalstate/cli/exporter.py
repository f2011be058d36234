"""`celery goalstate exporter`: a process for Prometheus to scrape."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import click
from celery.bin.base import CeleryCommand, CeleryOption

from celery_goalstate.cli.arguments import engine_of_command
from celery_goalstate.cli.commands import goalstate

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

    from celery_goalstate.engine import Engine


@goalstate.command(cls=CeleryCommand)
@click.option(
    "--port",
    cls=CeleryOption,
    type=click.IntRange(0, 65_535),
    default=9808,
    show_default=True,
    help="0: any that is free.",
)
@click.option(
    "--address",
    cls=CeleryOption,
    default="0.0.0.0",  # noqa: S104 - another machine's Prometheus is who asks
    show_default=True,
    help="On which it listens.",
)
@click.pass_context
def exporter(ctx: click.Context, port: int, address: str) -> None:
    """Serve metrics to Prometheus, at /metrics.

    Until the process is terminated. One is enough for an app: it reads the index, whatever the number of
    workers. /healthz says that it is alive; whether the index is, goalstate_index_up says. Needs
    celery-goalstate[prometheus].
    """
    with engine_of_command(ctx) as engine:
        serve = _application(engine)
        try:
            server = make_server(address, port, serve, _server_class(address), _RequestHandler)
        except OSError as error:
            raise click.ClickException(f"cannot listen on {address}, port {port}: {error}") from error
        with server:
            # As process 1 of a container it would not end by itself.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            click.echo(f"metrics of {', '.join(engine.kinds)}: {_url(address, server.server_port)}")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                click.echo()


def _application(engine: Engine) -> WSGIApplication:
    try:
        from prometheus_client import make_wsgi_app

        from celery_goalstate.metrics import registry_of
    except ImportError as error:
        raise click.UsageError(
            f"the exporter needs prometheus_client ({error}): pip install 'celery-goalstate[prometheus]'"
        ) from error
    metrics: WSGIApplication = make_wsgi_app(registry_of(engine))

    def serve(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                return metrics(environ, start_response)
            case "/healthz":
                return _text(start_response, "200 OK", "ok")
        return _text(start_response, "404 Not Found", "there are /metrics and /healthz")

    return serve


def _text(start_response: Callable[..., Any], status: str, text: str) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{text}\n".encode()]


class _Server(ThreadingMixIn, WSGIServer):
    """While one scrape waits for the index, others and /healthz are answered."""

    daemon_threads = True


class _ServerOn6(_Server):
    address_family = socket.AF_INET6


def _server_class(address: str) -> type[_Server]:
    return _ServerOn6 if ":" in address else _Server


class _RequestHandler(WSGIRequestHandler):
    timeout = 30  # seconds, for who connects and sends nothing

    def log_message(self, *_: object) -> None:
        """A scrape every few seconds is nothing to be told of."""


def _url(address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{port}/metrics"
