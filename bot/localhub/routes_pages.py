"""Pages for the browser: repos with cards and files, discussions, commits.

All content is untrusted: it is escaped, or goes through `page.markdown`.
"""

from __future__ import annotations

from html import escape
from urllib.parse import quote

from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from bot.localhub import threads
from bot.localhub.answers import HubError
from bot.localhub.info import describe, text_of
from bot.localhub.metadata import split_card, texts
from bot.localhub.names import KINDS, RepoId, is_number, valid_segment
from bot.localhub.page import POLICY, human_size, markdown, moment, page
from bot.localhub.routing import Call, Routes
from bot.localhub.storage import Commit, Repo

routes = Routes()
_AVATAR = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"><rect width="8" height="8" fill="#c9d3e6"/>'
    '<circle cx="4" cy="3" r="1.6" fill="#51617f"/><path d="M1 8c0-2 1.4-3 3-3s3 1 3 3z" fill="#51617f"/></svg>'
)
_TITLES = {"models": "Models", "datasets": "Datasets", "spaces": "Spaces"}


def _answer(title: str, body: str) -> Response:
    return HTMLResponse(page(title, body), headers={"Content-Security-Policy": POLICY})


def _link(repo: RepoId) -> str:
    return f'<a href="/{escape(repo.prefix + str(repo))}">{escape(str(repo))}</a>'


@routes.add("GET", "/_local/unknown")
def unknown(call: Call) -> Response:
    """Requests below /api/ that no route handles; tests keep this list empty."""
    return JSONResponse(call.notes["unknown"])


@routes.add("GET", "/_local/avatar.svg")
def avatar(call: Call) -> Response:
    return Response(_AVATAR, media_type="image/svg+xml")


@routes.add("GET", "/")
def front(call: Call) -> Response:
    return _overview(call, None)


@routes.add("GET", "/{ns}")
def namespace(call: Call) -> Response:
    if call.params["ns"] in KINDS:
        return _overview(call, None, call.params["ns"])
    if not valid_segment(call.params["ns"]):
        raise HubError(404, "no such page")
    return _overview(call, call.params["ns"])


def _overview(call: Call, owner: str | None, only: str | None = None) -> Response:
    parts = []
    for kind in KINDS if only is None else (only,):
        rows = [
            _overview_row(call, repo)
            for repo in call.store.all(kind)
            if call.users.may_see(call.visitor, repo) and owner in (None, repo.id.namespace)
        ]
        if rows:
            head = "<tr><th>name</th><th>changed</th><th>tags</th></tr>"
            parts.append(f"<h2>{_TITLES[kind]}</h2><table>{head}{''.join(rows)}</table>")
    heading = "Repos on this Hub" if owner is None else f"Repos of {escape(owner)}"
    return _answer(owner or "Repos", f"<h1>{heading}</h1>" + ("".join(parts) or "<p>No repos yet.</p>"))


def _overview_row(call: Call, repo: Repo) -> str:
    facts = describe(call.store, repo, call.store.at(repo.id, "main"))
    shown = [tag for tag in facts["tags"] if ":" not in tag][:6]
    return f"<tr><td>{_link(repo.id)}</td><td>{moment(facts['lastModified'])}</td><td>{_tags(shown)}</td></tr>"


def _tags(tags: list[str]) -> str:
    return "".join(f'<span class="tag">{escape(tag)}</span>' for tag in tags)


@routes.add("GET", "/{P}{ns}/{name}")
@routes.add("GET", "/{P}{ns}/{name}/tree/{rev}")
def repo_page(call: Call) -> Response:
    repo = call.repo()
    commit = call.store.at(repo.id, call.params.get("rev", "main"))
    facts = describe(call.store, repo, commit)
    _, body = split_card(text_of(call.store, repo, commit.files.get("README.md")))
    card = facts.get("cardData") or {}
    bases = ", ".join(_base_link(call, base) for base in texts(card.get("base_model")))
    state = " · ".join(filter(None, ["private" if repo.private else "", f"gated ({repo.gated})" if repo.gated else ""]))
    threads_link = f'<a href="/{escape(repo.id.prefix + str(repo.id))}/discussions">discussions</a>'
    head = (
        f"<h1>{escape(str(repo.id))}</h1><p>{_tags(facts['tags'])}</p>"
        f'<p class="soft">commit <code>{commit.oid}</code> of {moment(commit.date)} · {threads_link}'
        f"{' · ' + state if state else ''}</p>" + (f"<p>Base models: {bases}.</p>" if bases else "")
    )
    files = {path: _address(repo, commit, path) for path in commit.files}
    text = f"<article>{markdown(body, files)}</article>" if body.strip() else "<p>This repo has no model card.</p>"
    return _answer(str(repo.id), head + text + _files(repo, commit) + _history(call, repo, commit))


