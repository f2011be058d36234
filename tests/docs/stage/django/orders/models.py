"""The reader's own model."""

from django.db import models


class Status(models.TextChoices):
    PAID = "paid"
    SHIPPED = "shipped"


class Order(models.Model):
    status = models.CharField(max_length=10, choices=Status)
    wanted = models.CharField(max_length=10, choices=Status)
