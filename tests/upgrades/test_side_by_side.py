"""Workers and producers of two releases share an index and a queue while one is rolled out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.servers import poll
from tests.upgrades.conftest import ROOT, Site

Patch = tuple[str, str, str]  #: a file, what is there now, what is there instead

#: One more argument in each message, one more field in each record, one more word about each kind.
NEXT: list[Patch] = [
    ("messages/wakeup.py", "kwargs = {} if resent_at", 'kwargs = {"hue": "blue"} if resent_at'),
    (
        "messages/wakeup.py",
        'else {"resent_at": resent_at}',
        'else {"hue": "blue", "resent_at": resent_at}',
    ),
    (
        "index/lua/common.lua",
        "fields.token = next_token()\n",
        "fields.token, fields.hue = next_token(), 'blue'\n",
    ),
    (
        "index/redis.py",
        'json.dumps({"layout": LAYOUT, "shards": shards})',
        'json.dumps({"layout": LAYOUT, "hue": "blue", "shards": shards})',
    ),
]
#: Messages do not tell when they were sent again, and records nothing of batches nor of the last report.
PREVIOUS: list[Patch] = [
    ("messages/wakeup.py", 'else {"resent_at": resent_at}', "else {}"),
    ("index/lua/finish.lua", "(fields.alone or report.lost_at) and '1' or nil", "nil"),
    ("index/lua/finish.lua", "fields.last = name_of(report)", "fields.last = nil"),
]


@pytest.fixture(params=["next", "previous"])
def other_release(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A directory with another release of the package."""
    directory = tmp_path / request.param
    shutil.copytree(ROOT / "celery_goalstate", directory / "celery_goalstate")
    for name, old, new in {"next": NEXT, "previous": PREVIOUS}[request.param]:
        file = directory / "celery_goalstate" / name
        text = file.read_text()
        assert text.count(old) == 1, f"{old!r} is not in {name} exactly once"
        file.write_text(text.replace(old, new))
    return directory


@pytest.mark.timeout(400)
def test_two_releases_share_the_work(site: Site, other_release: Path) -> None:
    things = site.deploy("old")
    site.worker("old")
    other = site.worker("old", other_release)
    producers = [site.producer("old", "here-"), site.producer("old", "there-", other_release)]
    poll(
        "both releases evaluate what both enqueue",
        lambda: min(site.packages()[str(package)] for package in (ROOT, other_release)) > 100,
        timeout=120,
    )
    site.kill(other)  # what it was about is taken over by this release
    for prefix in ("here-", "there-"):
        things.world.open(prefix)
    assert [producer.wait() for producer in producers] == [0, 0]
    site.settle(things)
    for id in {line.entity for line in things.ledger.lines("", "enqueue")}:
        things.enqueue(id)  # so that this release has touched every record
    site.settle(things)
    assert site.violations("old") == []
    assert not [process.log for process in site.processes if "ERROR/" in process.output()]
    if other_release.name == "next":
        with site.valkey.client() as client:
            hues = {client.hget(key, "hue") for key in client.scan_iter("gs:{default:thing:0}:e:*")}
        assert "blue" in hues, "the field of the next release is kept"
