"""Load hosts from an inventory CSV: new ones arrive as UP, known ones get their facts brought up to date."""

import csv
from pathlib import Path

from django.core.management.base import BaseCommand, CommandError
from django.core.validators import validate_slug
from django.db import transaction

from celery_goalstate.exceptions import IndexUnavailable
from example_project.fleet.maintenance import set_pool
from example_project.fleet.models import Host

TEXTS = ("name", "rack", "pool", "model", "serial", "os")
NUMBERS = ("unit", "cores", "memory_gib", "disk_gib")
FACTS = ("rack", "unit", "model", "serial", "os", "cores", "memory_gib", "disk_gib")


class Command(BaseCommand):
    help = f"Load hosts from a CSV with the columns {', '.join(TEXTS + NUMBERS)}. All of it or nothing."

    def add_arguments(self, parser):
        parser.add_argument("path", type=Path, help="the inventory, a CSV with a header line")

    def handle(self, *, path, verbosity, **_options):
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                hosts = self._read(path, file)
        except OSError as error:
            raise CommandError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise CommandError(f"{path} is not UTF-8: {error}") from error
        try:
            known, moved = self._save(hosts)
        except IndexUnavailable as error:
            raise CommandError(
                f"loaded, but the engine could not be told; a resync will do: {error}"
            ) from error
        if verbosity:
            new = sum(host.name not in known for host in hosts)
            self.stdout.write(
                f"{len(hosts)} hosts in {path.name}: "
                f"{new} new, {len(hosts) - new} known, {len(moved)} to change pool"
            )

    @transaction.atomic
    def _save(self, hosts):
        known = dict(Host.objects.values_list("name", "goal_pool"))
        # State, goal and pool of a known host are the engine's business; its goal pool follows below.
        Host.objects.bulk_create(hosts, update_conflicts=True, unique_fields=["name"], update_fields=FACTS)
        moved = [host for host in hosts if host.name in known and known[host.name] != host.pool]
        for host in moved:
            set_pool(Host.objects.filter(pk=host.name), host.pool)
        return known, moved

    def _read(self, path, file):
        reader = csv.DictReader(file, strict=True)
        missing = [column for column in TEXTS + NUMBERS if column not in (reader.fieldnames or ())]
        if missing:
            raise CommandError(f"{path}: the header lacks {', '.join(missing)}")
        hosts = {}
        try:
            for row in reader:
                host = self._host(row)
                if host.name in hosts:
                    raise ValueError(f"{host.name} is listed twice")  # noqa: TRY301 - one place adds path and line
                hosts[host.name] = host
        except (ValueError, csv.Error) as error:
            # The inner reader's count: the outer one lags behind when a line cannot be parsed.
            raise CommandError(f"{path}, line {reader.reader.line_num}: {error}") from error
        if not hosts:
            raise CommandError(f"{path} lists no hosts")
        return list(hosts.values())

    def _host(self, row):
        if None in row or None in row.values():
            raise ValueError("wrong number of fields")
        values = {column: row[column].strip() for column in TEXTS}
        for column, value in values.items():
            longest = Host._meta.get_field(column).max_length
            if not 1 <= len(value) <= longest:
                raise ValueError(f"{column} must have 1 to {longest} characters, not {len(value)}")
        for column in NUMBERS:
            if not row[column].strip().isdecimal() or not 1 <= (number := int(row[column])) <= 32767:
                raise ValueError(f"{column} must be a whole number from 1 to 32767, not {row[column]!r}")
            values[column] = number
        for column in ("name", "rack"):
            if not validate_slug.regex.match(values[column]):
                raise ValueError(
                    f"{column} must consist of letters, digits, '-' and '_', not {values[column]!r}"
                )
        host = Host(**values, goal_pool=values["pool"])
        host.workloads = host.slots
        return host
