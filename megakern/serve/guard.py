"""What every request passes first: the Host header, the bearer token, and bounds of size and time for its body."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable

from megakern.serve.protocol import RefusedError

OPEN_PATHS = ("/", "/health")  # they tell nothing of the model and write nothing
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """ASGI middleware around `app`.

    token      bearer token that /v1 asks for; None: none
    hosts      names that the Host header may have; None: any. Without a token, a page of another site could otherwise
               reach a server of this machine under a name that resolves to it.
    max_body   bytes; `body_seconds` for all of them
    """

    def __init__(
        self, app: Callable, *, token: str | None, hosts: tuple[str, ...] | None, max_body: int, body_seconds: float
    ) -> None:
        self.app, self.hosts, self.max_body, self.body_seconds = app, hosts, max_body, body_seconds
        self._token = None if token is None else token.encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_guarded(message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-content-type-options", b"nosniff")]}
            await send(message)

        headers = dict(scope["headers"])  # lower case
        try:
            self._check_host(headers.get(b"host", b"").decode("latin-1"))
            self._check_token(scope["path"], headers.get(b"authorization", b""))
            body = await self._body(headers.get(b"content-length"), receive)
        except RefusedError as error:
            return await _refuse(error, send_guarded)
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again():
            return given.pop() if given else await receive()

        await self.app(scope, receive_again, send_guarded)

    def _check_host(self, host: str) -> None:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.hosts is not None and name.lower() not in self.hosts:
            raise RefusedError(421, f"this server answers to {', '.join(self.hosts)}, not to the host {host[:100]!r}")

    def _check_token(self, path: str, given: bytes) -> None:
        if self._token is None or path in OPEN_PATHS:
            return
        scheme, _, value = given.partition(b" ")
        if not (hmac.compare_digest(value.strip(), self._token) and scheme.lower() == b"bearer"):
            raise RefusedError(401, "this server needs its token: Authorization: Bearer TOKEN", code="invalid_api_key")

    async def _body(self, length: bytes | None, receive) -> bytes:
        """All of it. Raises RefusedError: too large, or too slow."""
        if length is not None and length.isdigit() and int(length) > self.max_body:
            raise self._too_large()
        parts, size, more = [], 0, True
        end = asyncio.get_running_loop().time() + self.body_seconds
        while more:
            try:
                left = end - asyncio.get_running_loop().time()
                message = await asyncio.wait_for(receive(), max(0.0, left))
            except asyncio.TimeoutError as error:
                raise RefusedError(408, f"the body took more than {self.body_seconds:g} s") from error
            if message["type"] == "http.disconnect":
                break
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body:
                raise self._too_large()
            more = message.get("more_body", False)
        return b"".join(parts)

    def _too_large(self) -> RefusedError:
        return RefusedError(413, f"the body is larger than the {self.max_body:,} bytes that this server takes")


async def _refuse(error: RefusedError, send) -> None:
    body = json.dumps(error.content()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if error.status == 401 else []
    headers += [(b"connection", b"close")]  # what is left of the body is not read
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
