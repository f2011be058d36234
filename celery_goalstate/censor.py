"""Whoever asks Celery how it is configured is not told the index's password.

`celery report`, `celery inspect conf` and Flower show what Celery's filter leaves of `app.conf`. That knows a
secret by its name. Why ours is added to those names: docs/decisions/0012-celery-hides-the-index-url.md.
"""

from __future__ import annotations

import re
from typing import Any

import celery.app.utils

# Also behind a prefix, as in Django's settings. There it is the broker's URL too, which by default is that of
# the index: Celery 5.7 hides its password only where the setting has no prefix.
_NAMES = "GOALSTATE_INDEX_URL|_BROKER_(READ_|WRITE_)?URL"


def hide_index_url() -> None:
    """Have Celery mask the URLs of index and broker in this process. Saying it again changes nothing."""
    utils: Any = celery.app.utils  # whose stubs know none of it
    hidden: re.Pattern[str] = utils.HIDDEN_SETTINGS
    if _NAMES not in hidden.pattern:
        utils.HIDDEN_SETTINGS = re.compile(f"{hidden.pattern}|{_NAMES}", hidden.flags)
