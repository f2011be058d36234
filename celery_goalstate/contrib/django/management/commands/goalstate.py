"""`manage.py goalstate ...` is `celery -A PROJECT goalstate ...`, word for word."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import Any

import click
from celery.bin.base import CLIContext
from django.core.management.base import BaseCommand, CommandError, CommandParser

from celery_goalstate.cli import goalstate
from celery_goalstate.exceptions import ImproperlyConfigured
from celery_goalstate.registry import current_engine


class Command(BaseCommand):
    """The Celery CLI's own commands, for the app that this project has."""

    help = "See and operate entities on the way to their goal states."
    requires_system_checks = ()

    def run_from_argv(self, argv: list[str]) -> None:
        """From a shell: output and exit codes are those of `celery goalstate`."""
        # Django itself has obeyed these two, wherever they stand.
        djangos = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        djangos.add_argument("--settings")
        djangos.add_argument("--pythonpath")
        _, words = djangos.parse_known_args(argv[2:])
        prog = f"{Path(argv[0]).name} goalstate"
        try:
            context = _context()
        except CommandError as error:
            self.stderr.write(str(error))
            sys.exit(error.returncode)
        goalstate.main(args=words, prog_name=prog, obj=context)

    def create_parser(self, prog_name: str, subcommand: str, **options: Any) -> CommandParser:
        """For `call_command`, which hands over what it parses: all words are click's."""
        parser = super().create_parser(prog_name, subcommand, **options)
        defaults = vars(parser.parse_args([]))
        every_word: Any = lambda args: argparse.Namespace(**defaults, args=args)  # noqa: E731
        parser.parse_args = every_word  # type: ignore[method-assign]
        return parser

    def handle(self, *words: str, **options: Any) -> None:
        """By `call_command`. Raises `CommandError`, whose `returncode` is the exit code."""
        with (
            contextlib.redirect_stdout(options.get("stdout") or sys.stdout),
            contextlib.redirect_stderr(options.get("stderr") or sys.stderr),
        ):
            try:
                status = goalstate.main(
                    args=list(words), prog_name="goalstate", obj=_context(), standalone_mode=False
                )
            except click.ClickException as error:
                raise CommandError(error.format_message(), returncode=error.exit_code) from error
        if status:
            raise CommandError(f"goalstate {' '.join(words)}: exit code {status}", returncode=status)


def _context() -> CLIContext:
    try:
        app = current_engine().app
    except ImproperlyConfigured as error:
        raise CommandError(str(error), returncode=2) from error
    return CLIContext(app=app, no_color=not sys.stdout.isatty(), workdir=None)
