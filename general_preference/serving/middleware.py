"""What every request goes through before its route: key, state of the server, size of the body; and the count."""

import hmac
import time
from contextlib import contextmanager

from fastapi.responses import JSONResponse

from general_preference.serving.service import PreferenceService

OPEN = ("/health", "/metrics")  # without a key, and while the server loads or stops
_PATIENCE = 16  # times the limit of a body that is read and dropped, so that its sender can read the answer


class Gate:
    """ASGI application around another one."""

    def __init__(self, app, service: PreferenceService, key: str | None, routes: frozenset[str]):
        """routes: paths by which requests are counted; the others count as "unknown"."""
        self.app, self.service, self.routes = app, service, routes
        self.expected = None if key is None else f"Bearer {key.strip()}".encode()
        self.limit = int(service.arguments.max_body_mb * 2**20)
        self.running = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), 500
        scored = scope["path"] not in OPEN

        async def sent(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.service.state != "ready":  # or the client would send its next request to a closed connection
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        with self._counted(scored):
            refusal = await self._refusal(scope, receive) if scored else None
            if isinstance(refusal, JSONResponse):
                await refusal(scope, receive, sent)
            else:
                await self.app(scope, refusal or receive, sent)
        route = scope["path"] if scope["path"] in self.routes else "unknown"
        self.service.metrics.request(route, status, time.perf_counter() - began)

    @contextmanager
    def _counted(self, scored: bool):
        self.running += scored
        try:
            yield
        finally:
            self.running -= scored

    async def _refusal(self, scope, receive):
        """An answer, or `receive` with the body that was read."""
        headers = dict(scope["headers"])
        if self.expected is not None and not hmac.compare_digest(headers.get(b"authorization", b""), self.expected):
            return refuse(
                401, "the key is wrong or missing: send Authorization: Bearer KEY", {"www-authenticate": "Bearer"}
            )
        if self.service.state != "ready":
            return refuse(503, f"the server is {self.service.state}: ask again later", {"retry-after": "2"})
        body, size = bytearray(), 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return receive
            size += len(message.get("body", b""))
            if size <= self.limit:
                body += message.get("body", b"")
            if not message.get("more_body") or size > _PATIENCE * self.limit:
                break
        if size > self.limit:
            return refuse(
                413, f"the body is larger than {self.service.arguments.max_body_mb:g} MB: send fewer responses at once"
            )
        return _replay(bytes(body), receive)


def _replay(body: bytes, receive):
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed():
        return parts.pop() if parts else await receive()

    return replayed


def refuse(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The answer to a request that gets no numbers."""
    return JSONResponse({"detail": message}, status, headers)
