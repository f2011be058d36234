"""Nobody sees the password of broker and index on the site: not on its pages, nor on those about errors."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar
from pathlib import Path

import pytest

from example_project.fleet import urls
from tests.example.conftest import ROOT
from tests.hostile.test_secrets import PASSWORD, QUOTED, is_told
from tests.servers import HOST, Process, Valkey, free_port

#: Every address of the site, as `urls.py` names it.
PAGES = {
    "fleet": "/",
    "fleet-json": "/fleet.json",
    "healthz": "/healthz",
    "host": "/hosts/web-017/",
}
BUTTONS = {
    "host-goal": "/hosts/web-017/goal",
    "host-pool": "/hosts/web-017/pool",
    "rack-goal": "/racks/r04/goal",
}
FORM = {"goal": "DOWN", "pool": "api"}
NOT_FOUND = ["/no/such/page", "/hosts/nobody/", "/?rack=nowhere", "/admin/"]


class Site:
    """What a browser gets from the example's site."""

    def __init__(self, port: int) -> None:
        self.url = f"http://{HOST}:{port}"
        self._cookies = CookieJar()
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self._cookies))

    def ask(self, path: str, form: dict[str, str] | None = None) -> tuple[int, str]:
        data = None if form is None else urllib.parse.urlencode(form).encode()
        tokens = [str(cookie.value) for cookie in self._cookies if cookie.name == "csrftoken"]
        request = urllib.request.Request(self.url + path, data, {"X-CSRFToken": "".join(tokens)})
        try:
            with self._opener.open(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def answers(self) -> bool:
        try:
            return self.ask("/healthz")[0] == 200
        except OSError:
            return False


@pytest.mark.parametrize("debug", ["", "1"], ids=["production", "debug"])
@pytest.mark.parametrize("index", ["there", "locked", "away"])
def test_not_on_the_site(tmp_path: Path, index: str, debug: str) -> None:
    assert {*PAGES, *BUTTONS} == {page.name for page in urls.urlpatterns}
    said: dict[str, str] = {}
    with Valkey(tmp_path / "valkey") as server:
        with server.client() as client:
            client.config_set("requirepass", PASSWORD if index == "there" else "another")
        if index == "away":
            server.kill()
        url = f"redis://:{QUOTED}@{HOST}:{server.port}/0"
        # The example's settings, and an index that is named too, as a project with one elsewhere does.
        settings = tmp_path / "settings_with_index.py"
        settings.write_text(f"from example_project.settings import *\nCELERY_GOALSTATE_INDEX_URL = {url!r}\n")
        database, port = tmp_path / "fleet.sqlite3", free_port()
        env = {
            "DJANGO_SETTINGS_MODULE": settings.stem,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
            "DATABASE_PATH": str(database),
            "BROKER_URL": url,
            "DEBUG": debug,
        }
        manage = [sys.executable, "-m", "example_project.manage"]
        for command in ("migrate", "load_inventory example_project/inventory.csv"):
            done = subprocess.run(
                [*manage, *command.split()],
                cwd=ROOT,
                env={**os.environ, **env},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            said[command] = done.stdout + done.stderr
        running = Process(
            [*manage, "runserver", "--noreload", "--insecure", f"{HOST}:{port}"],
            log=tmp_path / "site.log",
            env=env,
            cwd=ROOT,
        )
        with running:
            site = Site(port)
            running.poll_until("the site answers", site.answers, timeout=60)

            def ask(path: str, form: dict[str, str] | None = None, *, name: str) -> int:
                status, said[f"{name} {path}"] = site.ask(path, form)
                return status

            assert [ask(path, name="page") for path in PAGES.values()] == [200] * len(PAGES)
            pressed = [ask(path, FORM, name="button") for path in BUTTONS.values()]
            assert pressed == [200 if index == "there" else 503] * len(BUTTONS)
            assert {ask(path, name="error") for path in NOT_FOUND} == {404}
            assert {ask(path, name="error") for path in BUTTONS.values()} == {405}
            database.unlink()
            assert {ask(path, name="failure") for path in PAGES.values()} == {500}
            said["log"] = running.output()
    for setting in ("CELERY_BROKER_URL", "CELERY_GOALSTATE_INDEX_URL"):
        assert (setting in said["failure /"]) == bool(debug), "the settings are shown"
    assert {name: text for name, text in said.items() if is_told(text)} == {}
