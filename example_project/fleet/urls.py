from django.urls import path

from . import views

app_name = "fleet"
urlpatterns = [
    path("", views.fleet, name="fleet"),
    path("fleet.json", views.fleet_json, name="fleet-json"),
    path("healthz", views.healthz, name="healthz"),
    path("hosts/<slug:name>/", views.host, name="host"),
    path("hosts/<slug:name>/goal", views.host_goal, name="host-goal"),
    path("hosts/<slug:name>/pool", views.host_pool, name="host-pool"),
    path("racks/<slug:rack>/goal", views.rack_goal, name="rack-goal"),
]
