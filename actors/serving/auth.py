"""Bearer keys. A key is compared with every known one, by hashes of equal length, in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from actors.serving.errors import ApiError

PROTECTED = "/v1"
"""Everything below needs a key; the page, its files, the schema and the probes do not."""


class Keys:
    """The keys that are let in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._hashes = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def owner(self, authorization: bytes) -> str | None:
        """Who a header speaks for: the hash of a known key; None: nobody."""
        scheme, _, key = authorization.partition(b" ")
        found = hashlib.sha256(key.strip()).digest()
        known = False
        for each in self._hashes:  # all of them, whichever it is
            known |= hmac.compare_digest(each, found)
        return found.hex() if known and scheme.lower() == b"bearer" else None


class Authentication:
    """Lets requests through that need no key, or have one."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or not needs_key(_route_path(scope)):
            await self._app(scope, receive, send)
            return
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        owner = self._keys.owner(headers[0]) if len(headers) == 1 else None
        if owner is None:
            given = "is not known" if headers else "is missing"
            error = ApiError(
                401,
                f"the API key {given}; allowed: the header Authorization: Bearer KEY with a key of this server",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        scope["crsm"].owner = owner
        await self._app(scope, receive, send)


def needs_key(path: str) -> bool:
    return path == PROTECTED or path.startswith(f"{PROTECTED}/")


def _route_path(scope: Scope) -> str:
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(root) if root and path.startswith(f"{root}/") else path
