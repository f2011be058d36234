"""Measure a peer from its own environment.

    python -m benchmarks.peers PROGRAM costs|fill|publish NUMBER
    python -m benchmarks.peers PROGRAM work

A program has

    enqueue(id, delay)          of one job, in so many seconds; None: now
    duplicate()                 of a job that waits already, where it may be refused; whether it was
    enqueue_many(ids, delay)    of many in one call, if there is a way
    connect()                   an asynchronous context to do all this in, if it needs one
    work()                      a worker, if no command starts one

each a function or a coroutine function; only the first must be there.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from itertools import count, islice
from typing import Any

from benchmarks.peers.job import HOUR


async def costs(program: Any, calls: int) -> dict[str, float]:
    """Microseconds for each way to enqueue; each is done once before it counts."""
    ids = _ids()

    async def microseconds(call: Callable[[], Any], calls: int, each: int = 1) -> float:
        await _result(call())
        began = time.perf_counter()
        for _ in range(calls):
            await _result(call())
        return (time.perf_counter() - began) / calls / each * 1e6

    figures = {"enqueue": await microseconds(lambda: program.enqueue(next(ids), HOUR), calls)}
    if hasattr(program, "duplicate"):
        figures["duplicate"] = await microseconds(program.duplicate, calls)
        if not await _result(program.duplicate()):
            raise AssertionError("a duplicate was not refused")
    if hasattr(program, "enqueue_many"):
        many = 3 * calls
        batches = iter([list(islice(ids, many)) for _ in range(2)])
        figures["bulk"] = await microseconds(lambda: program.enqueue_many(next(batches), HOUR), 1, each=many)
    return figures


async def enqueue(program: Any, number: int, delay: float | None) -> None:
    """So many, the fastest way."""
    ids = islice(_ids(), number)
    if hasattr(program, "enqueue_many"):
        await _result(program.enqueue_many(list(ids), delay))
    else:
        for id in ids:
            await _result(program.enqueue(id, delay))


def _ids() -> Iterator[str]:
    """Of ten characters, and others in each process."""
    return (f"{os.getpid() % 10**5:05}{n:05}" for n in count())


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def run(program: Any, command: str, number: int) -> None:
    connect = getattr(program, "connect", nullcontext)
    async with connect():
        match command:
            case "costs":
                print(json.dumps(await costs(program, number)))
            case "fill":
                await enqueue(program, number, HOUR)
            case "publish":
                await enqueue(program, number, None)


def main() -> None:
    name, command, *number = sys.argv[1:]
    program = import_module(f"benchmarks.peers.{name}")
    if command == "work":
        program.work()
    else:
        asyncio.run(run(program, command, int(*number)))


if __name__ == "__main__":
    main()
