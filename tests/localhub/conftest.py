"""The fixture `local_hub`, and the checkout on the import path, however pytest was started."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.localhub.server import local_hub

__all__ = ["local_hub"]
