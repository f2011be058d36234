"""Messages are lost, duplicated, reordered and held up, the broker goes away: nothing runs twice or never."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.acceptance.conftest import Broker, Scene
from tests.servers import RabbitMQ, RedisServer, Valkey, poll

QUEUE = "celery"


@pytest.fixture(autouse=True)
def guarantees(scene: Scene):
    yield
    assert scene.violations() == []


class Queue:
    """The queue's messages, as they lie in the broker."""

    def __init__(self, server: Valkey | RedisServer, scene: Scene) -> None:
        self._client = server.client()
        self._control = scene.things.app.control

    @contextlib.contextmanager
    def held_up(self) -> Iterator[None]:
        """Nobody consumes, so that messages stay where the test can reach them."""
        self._control.cancel_consumer(QUEUE)
        # A worker replies before it does as told, and may then still get a message for which it had asked.
        poll("no worker consumes", lambda: not any(self._consumed()))
        poll("no worker waits for a message", lambda: self._client.info("clients")["blocked_clients"] == 0)
        try:
            yield
        finally:
            self._control.add_consumer(QUEUE)

    def _consumed(self) -> list[list[object]]:
        """The queues that each worker consumes."""
        return list(self._control.inspect(limit=2, timeout=10).active_queues().values())

    def messages(self) -> list[str]:
        return self._client.lrange(QUEUE, 0, -1)

    def put(self, *messages: str) -> None:
        self._client.rpush(QUEUE, *messages)

    def lose(self) -> None:
        self._client.delete(QUEUE)

    def flush(self) -> None:
        self._client.flushall()

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def queue(broker_server: Broker, scene: Scene) -> Iterator[Queue]:
    if isinstance(broker_server, RabbitMQ):
        pytest.skip("reaches into a queue as it lies in Redis")
    with contextlib.closing(Queue(broker_server, scene)) as queue:
        yield queue


def test_duplicates_lead_to_one_evaluation(scene: Scene, queue: Queue) -> None:
    with queue.held_up():
        scene.things.enqueue(scene.id())
        (message,) = queue.messages()
        queue.put(message, message, message)
    scene.reached()
    queue.put(message)
    scene.settle()
    assert len(scene.looks()) == 1


def test_a_duplicate_during_the_evaluation_is_dropped(scene: Scene, queue: Queue) -> None:
    scene.world.script(scene.id(), "hold:" + scene.name, "reach")
    with queue.held_up():
        scene.things.enqueue(scene.id())
        messages = queue.messages()
    poll("the evaluation has begun", lambda: scene.lines("start"))
    queue.put(*messages * 3)
    scene.world.open(scene.name)
    scene.reached()
    scene.settle()
    assert len(scene.looks()) == 1


def test_lost_messages_are_sent_again(scene: Scene, queue: Queue) -> None:
    ids = [scene.id(number) for number in range(5)]
    with queue.held_up():
        for id in ids:
            scene.things.enqueue(id)
        assert len(queue.messages()) == len(ids)
        queue.lose()
    for id in ids:
        scene.reached(id)
    assert [len(scene.looks(id)) for id in ids] == [1] * len(ids)


def test_reordered_and_superseded_messages_lead_to_one_evaluation(scene: Scene, queue: Queue) -> None:
    ids = [scene.id(number) for number in range(5)]
    with queue.held_up():
        for delay in (0.4, 0.2, 0):
            for id in ids:
                scene.things.enqueue(id, delay)
        messages = queue.messages()
        queue.lose()
        queue.put(*reversed(messages))
    for id in ids:
        scene.reached(id)
    scene.settle(0.5)
    assert [len(scene.looks(id)) for id in ids] == [1] * len(ids)


def test_malformed_messages_harm_nobody(scene: Scene, queue: Queue) -> None:
    scene.things.enqueue(scene.id(), 0.5)
    for args in ([], ["nonsense"], [[["only-an-id"]]], [[[1, 2]]], [[[scene.id(), "1"]]], [{}], [[]], [None]):
        scene.things.app.send_task("goalstate.thing", args)
    scene.reached()
    scene.settle()
    assert len(scene.looks()) == 1


def test_a_flushed_broker_costs_no_evaluation(scene: Scene, queue: Queue) -> None:
    ids = [scene.id(number) for number in range(10)]
    for number, id in enumerate(ids):
        scene.things.enqueue(id, number % 2)
    queue.flush()
    for id in ids:
        scene.reached(id, timeout=30)


def test_a_broker_that_restarts_empty_costs_no_evaluation(scene: Scene) -> None:
    ids = [scene.id(number) for number in range(10)]
    for number, id in enumerate(ids):
        scene.things.enqueue(id, number % 3)
    scene.setup.broker.kill()
    try:
        assert scene.things.enqueue(scene.id(99)).changed
    finally:
        scene.setup.broker.restart()
    for id in [*ids, scene.id(99)]:
        scene.reached(id, timeout=45)
    for node in scene.setup.worker_cluster:
        assert node.ready()
