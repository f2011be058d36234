"""Orders, what was paid for them, and their parcels."""

from django.db import models


class Order(models.Model):
    number = models.CharField(max_length=20, primary_key=True)
    state = models.CharField(max_length=20, default="placed")
    goal = models.CharField(max_length=20, default="shipped")
    fence = models.BigIntegerField(default=0)


class Payment(models.Model):
    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="payments")
    amount = models.IntegerField()


class Parcel(models.Model):
    order = models.OneToOneField(Order, on_delete=models.CASCADE, primary_key=True)
    state = models.CharField(max_length=20, default="packed")
