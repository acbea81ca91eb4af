"""Large files: the batch call, the uploads, their verification.

The client sends uploads without its token, so the upload address carries a ticket instead: a keyed hash over repo,
object, size and end of life. A ticket opens one object of one repo; using it twice stores the same bytes again, which
changes nothing, and lets the client repeat an upload after a lost answer.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from bot.localhub.answers import HubError, bad_request
from bot.localhub.names import RepoId, is_number
from bot.localhub.routes_commit import is_sha256
from bot.localhub.routing import Call, Routes
from bot.localhub.storage import UPLOAD_LIFETIME_S, Store
from bot.storage import exclusive, write_atomic

routes = Routes()
MULTIPART_ABOVE_BYTES = 5 << 20
_MAX_OBJECTS, _MAX_PARTS = 256, 200
_UPLOAD = "/_lfs/{kind}/{ns}/{name}/{oid}/{size}/{expires}/{nonce}/{seal}"
_LFS_JSON = "application/vnd.git-lfs+json"


@dataclass(frozen=True, slots=True)
class Ticket:
    repo: RepoId
    oid: str
    size: int
    expires: int
    nonce: str

    def seal(self, secret: bytes) -> str:
        text = f"{self.repo.kind}/{self.repo}/{self.oid}/{self.size}/{self.expires}/{self.nonce}"
        return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()

    @property
    def part_bytes(self) -> int:
        """5 MiB, or more if that would make more than 200 parts; a whole number of MiB."""
        mib = 1 << 20
        return max(MULTIPART_ABOVE_BYTES, -(-self.size // _MAX_PARTS // mib) * mib)

    @property
    def parts(self) -> int:
        return -(-self.size // self.part_bytes)


def _secret(store: Store) -> bytes:
    """Key of the tickets, kept on disk so that uploads continue after a restart."""
    path = store.root / "ticket.key"
    with exclusive(store.root / "locks" / "ticket"):
        if not path.is_file():
            write_atomic(path, secrets.token_bytes(32))
            path.chmod(0o600)
        return path.read_bytes()


@routes.add("POST", "/{P}{ns}/{name}.git/info/lfs/objects/batch")
def batch(call: Call) -> Response:
    body = call.json()
    repo = call.repo()
    if body.get("ref"):
        call.require_write(repo.id.namespace)
    else:
        call.require_write_token()  # a pull request: users who may open one may upload for it
    objects = body.get("objects")
    if body.get("operation") != "upload" or not isinstance(objects, list) or len(objects) > _MAX_OBJECTS:
        raise bad_request(f"an upload of at most {_MAX_OBJECTS} objects is expected")
    transfers = body.get("transfers")
    multipart = isinstance(transfers, list) and "multipart" in transfers
    answers = [_answer(call, repo.id, item, multipart) for item in objects]
    return JSONResponse({"transfer": "multipart" if multipart else "basic", "objects": answers}, media_type=_LFS_JSON)


def _answer(call: Call, repo: RepoId, item: Any, multipart: bool) -> dict[str, Any]:
    try:
        oid, size = str(item["oid"]), int(item["size"])
    except (TypeError, KeyError, ValueError, OverflowError):
        raise bad_request("each object needs oid and size") from None
    known = {"oid": oid, "size": size}
    if not is_sha256(oid) or size < 0:
        return known | {"error": {"code": 422, "message": "the object needs a sha256 and a size"}}
    if call.store.allowed_size(repo, oid) == size:
        return known  # no actions: it is stored already
    ticket = Ticket(repo, oid, size, int(time.time()) + UPLOAD_LIFETIME_S, secrets.token_hex(8))
    seal = ticket.seal(_secret(call.store))
    path = f"{repo.kind}/{repo}/{oid}/{size}/{ticket.expires}/{ticket.nonce}/{seal}"
    upload: dict[str, Any] = {"href": f"{call.endpoint}/_lfs/{path}"}
    if multipart and size > MULTIPART_ABOVE_BYTES:
        parts = {str(number): f"{upload['href']}/{number}" for number in range(1, ticket.parts + 1)}
        upload["header"] = {"chunk_size": str(ticket.part_bytes), **parts}
    verify = {"href": f"{call.endpoint}/{repo.prefix}{repo}.git/info/lfs/verify"}
    return known | {"actions": {"upload": upload, "verify": verify}}


def _ticket(call: Call) -> Ticket:
    given = call.params
    if not (is_number(given["size"]) and is_number(given["expires"]) and is_sha256(given["oid"])):
        raise HubError(403, "this is not an upload address")
    ticket = Ticket(call.id, given["oid"], int(given["size"]), int(given["expires"]), given["nonce"])
    if not hmac.compare_digest(ticket.seal(_secret(call.store)).encode(), given["seal"].encode()):
        raise HubError(403, "this is not an upload address")
    if ticket.expires < time.time():
        raise HubError(403, "this upload address has expired")
    if call.store.find(ticket.repo) is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    return ticket


@routes.add("PUT", _UPLOAD, limit_bytes=0)
async def upload(call: Call) -> Response:
    ticket = await run_in_threadpool(_ticket, call)
    incoming = call.store.blobs.receive(ticket.oid, ticket.size)
    try:
        async for chunk in call.request.stream():
            incoming.write(chunk)
        await run_in_threadpool(incoming.finish)
    finally:
        incoming.close()
    await run_in_threadpool(call.store.allow_blob, ticket.repo, ticket.oid, ticket.size)
    return Response(status_code=200, headers={"ETag": f'"{ticket.oid}"'})


@routes.add("PUT", _UPLOAD + "/{part}", limit_bytes=0)
async def upload_part(call: Call) -> Response:
    ticket = await run_in_threadpool(_ticket, call)
    part = call.params["part"]
    number = int(part) if is_number(part) else 0
    if not 1 <= number <= ticket.parts:
        raise bad_request(f"this upload has {ticket.parts} parts")
    offset = (number - 1) * ticket.part_bytes
    expected = min(ticket.part_bytes, ticket.size - offset)
    digest, received = hashlib.sha256(), 0
    async for chunk in call.request.stream():
        if received + len(chunk) > expected:
            raise bad_request(f"part {number} is larger than {expected} bytes")
        digest.update(chunk)
        await run_in_threadpool(call.store.blobs.write_part, ticket.nonce, offset + received, chunk)
        received += len(chunk)
    if received != expected:
        raise bad_request(f"part {number} has {received} bytes, {expected} were expected")
    return Response(status_code=200, headers={"ETag": f'"{digest.hexdigest()}"'})


@routes.add("POST", _UPLOAD)
def complete(call: Call) -> Response:
    ticket = _ticket(call)
    parts = call.json().get("parts")
    if not isinstance(parts, list) or len(parts) != ticket.parts:
        raise bad_request(f"{ticket.parts} parts are expected")
    call.store.blobs.finish_parts(ticket.nonce, ticket.oid, ticket.size)
    call.store.allow_blob(ticket.repo, ticket.oid, ticket.size)
    return JSONResponse({})


@routes.add("POST", "/{P}{ns}/{name}.git/info/lfs/verify")
def verify(call: Call) -> Response:
    repo = call.repo()
    call.require_write_token()
    body = call.json()
    oid = str(body.get("oid") or "")
    size = call.store.allowed_size(repo.id, oid) if is_sha256(oid) else None
    if size is None:
        raise HubError(404, "Object does not exist")
    if size != body.get("size"):
        raise bad_request("the object has another size")
    return JSONResponse({})
