"""A small shop. What a test changes comes from its environment."""

import json
import os

SECRET_KEY = "only for tests"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "celery_goalstate.contrib.django",
    "orders",
]
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
ROOT_URLCONF = "shop.urls"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
STATIC_URL = "static/"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

DATABASES = {"default": json.loads(os.environ["DATABASE"])}
if os.environ.get("OTHER_DATABASE"):
    DATABASES["other"] = json.loads(os.environ["OTHER_DATABASE"])

CELERY_BROKER_URL = os.environ.get("BROKER", "memory://")
CELERY_TASK_ALWAYS_EAGER = "BROKER" not in os.environ
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_GOALSTATE_SWEEP_INTERVAL = 0.1
CELERY_GOALSTATE_FAILURE_RETRY_DELAY = 0.2

#: More settings, or others, as a test wants them.
globals().update(json.loads(os.environ.get("MORE_SETTINGS", "{}")))
