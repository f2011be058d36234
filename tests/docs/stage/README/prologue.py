from django.conf import settings

settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "site.sqlite3"}})
import django  # noqa: E402 - needs the settings

django.setup()
