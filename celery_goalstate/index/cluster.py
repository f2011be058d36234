"""How the index talks to a Redis Cluster: all nodes at the same time, and no node is in the others' way.

redis-py's own pipeline asks one node after the other, and sends each command again, alone, when one did not
answer. With many commands for a node that swallows them a caller would wait for minutes.

A node that does not answer rests: whoever asks it is told so at once. Now and then one caller tries whether
it answers again. So a process gives no more than a fifth of one thread's time to a node that is away,
whatever waits for that node.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Thread
from typing import Any

from redis import exceptions as errors

from celery_goalstate.index.connection import Argument, Command, Sent, Server, server_of

logger = logging.getLogger(__name__)

#: After asking for the slots, or a node in vain, comes a pause of so many times what it took.
PAUSE = 4
#: Seconds that a node which was away has to answer when it is tried.
TRIAL = 1.0
#: Seconds. A node rests no shorter, since a connection can be refused at once, and no longer.
SHORTEST_REST, LONGEST_REST = 0.5, PAUSE * TRIAL

#: Everything that redis-py raises; the errors of its cluster client are a family of their own.
REDIS_ERRORS = (errors.RedisError, errors.RedisClusterException)

#: The node is away, or the slots are with other nodes now.
_SLOTS_MAY_HAVE_MOVED = (errors.ConnectionError, errors.TimeoutError, errors.ClusterDownError)
#: A slot has moved, or is being moved. (`MovedError` is an `AskError`.)
_TO_FOLLOW = (errors.AskError, errors.TryAgainError)


@dataclass(slots=True)
class Outage:
    """Of one node. Times are the monotonic clock's, in seconds."""

    since: float
    error: Exception
    rests_until: float = 0.0

    def rest(self, took: float) -> None:
        """Let nobody ask the node for a while: it was asked in vain for so many seconds."""
        self.rests_until = time.monotonic() + min(max(PAUSE * took, SHORTEST_REST), LONGEST_REST)


class NodeAway(errors.ConnectionError):
    """A node did not answer, or was not even asked, for it rests."""

    def __init__(self, name: str, outage: Outage, *, rests: bool) -> None:
        self.seconds = time.monotonic() - outage.since
        self.rests = rests
        super().__init__(f"{name} has not answered for {self.seconds:.0f} s: {outage.error}")
        self.__cause__ = outage.error


