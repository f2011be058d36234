"""What tests need that older releases among the supported ones of Celery and redis-py do not have."""

from __future__ import annotations

import celery
import pytest
import redis

CELERY = tuple(map(int, celery.__version__.split(".")[:2]))

needs_celery_5_6 = pytest.mark.skipif(
    CELERY < (5, 6), reason=f"Celery {celery.__version__} has no task_create_missing_queue_exchange_type"
)
needs_redis_py_8 = pytest.mark.skipif(
    redis.VERSION[0] < 8, reason=f"redis-py {redis.__version__}: Sentinel and clusters need redis-py 8"
)
