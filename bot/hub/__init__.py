"""The Hub: the only importer of huggingface_hub. Callers get values of this package and exceptions of `bot.errors`.

Import it after `bot.settings.activate`: the library reads its settings at import.
"""

from bot.hub.client import Hub, PinnedRepo, User, check_repo_id
from bot.hub.files import FileFact, RepoFiles
from bot.hub.ranges import Verified, how_verified, is_partial

__all__ = [
    "FileFact",
    "Hub",
    "PinnedRepo",
    "RepoFiles",
    "User",
    "Verified",
    "check_repo_id",
    "how_verified",
    "is_partial",
]
