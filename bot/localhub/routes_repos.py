"""Identity; creating, describing, listing, changing, moving, deleting repos."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from starlette.responses import JSONResponse, Response

from bot.localhub.answers import HubError, bad_request
from bot.localhub.info import choose, describe
from bot.localhub.metadata import complaints
from bot.localhub.names import PLURAL, RepoId, is_number, repo_id
from bot.localhub.routing import Call, Routes
from bot.localhub.storage import Repo

routes = Routes()
_SORTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "lastModified": lambda info: info["lastModified"],
    "createdAt": lambda info: info["createdAt"],
    "downloads": lambda info: info["downloads"],
    "likes": lambda info: info["likes"],
    "trendingScore": lambda info: (info["likes"], info["downloads"]),
}


@routes.add("GET", "/api/whoami-v2")
def whoami(call: Call) -> Response:
    visitor = call.visitor
    if visitor.name is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    user = call.users.facts()["users"].get(visitor.name, {})
    orgs = [
        {"type": "org", "id": org, "name": org, "fullname": org, "roleInOrg": role}
        for org, role in call.users.orgs_of(visitor.name).items()
    ]
    return JSONResponse(
        {
            "type": "user",
            "id": visitor.name,
            "name": visitor.name,
            "fullname": user.get("fullname", visitor.name),
            "email": None,
            "isPro": False,
            "avatarUrl": f"{call.endpoint}/_local/avatar.svg",
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": {"displayName": visitor.label, "role": visitor.role}},
        }
    )


@routes.add("GET", "/api/{kind}/{ns}/{name}/auth-check")
def auth_check(call: Call) -> Response:
    repo = call.repo()
    if not call.users.may_download(call.visitor, repo):
        raise HubError(403, "Access to this repo is restricted", "GatedRepo")
    return JSONResponse({})


@routes.add("GET", "/api/{kind}/{ns}/{name}/auth-check/write")
def auth_check_write(call: Call) -> Response:
    call.writable_repo()
    return JSONResponse({})


def _target(call: Call, body: dict[str, Any]) -> RepoId:
    kind = PLURAL.get(str(body.get("type") or "model"))
    if kind is None:
        raise bad_request("type must be model, dataset or space")
    return repo_id(kind, str(body.get("organization") or call.user()), str(body.get("name") or ""))


def repo_url(call: Call, repo: RepoId) -> str:
    return f"{call.endpoint}/{repo.prefix}{repo}"


@routes.add("POST", "/api/repos/create")
def create(call: Call) -> Response:
    body = call.json()
    target = _target(call, body)
    call.require_write(target.namespace)
    visibility = body.get("visibility", "private" if body.get("private") else "public")
    if visibility not in ("public", "private"):
        raise bad_request("visibility must be public or private")
    url = repo_url(call, target)
    with call.store.locked(target):
        if call.store.find(target) is not None:
            raise HubError(409, "You already created this repo", body={"url": url})
        sdk = str(body.get("sdk")) if target.kind == "spaces" else None
        call.store.create(target, author=call.user(), private=visibility == "private", sdk=sdk)
    return JSONResponse({"url": url, "name": str(target), "id": str(target)})


@routes.add("DELETE", "/api/repos/delete")
def delete(call: Call) -> Response:
    call.params = _as_params(_target(call, call.json()))
    repo = call.writable_repo()
    with call.store.locked(repo.id):
        if call.store.find(repo.id) is None:
            raise call.not_found()
        call.store.delete(repo.id)
    return JSONResponse({})


@routes.add("POST", "/api/repos/move")
def move(call: Call) -> Response:
    body = call.json()
    kind = PLURAL.get(str(body.get("type") or "model"), "")
    old, new = (_split(kind, body.get(key)) for key in ("fromRepo", "toRepo"))
    call.params = _as_params(old)
    repo = call.writable_repo()
    call.require_write(new.namespace)
    with contextlib.ExitStack() as locks:
        for one in sorted({old, new}):  # always in one order, so that two crossing moves cannot wait for each other
            locks.enter_context(call.store.locked(one))
        if call.store.find(new) is not None:
            raise HubError(409, f"{new} exists already")
        if call.store.find(repo.id) is None:
            raise call.not_found()
        call.store.move(old, new)
    return JSONResponse({})


def _split(kind: str, text: Any) -> RepoId:
    namespace, _, name = str(text or "").partition("/")
    return repo_id(kind, namespace, name)


def _as_params(repo: RepoId) -> dict[str, str]:
    return {"kind": repo.kind, "ns": repo.namespace, "name": repo.name}


@routes.add("PUT", "/api/{kind}/{ns}/{name}/settings")
def settings(call: Call) -> Response:
    body = call.json()
    changes: dict[str, Any] = {}
    if "gated" in body:
        if body["gated"] is not False and body["gated"] not in ("auto", "manual"):
            raise bad_request('gated must be "auto", "manual" or false')
        changes["gated"] = body["gated"]
    visibility = body.get("visibility")
    if visibility is None and isinstance(body.get("private"), bool):
        visibility = "private" if body["private"] else "public"
    if visibility is not None:
        if visibility not in ("public", "private"):  # "protected" exists on the Hub for Spaces; not needed here
            raise bad_request("visibility must be public or private")
        changes["private"] = visibility == "private"
    repo = call.writable_repo()
    with call.store.locked(repo.id):
        current = call.store.find(repo.id)
        if current is None:
            raise call.not_found()
        call.store.update(current, **changes)
    return JSONResponse(body)


@routes.add("GET", "/api/{kind}/{ns}/{name}")
@routes.add("GET", "/api/{kind}/{ns}/{name}/revision/{rev}")
def info(call: Call) -> Response:
    repo = call.repo()
    commit = call.store.at(repo.id, call.params.get("rev", "main"))
    facts = describe(call.store, repo, commit, blobs=call.flag("blobs"))
    return JSONResponse(choose(facts, call.queries("expand"), single=True))


@routes.add("GET", "/api/{kind}")
def listing(call: Call) -> Response:
    kind = call.params["kind"]
    found = [info for repo in call.store.all(kind) if (info := _listed(call, repo)) is not None]
    sort = call.query("sort") or "trendingScore"
    if sort not in _SORTS:
        raise bad_request(f"cannot sort by {sort!r}")
    found.sort(key=_SORTS[sort], reverse=True)
    full = call.flag("full")
    expand = call.queries("expand")
    extra = {"cardData"} if call.flag("cardData") else set()
    extra |= {"config"} if call.flag("config") else set()
    limit = _number(call, "limit")
    start = _number(call, "cursor") or 0
    page = min(call.page_size, limit) if limit else call.page_size
    chosen = [
        choose(item, expand, single=False, full=full) | {key: item[key] for key in extra if item.get(key) is not None}
        for item in found[start : start + page]
    ]
    return JSONResponse(chosen, headers=next_page(call, start + page, len(found)))


def next_page(call: Call, following: int, total: int) -> dict[str, str]:
    """Link header to the next page. The client uses the address as it is, so it carries the whole query."""
    if following >= total:
        return {}
    kept = [(key, value) for key, value in call.request.query_params.multi_items() if key != "cursor"]
    path = call.request.scope["raw_path"].decode("ascii")
    return {"Link": f'<{call.endpoint}{path}?{urlencode([*kept, ("cursor", str(following))])}>; rel="next"'}


def _number(call: Call, name: str) -> int | None:
    text = call.query(name)
    if text is None:
        return None
    if not is_number(text):
        raise bad_request(f"{name} must be a number")
    return int(text)


def _listed(call: Call, repo: Repo) -> dict[str, Any] | None:
    """Info of a repo that matches the list's filters; None for others."""
    author, search = call.query("author"), call.query("search")
    if not call.users.may_see(call.visitor, repo) or repo.disabled:
        return None
    if author is not None and repo.id.namespace != author:
        return None
    if search is not None and search.lower() not in str(repo.id).lower():
        return None
    try:
        facts = describe(call.store, repo, call.store.at(repo.id, "main"))
    except (HubError, FileNotFoundError):
        return None  # it is being deleted at this moment
    wanted = set(call.queries("filter")) | set(call.queries("pipeline_tag"))
    gated = call.query("gated")
    if not wanted <= set(facts["tags"]) or (gated is not None and bool(repo.gated) != (gated == "true")):
        return None
    return facts


@routes.add("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Response:
    body = call.json()
    if body.get("repoType", "model") not in ("model", "dataset", "space"):
        raise bad_request("unknown repoType")
    errors = [{"message": text} for text in complaints(str(body.get("content") or ""))]
    return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)


@routes.add("GET", "/api/spaces/{ns}/{name}/runtime")
def runtime(call: Call) -> Response:
    call.params["kind"] = "spaces"
    call.repo()
    return JSONResponse({"stage": "STOPPED", "hardware": {"current": None, "requested": None}, "storage": None})


@routes.add("HEAD", "/api/telemetry/{path*}")
def telemetry(call: Call) -> Response:
    return Response(status_code=200)
