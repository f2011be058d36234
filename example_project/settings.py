"""Settings of the example, each from the environment where a deployment would differ."""

import os
from pathlib import Path

from django.core.management.utils import get_random_secret_key

HERE = Path(__file__).resolve().parent

# Nothing of the example outlives its process under this key (no sessions, no signed links),
# so a fresh one at every start is enough. A site with logins needs one that stays.
SECRET_KEY = os.environ.get("SECRET_KEY") or get_random_secret_key()
DEBUG = os.environ.get("DEBUG") == "1"
DEFAULT_EXCEPTION_REPORTER_FILTER = "example_project.reports.ReporterFilter"
ALLOWED_HOSTS = os.environ.get("ALLOWED_HOSTS", "localhost,127.0.0.1,[::1]").split(",")

INSTALLED_APPS = ["django.contrib.staticfiles", "celery_goalstate.contrib.django", "example_project.fleet"]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "example_project.urls"
WSGI_APPLICATION = "example_project.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {"context_processors": ["django.template.context_processors.request"]},
    }
]
STATIC_URL = "static/"
USE_TZ = True
TIME_ZONE = "UTC"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

DATABASE_PATH = Path(os.environ.get("DATABASE_PATH", HERE / "var" / "fleet.sqlite3"))
DATABASE_PATH.parent.mkdir(parents=True, exist_ok=True)
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": DATABASE_PATH,
        # One file, many processes. WAL lets the pages read while a worker writes. IMMEDIATE takes the
        # write lock when a transaction begins: two that both read first would otherwise fail with
        # "database is locked", whatever the time-out.
        "OPTIONS": {
            "timeout": 20,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
        },
    }
}

CELERY_BROKER_URL = os.environ.get("BROKER_URL", "redis://localhost:6379/0")
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_SEND_SENT_EVENT = True  # Flower then shows an evaluation from its sending on

# The index lives in the broker's Redis unless CELERY_GOALSTATE_INDEX_URL names another.
# Real hosts want a longer back-off than these: nobody watches them retry.
CELERY_GOALSTATE_FAILURE_RETRY_DELAY = 1.0
CELERY_GOALSTATE_MAX_RETRY_DELAY = 60.0
