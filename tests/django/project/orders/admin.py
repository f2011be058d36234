from django.contrib import admin

from celery_goalstate.contrib.django.admin import GoalStateAdmin

from .models import Order


@admin.register(Order)
class OrderAdmin(GoalStateAdmin):
    list_display = ["id", "note"]
