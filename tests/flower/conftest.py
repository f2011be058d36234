"""A shop with a worker, and Flower as its operator starts it: real processes, asked over HTTP."""

from __future__ import annotations

import base64
import contextlib
import http.client
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlencode

import pytest

from celery_goalstate import Engine
from tests.docs.pages import blocks
from tests.flower.app import make_engine
from tests.servers import HOST, Process, Valkey, free_port, poll

ROOT = Path(__file__).parents[2]

#: As the documentation says it.
[CONFIG] = [block.text for block in blocks(Path("docs/how-to/flower.md")) if block.file == "flowerconfig.py"]


class Answer(NamedTuple):
    """What Flower answered."""

    status: int
    headers: Mapping[str, str]
    text: str

    @property
    def location(self) -> str:
        return self.headers["Location"]


class Flower(Process):
    """Flower, and a client that keeps its cookie as a browser does."""

    def __init__(self, shop: Shop, directory: Path, *options: str, config: str = CONFIG, **env: str) -> None:
        self.port = free_port()
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "flowerconfig.py").write_text(config)
        self.prefix = ""
        self.login: str | None = None  #: `ann:secret`, sent with every request
        self.cookie = ""
        super().__init__(
            [
                *(sys.executable, "-m", "celery", "--app", "tests.flower.shop", "flower"),
                *(f"--address={HOST}", f"--port={self.port}", "--conf=flowerconfig.py", *options),
            ],
            log=directory / "flower.log",
            env={**shop.env, **env},
            cwd=directory,
        )

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}{self.prefix}"

    def start(self) -> None:
        super().start()
        self.poll_until("Flower answers", self._answers, timeout=60)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return self.get("/healthcheck").status == 200
        return False

    def get(self, path: str, **headers: str) -> Answer:
        return self._request("GET", path, None, headers)

    def post(
        self, path: str, *, token: str | None = None, headers: Mapping[str, str] = {}, **fields: str
    ) -> Answer:
        """Send a form; `token` is by default the one of the page of all kinds."""
        token = self.token() if token is None else token
        body = urlencode({**fields, **({"_xsrf": token} if token else {})})
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        return self._request("POST", path, body, {**form, **headers})

    def token(self) -> str:
        """A token of this client's cookie. Also without buttons, each page of Flower sets the cookie."""
        self.get("/goalstate")
        found = re.search(r"_xsrf=([^;]+)", self.cookie)
        return found[1] if found else ""

    def _request(self, method: str, path: str, body: str | None, headers: Mapping[str, str]) -> Answer:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookie:
            sent["Cookie"] = self.cookie
        if self.login is not None:
            sent["Authorization"] = f"Basic {base64.b64encode(self.login.encode()).decode()}"
        connection = http.client.HTTPConnection(HOST, self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, f"{self.prefix}{path}", body, sent)
            response = connection.getresponse()
            answer = Answer(response.status, response.headers, response.read().decode())
        if cookie := answer.headers.get("Set-Cookie"):
            self.cookie = cookie.partition(";")[0]
        return answer


class Shop:
    """A broker, an index, and what is needed to run the shop's processes on them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.hanging = directory / "hanging"
        self.broker, self.index = Valkey(directory / "broker"), Valkey(directory / "index")
        self.env = {
            "SHOP_BROKER": self.broker.url,
            "SHOP_INDEX": self.index.url,
            "SHOP_HANGING": str(self.hanging),
            "PYTHONPATH": str(ROOT),
            "NO_COLOR": "1",
        }
        self.engine: Engine = make_engine(self.broker.url, self.index.url, self.hanging)
        self._flowers = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.broker)
            stack.enter_context(self.index)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.hanging.unlink(missing_ok=True)
        self._stack.close()

    @contextlib.contextmanager
    def worker(self) -> Iterator[Process]:
        """A worker that evaluates up to four at once."""
        command = [
            *(sys.executable, "-m", "celery", "--app", "tests.flower.shop", "worker", "--hostname=w1@shop"),
            *("--pool=threads", "--concurrency=4", "--task-events", "--loglevel=INFO"),
        ]
        log = self._directory / "worker.log"
        with Process(command, log=log, env=self.env, cwd=self._directory) as worker:
            worker.poll_until("the worker is ready", lambda: "w1@shop ready" in worker.output(), timeout=60)
            yield worker

    @contextlib.contextmanager
    def flower(
        self,
        *options: str,
        prefix: str = "",
        login: str | None = None,
        config: str = CONFIG,
        **env: str,
    ) -> Iterator[Flower]:
        """A Flower with these options; `login` is the one user that it lets in, and the client's."""
        self._flowers += 1
        given = [*options, *([f"--url-prefix={prefix}"] if prefix else [])]
        if login:
            given.append(f"--basic-auth={login}")
        flower = Flower(self, self._directory / f"flower-{self._flowers}", *given, config=config, **env)
        flower.prefix, flower.login = f"/{prefix}" if prefix else "", login
        with flower:
            yield flower

    def until(self, id: str, condition: Any) -> None:
        """Wait until the order's description is so."""

        def is_so() -> bool:
            found = self.engine.describe(self.order(id))
            return found is not None and bool(condition(found))

        poll(f"{id} is so", is_so, timeout=60)

    def order(self, id: str) -> Any:
        return self.engine.ref("order", id)


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A shop with a worker in which one order fails, one is given up, one hangs, and one is done."""
    with Shop(tmp_path_factory.mktemp("shop")) as shop, shop.worker():
        shop.hanging.touch()
        for id in ("fail-1", "gone-1", "hang-1", "done-1"):
            shop.engine.enqueue(shop.order(id))
        shop.until("fail-1", lambda found: found.failing)
        shop.until("gone-1", lambda found: found.quarantined)
        shop.until("hang-1", lambda found: found.doing)
        shop.until("done-1", lambda found: found.finished)
        yield shop
