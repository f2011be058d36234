"""A TCP proxy between the processes and their index, which can cut, delay and swallow."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, Self

from tests.servers import HOST, free_port


class Proxy:
    """Runs in a thread of its own."""

    def __init__(self, target_port: int) -> None:
        self.port = free_port()
        self.delay = 0.0  #: seconds that each piece of data takes, both ways
        self.is_open = True  #: does it take connections?
        self.is_silent = False  #: does it swallow whatever it is sent, both ways?
        self._target_port = target_port
        self._lose_replies = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def cut(self) -> None:
        """Cut all connections that there are."""
        self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    def close_for(self, seconds: float, until: threading.Event) -> None:
        """Cut all connections and take no new ones for a while."""
        self.is_open = False
        self.cut()
        until.wait(seconds)
        self.is_open = True

    @contextlib.contextmanager
    def silence(self) -> Iterator[None]:
        """Swallow everything, as a network does that is torn apart: nobody's connection ends before that."""
        self.is_silent = True
        try:
            yield
        finally:
            self.is_silent = False
            self.cut()  # each lacks a part of what was said

    def lose_replies(self, count: int) -> None:
        """Cut the next connections in the moment when a reply comes: what was asked has been done."""
        self._lose_replies = count

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._serve())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _serve(self) -> None:
        self._server = await asyncio.start_server(self._connect, HOST, self.port)

    async def _end(self) -> None:
        self._server.close()
        self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self.is_open:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection(HOST, self._target_port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, server_writer}
        self._writers |= both
        try:
            await asyncio.gather(
                self._carry(reader, server_writer, replies=False),
                self._carry(server_reader, writer, replies=True),
            )
        except OSError:
            pass
        finally:
            self._writers -= both
            for each in both:
                each.transport.abort()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, replies: bool
    ) -> None:
        while data := await reader.read(65536):
            if replies and self._lose_replies > 0:
                self._lose_replies -= 1
                raise ConnectionResetError
            if self.is_silent:
                continue
            if self.delay:
                await asyncio.sleep(self.delay)
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError  # one side has closed: so does the other
