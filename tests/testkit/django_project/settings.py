"""Django's settings: a database in memory, or the PostgreSQL on the port that the environment names."""

import os

PORT = os.environ.get("POSTGRES_PORT")
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "postgres",
        "USER": "test",
        "HOST": "127.0.0.1",
        "PORT": PORT,
    }
    if PORT
    else {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
}
INSTALLED_APPS = ["celery_goalstate.contrib.django", "shop"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
CELERY_BROKER_URL = "redis://localhost:1/0"
