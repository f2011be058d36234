"""The pages. Anyone may press the buttons here; a real site puts `login_required` on each POST."""

from collections import Counter
from functools import wraps

from django.http import Http404, HttpResponse, HttpResponseBadRequest, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_POST, require_safe

from celery_goalstate.exceptions import IndexUnavailable
from example_project.celery import engine

from .entities import HostEntity
from .maintenance import set_goal, set_pool
from .models import Event, Goal, Host, State

RECENT_EVENTS = 40


def tells_engine(view):
    """Answer 503, not 500, when a change is saved but the engine's index is away."""

    @wraps(view)
    def wrapper(*args, **kwargs):
        try:
            return view(*args, **kwargs)
        except IndexUnavailable:
            return HttpResponse(
                "Saved. The engine's index does not answer; the next resync will find the hosts.\n",
                status=503,
                content_type="text/plain",
            )

    return wrapper


@require_safe
def healthz(request):
    Host.objects.exists()
    return HttpResponse("ok\n", content_type="text/plain")


@never_cache
@require_safe
def fleet(request):
    racks = Host.objects.order_by("rack").values_list("rack", flat=True).distinct()
    return render(
        request,
        "fleet/fleet.html",
        _fleet(request) | {"racks_to_choose": racks, "up": [Goal.UP], "down": [Goal.DOWN]},
    )


@never_cache
@require_safe
def fleet_json(request):
    """What the live page asks for every second: exactly what changes on it."""
    state = _fleet(request)
    return JsonResponse(
        {
            "hosts": {
                host.name: {
                    "state": host.state,
                    "goal": host.goal,
                    "pool": host.pool,
                    "load": host.load,
                    "trouble": host.trouble,
                    "label": host.label,
                }
                for rack in state["racks"]
                for host in rack["hosts"]
            },
            "racks": {
                rack["name"]: {key: rack[key] for key in ("at_goal", "total", "goals")}
                for rack in state["racks"]
            },
            "counts": state["counts"],
            "at_goal": state["at_goal"],
            "total": state["total"],
            "events": [
                {"host": event.host_id, "at": event.at.isoformat(), "kind": event.kind, "text": event.text}
                for event in state["events"]
            ],
        }
    )


@never_cache
@require_safe
def host(request, name):
    found = get_object_or_404(Host, pk=name)
    try:
        record = engine.describe(HostEntity(name))
        index_answers = True
    except IndexUnavailable:
        record, index_answers = None, False
    pools = Host.objects.order_by("pool").values_list("pool", flat=True).distinct()
    return render(
        request,
        "fleet/host.html",
        {
            "host": _shown(found),
            "record": record,
            "index_answers": index_answers,
            "pools": pools,
            "events": found.events.all()[:RECENT_EVENTS],
        },
    )


@require_POST
@tells_engine
def host_goal(request, name):
    return _change_goal(request, Host.objects.filter(pk=name), redirect("fleet:host", name))


@require_POST
@tells_engine
def rack_goal(request, rack):
    return _change_goal(request, Host.objects.filter(rack=rack), redirect("fleet:fleet"))


@require_POST
@tells_engine
def host_pool(request, name):
    pool = request.POST.get("pool", "")
    if not Host.objects.filter(pool=pool).exists():
        return HttpResponseBadRequest("pool must be one that the fleet has\n", content_type="text/plain")
    if not set_pool(Host.objects.filter(pk=name), pool):
        raise Http404
    return redirect("fleet:host", name)


def _change_goal(request, hosts, then):
    goal = request.POST.get("goal")
    if goal not in Goal.values:
        return HttpResponseBadRequest("goal must be UP or DOWN\n", content_type="text/plain")
    if not set_goal(hosts, Goal(goal)):
        raise Http404
    return then


def _fleet(request):
    """Everything the fleet page shows, of all racks or of the one asked for."""
    chosen = request.GET.get("rack", "")
    hosts = Host.objects.filter(rack=chosen) if chosen else Host.objects.all()
    racks = {}
    for host in hosts:
        racks.setdefault(host.rack, []).append(_shown(host))
    if chosen and not racks:
        raise Http404
    shown = [host for found in racks.values() for host in found]
    counts = Counter(host.state for host in shown)
    events = Event.objects.filter(host__rack=chosen) if chosen else Event.objects.all()
    return {
        "chosen": chosen,
        "racks": [
            {
                "name": name,
                "hosts": found,
                "total": len(found),
                "at_goal": sum(host.at_goal for host in found),
                "goals": sorted({host.goal for host in found}),
            }
            for name, found in racks.items()
        ],
        "counts": {state.value: counts[state.value] for state in State},
        "at_goal": sum(host.at_goal for host in shown),
        "total": len(shown),
        "events": events[:RECENT_EVENTS],
    }


def _shown(host):
    """The host with what only the pages need: its load in percent, and all of it in words."""
    host.load = round(100 * host.workloads / host.slots)
    words = [f"{host.name}: {host.state}", f"pool {host.pool}", f"{host.workloads} of {host.slots} workloads"]
    if host.state != host.goal:
        words.append(f"on its way to {host.goal}")
    if host.pool != host.goal_pool:
        words.append(f"to move to pool {host.goal_pool}")
    if host.trouble:
        words.append(f"last look failed: {host.trouble}")
    host.label = ", ".join(words)
    return host
