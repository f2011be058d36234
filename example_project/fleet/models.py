"""The source of truth: what each host is, what it should be, and what happened to it."""

from django.db import models
from django.db.models import F, Q

SLOT_CORES = 8


class State(models.TextChoices):
    UP = "UP"
    DRAINING = "DRAINING"
    DRAINED = "DRAINED"
    DOWN = "DOWN"


class Goal(models.TextChoices):
    UP = "UP"
    DOWN = "DOWN"


class HostQuerySet(models.QuerySet):
    # "At goal" in SQL and `Host.at_goal` in Python say the same.
    _at_goal = Q(state=F("goal"), pool=F("goal_pool"))

    def at_goal(self):
        return self.filter(self._at_goal)

    def unconverged(self):
        return self.exclude(self._at_goal)


class Host(models.Model):
    name = models.CharField(max_length=63, primary_key=True)
    rack = models.CharField(max_length=15, db_index=True)
    unit = models.PositiveSmallIntegerField()
    model = models.CharField(max_length=63)
    serial = models.CharField(max_length=31)
    os = models.CharField(max_length=31)
    cores = models.PositiveSmallIntegerField()
    memory_gib = models.PositiveIntegerField()
    disk_gib = models.PositiveIntegerField()

    pool = models.CharField(max_length=15)
    goal_pool = models.CharField(max_length=15)
    state = models.CharField(max_length=8, choices=State.choices, default=State.UP)
    goal = models.CharField(max_length=4, choices=Goal.choices, default=Goal.UP)
    workloads = models.PositiveSmallIntegerField()

    # Of the drain under way, or of the last one. A failed look counts in both.
    drain_looks = models.PositiveSmallIntegerField(default=0)
    drain_failures = models.PositiveSmallIntegerField(default=0)
    trouble = models.CharField(max_length=200, blank=True)

    # The fencing token of the evaluation that wrote last.
    fence = models.BigIntegerField(default=0)

    objects = HostQuerySet.as_manager()

    class Meta:
        ordering = ("rack", "unit")

    def __str__(self):
        return self.name

    @property
    def slots(self):
        """How many workloads fit on the host."""
        return max(1, self.cores // SLOT_CORES)

    @property
    def at_goal(self):
        return self.state == self.goal and self.pool == self.goal_pool


class Event(models.Model):
    class Kind(models.TextChoices):
        GOAL = "goal"
        LOOK = "look"
        FAILURE = "failure"
        DONE = "done"

    host = models.ForeignKey(Host, on_delete=models.CASCADE, related_name="events")
    at = models.DateTimeField(auto_now_add=True)
    kind = models.CharField(max_length=7, choices=Kind.choices)
    text = models.CharField(max_length=200)

    class Meta:
        ordering = ("-id",)

    def __str__(self):
        return f"{self.host_id}: {self.text}"
