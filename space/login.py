"""Identity of the visitor. In a Space: the Hub account. On a local machine: always `visitor`.

Gradio's login outside a Space is a mock that gives every visitor the name of the machine's owner (docs/design/hub.md
8.3). It is active as soon as a page has a LoginButton, so there is none unless this process runs in a Space.
"""

from __future__ import annotations

import time
from typing import Any

import gradio as gr
from gradio import oauth
from gradio.utils import get_space

from bot.errors import Refused
from bot.jobs.request import REPO_NAME
from bot.settings import Settings

LOCAL_VISITOR = "visitor"


def login_required(settings: Settings) -> bool:
    """Return whether others can reach the page: it is public, or hosted."""
    return settings.public or get_space() is not None


def check_start(settings: Settings) -> None:
    """Refuse to start a public page without real logins. Raises Refused LOGIN_REQUIRED."""
    if not login_required(settings):
        return
    if get_space() is None:
        raise Refused(
            "LOGIN_REQUIRED",
            "A public page needs real logins, and these exist only in a Space.",
            "Run it in a Space with `hf_oauth: true`, or unset MERGEBOT_PUBLIC to serve yourself only.",
        )
    if not (oauth.OAUTH_CLIENT_ID and oauth.OAUTH_CLIENT_SECRET and oauth.OPENID_PROVIDER_URL and oauth.OAUTH_SCOPES):
        raise Refused(
            "LOGIN_REQUIRED",
            "This Space has no OAuth application, so login is impossible.",
            "Add `hf_oauth: true` to the metadata of the Space's README.md.",
        )


def visitor(request: gr.Request | None, settings: Settings) -> str | None:
    """Name of the visitor; None if a login is required and missing."""
    if not login_required(settings):
        return LOCAL_VISITOR
    profile = _session(request).get("oauth_info") or {}
    if profile.get("expires_at") is not None and profile["expires_at"] < time.time():
        return None
    name = (profile.get("userinfo") or {}).get("preferred_username")
    return name if isinstance(name, str) and REPO_NAME.match(name) else None


def require(name: str | None) -> str:
    """Raises Refused LOGIN_REQUIRED."""
    if name is None:
        raise Refused("LOGIN_REQUIRED", "You are not logged in.", "Log in with the button at the top, then ask again.")
    return name


def _session(request: gr.Request | None) -> dict[str, Any]:
    """Content of the signed cookie; empty without one, or if no cookies are read here."""
    inner = getattr(request, "request", None)
    scope = getattr(inner, "scope", None) or {}
    session = scope.get("session")
    return dict(session) if session else {}
