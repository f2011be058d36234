import os

os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
import django

django.setup()
from django.core.management import call_command  # noqa: E402 - needs the settings

call_command("migrate", run_syncdb=True, verbosity=0)
