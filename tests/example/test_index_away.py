"""The site while the engine's Redis does not answer: what people asked for is kept, and they are told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.example.conftest import ROOT
from tests.servers import free_port

# Another process, for its engine is on a Redis that is not there.
SCRIPT = """
import django
django.setup()
from django.core.management import CommandError, call_command
from django.test import Client
from example_project.fleet.models import Host

call_command("migrate", verbosity=0)
call_command("load_inventory", "example_project/inventory.csv", verbosity=0)
client = Client(headers={"host": "localhost"})

response = client.post("/racks/r04/goal", {"goal": "DOWN"})
print(response.status_code, response.content.decode().strip())
print(Host.objects.filter(goal="DOWN").count(), "goals kept")
response = client.get("/hosts/web-017/")
print(response.status_code, "The engine's index does not answer." in response.content.decode())

inventory = open("example_project/inventory.csv").read().replace(",web,", ",api,", 1)
open(f"{OUTPUT}/moved.csv", "w").write(inventory)
try:
    call_command("load_inventory", f"{OUTPUT}/moved.csv")
except CommandError as error:
    print(error)
print(Host.objects.get(pk="web-001").goal_pool)
"""


def test_what_people_ask_for_is_kept_and_they_are_told(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", f"OUTPUT = {str(tmp_path)!r}\n{SCRIPT}"],
        cwd=ROOT,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "example_project.settings",
            "DATABASE_PATH": str(tmp_path / "fleet.sqlite3"),
            "BROKER_URL": f"redis://127.0.0.1:{free_port()}/0",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    posted, kept, page, loaded, pool = ran.stdout.splitlines()
    assert posted == ("503 Saved. The engine's index does not answer; the next resync will find the hosts.")
    assert kept == "20 goals kept"
    assert page == "200 True"
    assert loaded.startswith("loaded, but the engine could not be told; a resync will do: ")
    assert pool == "api"
