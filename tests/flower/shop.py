"""What `celery --app tests.flower.shop` finds."""

from __future__ import annotations

import os
from pathlib import Path

from tests.flower.app import make_engine

app = make_engine(os.environ["SHOP_BROKER"], os.environ["SHOP_INDEX"], Path(os.environ["SHOP_HANGING"])).app
