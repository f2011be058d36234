"""Goals that are set by the servers that sites run on, with workers of several pools behind them."""

from __future__ import annotations

import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.django.conftest import Shop
from tests.servers import free_port, poll

REQUESTS = 300

#: The server's command, where its views are, and the pool of its workers.
SITES = {
    "gunicorn": (
        ["gunicorn", "--preload", "-w2", "--threads=4", "shop.wsgi", "--bind=127.0.0.1:{port}"],
        "orders/{pk}/ship/",
        "prefork",
    ),
    "uvicorn": (
        ["uvicorn", "shop.asgi:application", "--port={port}", "--lifespan=off"],
        "orders/{pk}/ship/async/",
        "threads",
    ),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SITES)
def test_every_request_is_answered_and_every_row_converges(served: Shop, name: str) -> None:
    pytest.importorskip(name)
    command, view, pool = SITES[name]
    port = free_port()
    served.python(
        f"""
from orders.models import Order
Order.objects.bulk_create([Order(pk=number, wanted="paid") for number in range(1, {REQUESTS} + 1)])
"""
    )

    def ask(number: int) -> int:
        url = f"http://127.0.0.1:{port}/{view.format(pk=number)}"
        with urllib.request.urlopen(url, timeout=300) as answer:
            return int(answer.status)

    def shipped() -> bool:
        printed = served.python(
            "from orders.models import Order; print(Order.objects.filter(status='shipped').count())"
        )
        return printed == f"{REQUESTS}\n"

    server = served.process("-m", *(word.format(port=port) for word in command), log=f"{name}.log")
    with server, served.worker(f"--pool={pool}", "-c4") as worker:
        worker.poll_until("the worker is ready", lambda: "ready." in worker.output(), timeout=120)
        server.poll_until(
            "the server listens",
            lambda: "Listening at" in server.output() or "running on" in server.output(),
            timeout=120,
        )
        with ThreadPoolExecutor(16) as threads:
            answers = list(threads.map(ask, range(1, REQUESTS + 1)))
        assert answers == [200] * REQUESTS
        poll("all orders are shipped", shipped, timeout=300, interval=1)