def _base_link(call: Call, base: str) -> str:
    known = any(str(repo.id) == base for repo in call.store.all("models") if call.users.may_see(call.visitor, repo))
    return f'<a href="/{escape(quote(base))}">{escape(base)}</a>' if known else f"<code>{escape(base)}</code>"


def _address(repo: Repo, commit: Commit, path: str) -> str:
    return f"/{repo.id.prefix}{repo.id}/resolve/{commit.oid}/{quote(path)}"


def _files(repo: Repo, commit: Commit) -> str:
    rows = "".join(
        f'<tr><td><a href="{escape(_address(repo, commit, path))}">{escape(path)}</a></td>'
        f'<td class="number">{human_size(entry.size)}</td>'
        f"<td><code>{(entry.sha256 or entry.oid)[:12]}</code></td></tr>"
        for path, entry in commit.files.items()
    )
    return f"<h2>Files</h2><table><tr><th>path</th><th>size</th><th>hash</th></tr>{rows}</table>"


def _history(call: Call, repo: Repo, commit: Commit) -> str:
    rows = ""
    for count, past in enumerate(call.store.history(repo.id, commit.oid)):
        if count == 20:
            break
        rows += (
            f"<tr><td><code>{past.oid[:7]}</code></td><td>{escape(past.title)}</td>"
            f"<td>{escape(past.author)}</td><td>{moment(past.date)}</td></tr>"
        )
    return f"<h2>History</h2><table><tr><th>commit</th><th>title</th><th>author</th><th>date</th></tr>{rows}</table>"


@routes.add("GET", "/{P}{ns}/{name}/blob/{rev}/{path*}")
def blob(call: Call) -> Response:
    repo = call.repo().id
    rev, path = quote(call.params["rev"], safe=""), quote(call.params["path"])
    return RedirectResponse(f"/{repo.prefix}{repo}/resolve/{rev}/{path}", 302)


@routes.add("GET", "/{P}{ns}/{name}/commit/{rev}")
def commit_page(call: Call) -> Response:
    repo = call.repo()
    commit = call.store.at(repo.id, call.params["rev"])
    body = (
        f"<h1>{escape(commit.title)}</h1><p>{_link(repo.id)} · <code>{commit.oid}</code> · {escape(commit.author)} · "
        f"{moment(commit.date)}</p><pre>{escape(commit.message)}</pre>"
    )
    return _answer(commit.title, body + _files(repo, commit))


@routes.add("GET", "/{P}{ns}/{name}/discussions")
def discussions(call: Call) -> Response:
    repo = call.repo()
    rows = "".join(
        f'<li>#{thread["num"]} <a href="/{escape(repo.id.prefix + str(repo.id))}/discussions/{thread["num"]}">'
        f'{escape(thread["title"])}</a> <span class="soft">{escape(thread["status"])}, '
        f"{escape(thread['author']['name'])}</span></li>"
        for thread in threads.all_threads(call.store, repo.id)
    )
    return _answer(
        "Discussions", f"<h1>Discussions of {_link(repo.id)}</h1><ul>{rows or '<li>No discussions yet.</li>'}</ul>"
    )


@routes.add("GET", "/{P}{ns}/{name}/discussions/{num}")
def discussion(call: Call) -> Response:
    repo = call.repo()
    if not is_number(call.params["num"]):
        raise HubError(404, "Discussion not found")
    thread = threads.load(call.store, repo.id, int(call.params["num"]))
    parts = []
    for event in thread["events"]:
        who = f'<p class="soft">{escape(event["author"]["name"])} · {moment(event["createdAt"])}</p>'
        if event["type"] == "comment":
            text = "<p>hidden</p>" if event["data"]["hidden"] else markdown(event["data"]["latest"]["raw"])
            parts.append(f"<article>{who}{text}</article>")
        else:
            detail = event["data"].get("status") or event["data"].get("oid") or event["data"].get("to") or ""
            parts.append(f"{who}<p>{escape(event['type'])} {escape(str(detail))}</p>")
    head = f"<h1>{escape(thread['title'])} #{thread['num']}</h1><p>{_link(repo.id)} · {escape(thread['status'])}</p>"
    return _answer(thread["title"], head + "".join(parts))
