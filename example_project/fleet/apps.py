from django.apps import AppConfig


class FleetConfig(AppConfig):
    name = "example_project.fleet"
