"""Entry point of a Hugging Face Space: `python -m space [PORT]`, or a copy of this file as `app.py`.

Listens on all addresses, by default at the port that Spaces publish. docs/deploying.md describes the rest.
"""

from __future__ import annotations

import sys

from bot.service.serve import serve
from bot.settings import Settings

SPACE_PORT = 7860

if __name__ == "__main__":
    serve(Settings(), "0.0.0.0", int(sys.argv[1]) if len(sys.argv) > 1 else SPACE_PORT)