class Cluster:
    """Sends commands to the nodes that hold their keys. `client` repeats nothing by itself."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.timeout: float = client.get_connection_kwargs().get("socket_timeout") or math.inf
        self._may_ask_at = 0.0
        self._outages: dict[str, Outage] = {}  # by the node's name

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """As `Server.exchange`, with all nodes at the same time."""
        until = time.monotonic() + self.timeout
        clients: dict[str, Any] = {}  # by the node's name. They are held: with them end their connections
        asked: defaultdict[str, list[int]] = defaultdict(list)
        nobody = errors.ClusterDownError("CLUSTERDOWN no node serves the slot")
        replies: list[Any] = [nobody] * len(commands)
        for position, command in enumerate(commands):
            with suppress(errors.SlotNotCoveredError):
                node = self._client.get_node_from_key(_key(command))
                asked[node.name].append(position)
                if node.name not in clients:
                    clients[node.name] = self._client.get_redis_connection(node)
        servers = {name: server_of(client) for name, client in clients.items()}
        given = {name: [commands[position] for position in positions] for name, positions in asked.items()}
        for name, its_replies in self._ask(servers, given, until).items():
            for position, reply in zip(asked[name], its_replies, strict=True):
                replies[position] = reply
        if any(map(_slots_may_have_moved, replies)):
            self.find_slots()
        return [
            self._follow(command, reply, until) if isinstance(reply, _TO_FOLLOW) else reply
            for command, reply in zip(commands, replies, strict=True)
        ]

    def _ask(
        self, servers: Mapping[str, Server], commands: Mapping[str, Sequence[Command]], until: float
    ) -> dict[str, list[Any]]:
        """What each node replies to its commands: to all of them is sent, then all are waited for."""
        began = time.monotonic()
        replies = {name: [away] * len(commands[name]) for name, away in self._connect(servers).items()}
        sent: dict[str, Sent] = {}
        try:
            for name, server in servers.items():
                if name not in replies:
                    sent[name] = server.send(commands[name])
            while sent:
                name = next(iter(sent))
                replies[name] = sent[name].replies(until)
                del sent[name]
                if isinstance(replies[name][-1], errors.TimeoutError):
                    away = self._note(name, replies[name][-1], began)
                    replies[name] = [
                        away if isinstance(reply, errors.TimeoutError) else reply for reply in replies[name]
                    ]
        finally:
            for each in sent.values():  # something else was raised, by a signal say
                each.give_up()
        return replies

    # -- nodes that are away

    def _connect(self, servers: Mapping[str, Server]) -> dict[str, NodeAway]:
        """Have connections to these nodes; which are away."""
        away: dict[str, NodeAway] = {}

        def connect(name: str, server: Server) -> None:
            began = time.monotonic()
            try:
                if name in self._outages:
                    server.try_out(TRIAL)
                server.connect()
            except errors.RedisError as error:
                away[name] = self._note(name, error, began)
            else:
                if outage := self._outages.pop(name, None):
                    logger.info(
                        "the index's node %s answers again, after %.0f s",
                        name, time.monotonic() - outage.since,
                    )  # fmt: skip

        calls = []
        for name, server in servers.items():
            outage = self._outages.get(name)
            if outage is not None and time.monotonic() < outage.rests_until:
                away[name] = NodeAway(name, outage, rests=True)
            elif outage is not None or not server.is_connected:
                if outage is not None:
                    outage.rest(TRIAL)  # of all threads only this one tries it
                calls.append(partial(connect, name, server))
        _make_together(calls)
        return away

    def _note(self, name: str, error: Exception, began: float) -> NodeAway:
        """A node was asked in vain, from `began` until now."""
        outage = self._outages.get(name)
        if outage is None:
            outage = self._outages[name] = Outage(began, error)
            logger.warning(
                "the index's node %s does not answer: what it keeps waits, and all else goes on: %s",
                name, error,
            )  # fmt: skip
        outage.error = error
        outage.rest(time.monotonic() - began)
        return NodeAway(name, outage, rests=False)

    # -- slots that move

    def _follow(self, command: Command, reply: Any, until: float) -> Any:
        if time.monotonic() >= until:
            return reply
        try:
            return self._client.execute_command(*command)
        except REDIS_ERRORS as error:
            return error
        except AttributeError:
            return reply  # redis-py does not find its way to a node that has no slots yet

    def find_slots(self) -> None:
        """Ask a node that is not away who has which slots; the next call goes by that."""
        began = time.monotonic()
        nodes = self._client.nodes_manager
        known = nodes.startup_nodes
        answering = {name: node for name, node in known.items() if name not in self._outages}
        if began < self._may_ask_at or not answering:
            return
        self._may_ask_at = began + PAUSE * self.timeout  # other threads need not ask the same
        nodes.startup_nodes = answering
        try:
            with suppress(*REDIS_ERRORS):  # the next call fails with it
                nodes.initialize()
        finally:
            if nodes.startup_nodes is answering:  # not those that were found
                nodes.startup_nodes = known
            now = time.monotonic()
            self._may_ask_at = now + PAUSE * (now - began)
        for name in self._outages.keys() - {node.name for node in self._client.get_primaries()}:
            if self._outages.pop(name, None):
                logger.info("the index's node %s has been replaced", name)


def _slots_may_have_moved(reply: Any) -> bool:
    """Not if the node was not asked: then they were looked for not long ago."""
    return isinstance(reply, _SLOTS_MAY_HAVE_MOVED) and not (isinstance(reply, NodeAway) and reply.rests)


def _make_together(calls: Sequence[Callable[[], None]]) -> None:
    """Make calls that wait for others, at the same time: the first here, others in threads of their own."""
    threads = [Thread(target=call, daemon=True) for call in calls[1:]]
    for thread in threads:
        thread.start()
    for call in calls[:1]:
        call()
    for thread in threads:
        thread.join()


def _key(command: Command) -> Argument:
    """Any of the command's keys: all are in one slot."""
    return command[3] if command[0] in {"EVAL", "EVALSHA"} else command[1]
