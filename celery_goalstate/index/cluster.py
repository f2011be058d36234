"""How the index talks to a Redis Cluster: one round trip to each node, and no node is in the others' way.

redis-py's own pipeline sends each command again, alone, when a node did not answer. With many commands for a
node that swallows them a caller would wait for minutes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from redis import RedisCluster
from redis import exceptions as errors

from celery_goalstate.index.connection import Argument, Command, server_of

#: After asking for the slots comes a pause of so many times what it took: each silent node costs a time-out.
PAUSE = 4

#: Everything that redis-py raises; the errors of its cluster client are a family of their own.
REDIS_ERRORS = (errors.RedisError, errors.RedisClusterException)

#: The node is away, or the slots are with other nodes now.
_SLOTS_MAY_HAVE_MOVED = (errors.ConnectionError, errors.TimeoutError, errors.ClusterDownError)
#: A slot has moved, or is being moved. (`MovedError` is an `AskError`.)
_TO_FOLLOW = (errors.AskError, errors.TryAgainError)


class Cluster:
    """Sends commands to the nodes that hold their keys. `client` repeats nothing by itself."""

    def __init__(self, client: RedisCluster) -> None:
        self._client: Any = client
        self._may_ask_at = 0.0

    def node_of(self, key: Argument) -> Any:
        """The node that has a key's slot, or None if none has."""
        try:
            return self._client.get_node_from_key(key)
        except errors.SlotNotCoveredError:
            return None

    def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """As `Server.exchange`, with all nodes one after the other."""
        nodes: dict[str, Any] = {}  # by name: nodes themselves have no hash in redis-py 6
        asked: defaultdict[str, list[int]] = defaultdict(list)
        for position, command in enumerate(commands):
            node = self.node_of(_key(command))
            name = node.name if node else ""
            nodes[name] = node
            asked[name].append(position)
        replies: list[Any] = [None] * len(commands)
        for name, positions in asked.items():
            sent = [commands[position] for position in positions]
            for position, reply in zip(positions, self._exchange(nodes[name], sent), strict=True):
                replies[position] = reply
        return replies

    def _exchange(self, node: Any, commands: Sequence[Command]) -> list[Any]:
        if node is None:
            missing = errors.ClusterDownError("CLUSTERDOWN no node serves the slot")
            self.find_slots()
            return [missing] * len(commands)
        client = self._client.get_redis_connection(node)  # held: with it end its connections
        replies = server_of(client).exchange(commands)
        if any(isinstance(reply, _SLOTS_MAY_HAVE_MOVED) for reply in replies):
            self.find_slots(node.name)
        return [
            self._follow(command, reply) if isinstance(reply, _TO_FOLLOW) else reply
            for command, reply in zip(commands, replies, strict=True)
        ]

    def _follow(self, command: Command, reply: Any) -> Any:
        try:
            return self._client.execute_command(*command)
        except REDIS_ERRORS as error:
            return error
        except AttributeError:
            return reply  # redis-py does not find its way to a node that has no slots yet

    def find_slots(self, last: str | None = None) -> None:
        """Ask the nodes, the one named `last` last, who has which slots; the next call goes by that."""
        began = time.monotonic()
        if began < self._may_ask_at:
            return
        with suppress(*REDIS_ERRORS):  # the next call fails with it
            self._client.nodes_manager.initialize(last_failed_node_name=last)
        now = time.monotonic()
        self._may_ask_at = now + PAUSE * (now - began)


def _key(command: Command) -> Argument:
    """Any of the command's keys: all are in one slot."""
    return command[3] if command[0] in {"EVAL", "EVALSHA"} else command[1]
