import uuid

from django.db import models

from celery_goalstate.contrib.django.models import GoalStateModel, unconverged_index


class Status(models.TextChoices):
    PAID = "paid"
    PACKED = "packed"
    SHIPPED = "shipped"
    CANCELLED = "cancelled"


class Order(GoalStateModel):
    status = models.CharField(max_length=10, choices=Status, default=Status.PAID)
    wanted = models.CharField(max_length=10, choices=Status, default=Status.SHIPPED)
    note = models.CharField(max_length=50, blank=True)
    packed = models.IntegerField(default=0)
    changed = models.DateTimeField(auto_now=True)

    class Meta:
        indexes = [unconverged_index("status", "wanted", name="order_unconverged")]


class Parcel(models.Model):
    """Plain: it inherits nothing of ours. Its state and its goal may be unknown."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    state = models.CharField(max_length=10, null=True)
    goal = models.CharField(max_length=10, null=True)


class Seat(models.Model):
    pk = models.CompositePrimaryKey("train", "number")
    train = models.CharField(max_length=20)
    number = models.IntegerField()
    state = models.CharField(max_length=10, default="free")
    goal = models.CharField(max_length=10, default="free")
