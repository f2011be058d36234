"""What error pages (with DEBUG) and mails about errors do not show."""

import re

from django.views.debug import SafeExceptionReporterFilter

SECRETS = SafeExceptionReporterFilter.hidden_settings.pattern


class ReporterFilter(SafeExceptionReporterFilter):
    """Django knows secrets by their names; the URLs of broker, index and results may hold passwords too."""

    hidden_settings = re.compile(f"{SECRETS}|BROKER_URL|INDEX_URL|RESULT_BACKEND", re.IGNORECASE)
