"""Login with the Hub (OAuth / OpenID), as the Space uses it.

There are no passwords: on a local machine the page offers the users to choose from. A login identifies a user and
grants nothing (its token has the role `oauth`), and codes are only sent back to this machine.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from bot.localhub.answers import HubError, bad_request
from bot.localhub.page import page
from bot.localhub.routing import Call, Routes
from bot.localhub.storage import Store
from bot.storage import exclusive, write_atomic

routes = Routes()
_LIFETIME_S, _CODE_LIFETIME_S = 28_800, 300
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class _Grant:
    user: str
    client: str
    redirect: str
    scope: str
    nonce: str
    expires: float


class Logins:
    """Unused codes, kept in memory for minutes, and the next login of a test."""

    def __init__(self, scripted: bool) -> None:
        self.scripted = scripted
        self._lock = threading.Lock()
        self._grants: dict[str, _Grant] = {}
        self._next: str | None = None

    def choose_next(self, user: str) -> None:
        with self._lock:
            self._next = user

    def take_next(self) -> str | None:
        with self._lock:
            chosen, self._next = self._next, None
            return chosen

    def hand_out(self, grant: _Grant) -> str:
        code = secrets.token_urlsafe(24)
        with self._lock:
            now = time.time()
            self._grants = {key: kept for key, kept in self._grants.items() if kept.expires > now}
            self._grants[code] = grant
        return code

    def redeem(self, code: str) -> _Grant | None:
        """The grant of a code, once."""
        with self._lock:
            grant = self._grants.pop(code, None)
        return grant if grant is not None and grant.expires > time.time() else None


def _key(store: Store) -> RSAKey:
    path = store.root / "oauth.key.json"
    with exclusive(store.root / "locks" / "oauth"):
        if not path.is_file():
            new = RSAKey.generate_key(2048, {"kid": secrets.token_hex(8), "use": "sig", "alg": "RS256"})
            write_atomic(path, json.dumps(new.as_dict(private=True)).encode())
            path.chmod(0o600)
        return RSAKey.import_key(json.loads(path.read_bytes()))


@routes.add("GET", "/.well-known/openid-configuration")
def configuration(call: Call) -> Response:
    base = call.endpoint
    return JSONResponse(
        {
            "issuer": base,
            "authorization_endpoint": f"{base}/oauth/authorize",
            "token_endpoint": f"{base}/oauth/token",
            "userinfo_endpoint": f"{base}/oauth/userinfo",
            "jwks_uri": f"{base}/oauth/jwks",
            "scopes_supported": ["openid", "profile", "email"],
            "response_types_supported": ["code"],
            "grant_types_supported": ["authorization_code"],
            "subject_types_supported": ["public"],
            "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
            "id_token_signing_alg_values_supported": ["RS256"],
        }
    )


@routes.add("GET", "/oauth/jwks")
def jwks(call: Call) -> Response:
    return JSONResponse({"keys": [_key(call.store).as_dict(private=False)]})


@routes.add("GET", "/oauth/authorize")
def authorize(call: Call) -> Response:
    client, redirect = call.query("client_id") or "", call.query("redirect_uri") or ""
    if call.query("response_type") != "code" or not client:
        raise bad_request("response_type=code and a client_id are expected")
    if urlsplit(redirect).scheme not in ("http", "https") or urlsplit(redirect).hostname not in _LOCAL_HOSTS:
        raise bad_request("redirect_uri must be on this machine")
    logins: Logins = call.notes["logins"]
    user = call.query("login") or logins.take_next()
    known = sorted(call.users.facts()["users"])
    if user is None:
        return _ask_who(call, known)
    if user not in known:
        raise bad_request("unknown user")
    grant = _Grant(
        user, client, redirect, call.query("scope") or "", call.query("nonce") or "", time.time() + _CODE_LIFETIME_S
    )
    answer = {"code": logins.hand_out(grant)}
    if state := call.query("state"):
        answer["state"] = state
    return RedirectResponse(f"{redirect}{'&' if '?' in redirect else '?'}{urlencode(answer)}", 302)


def _ask_who(call: Call, known: list[str]) -> Response:
    kept = [(key, value) for key, value in call.request.query_params.multi_items() if key != "login"]
    links = {name: html.escape(f"/oauth/authorize?{urlencode([*kept, ('login', name)])}") for name in known}
    rows = "".join(f'<li><a href="{link}">{html.escape(name)}</a></li>' for name, link in links.items())
    text = "<p>This Hub runs on your machine and has no passwords. Choose a user:</p>"
    return HTMLResponse(page("Log in", f"<h1>Log in to the local Hub</h1>{text}<ul>{rows}</ul>"))


@routes.add("POST", "/oauth/token")
def token(call: Call) -> Response:
    form = {key: values[0] for key, values in parse_qs(call.body.decode("utf-8", "replace")).items()}
    if form.get("grant_type") != "authorization_code":
        return JSONResponse({"error": "unsupported_grant_type"}, 400)
    logins: Logins = call.notes["logins"]
    grant = logins.redeem(form.get("code", ""))
    client = _client(call.request.headers.get("authorization")) or form.get("client_id")
    if grant is None or grant.client != client or form.get("redirect_uri", grant.redirect) != grant.redirect:
        return JSONResponse({"error": "invalid_grant"}, 400)
    access = "hf_oauth_" + secrets.token_urlsafe(32)
    call.users.add_login(grant.user, access, _LIFETIME_S)
    now = int(time.time())
    claims = {
        **_claims(call, grant.user),
        "iss": call.endpoint,
        "aud": grant.client,
        "iat": now,
        "exp": now + _LIFETIME_S,
        "auth_time": now,
    }
    if grant.nonce:
        claims["nonce"] = grant.nonce
    key = _key(call.store)
    signed = jwt.encode({"alg": "RS256", "kid": key.kid}, claims, key)
    return JSONResponse(
        {
            "access_token": access,
            "token_type": "bearer",
            "expires_in": _LIFETIME_S,
            "scope": grant.scope,
            "id_token": signed,
        }
    )


def _client(authorization: str | None) -> str | None:
    """The client id of an `Authorization: Basic` header. The secret is not checked because none was issued."""
    scheme, _, text = (authorization or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(text).decode().partition(":")[0]
    except ValueError:
        return None


def _claims(call: Call, user: str) -> dict[str, Any]:
    facts = call.users.facts()["users"].get(user, {})
    return {
        "sub": hashlib.sha256(f"local-hub-user:{user}".encode()).hexdigest()[:24],
        "name": facts.get("fullname", user),
        "preferred_username": user,
        "profile": f"{call.endpoint}/{user}",
        "picture": f"{call.endpoint}/_local/avatar.svg",
        "isPro": False,
        "orgs": [{"sub": org, "preferred_username": org} for org in call.users.orgs_of(user)],
    }


@routes.add("GET", "/oauth/userinfo")
def userinfo(call: Call) -> Response:
    return JSONResponse(_claims(call, call.user()))


@routes.add("POST", "/_local/login/{user}")
def next_login(call: Call) -> Response:
    """Tests: the next visit to /oauth/authorize logs in this user without asking."""
    logins: Logins = call.notes["logins"]
    if not logins.scripted:
        raise HubError(403, "logins are not scripted on this Hub")
    if call.params["user"] not in call.users.facts()["users"]:
        raise HubError(404, "unknown user")
    logins.choose_next(call.params["user"])
    return JSONResponse({})
