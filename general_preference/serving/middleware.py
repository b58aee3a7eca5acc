"""What every request goes through before its route: key, state of the server, size of the body; and the count."""

import asyncio
import hmac
import json
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
        self.expected = None if key is None else key.strip().encode(errors="surrogateescape")
        self.limit = int(service.arguments.max_body_mb * 2**20)
        self.running = 0
        self._reading: set[asyncio.Task] = set()

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

        try:
            refusal = await self._refusal(scope, receive) if scored else None
            if isinstance(refusal, JSONResponse):
                await refusal(scope, receive, sent)
            else:
                with self._counted(scored):
                    await self.app(scope, refusal or receive, sent)
        finally:
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
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        if self.expected is not None and not (
            hmac.compare_digest(key.strip(), self.expected) and scheme.lower() == b"bearer"
        ):
            return refuse(
                401, "the key is wrong or missing: send Authorization: Bearer KEY", {"www-authenticate": "Bearer"}
            )
        if (answer := self._closed()) is not None:
            return answer
        body, size = bytearray(), 0
        while True:
            if (message := await self._received(receive)) is None:
                break
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
        return self._closed() or _replay(bytes(body), receive)  # a body may take long

    async def _received(self, receive) -> dict | None:
        """The next message; None if the server ends before it comes."""
        self._reading.add(task := asyncio.current_task())
        try:
            return await receive()
        except asyncio.CancelledError:
            if task in self._reading:
                raise
            return None
        finally:
            self._reading.discard(task)

    def stop_reading(self) -> None:
        """Refuse whoever has not sent the whole body yet."""
        while self._reading:
            self._reading.pop().cancel()

    def _closed(self) -> JSONResponse | None:
        if self.service.state == "ready":
            return None
        return refuse(503, f"the server is {self.service.state}: ask again later", {"retry-after": "2"})


def _replay(body: bytes, receive):
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed():
        return parts.pop() if parts else await receive()

    return replayed


class EchoedResponse(JSONResponse):
    """JSON that may hold what a client sent: half of a surrogate pair and NaN as well."""

    def render(self, content) -> bytes:
        """As ASCII."""
        return json.dumps(content, separators=(",", ":")).encode()


def refuse(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """The answer to a request that gets no numbers."""
    return EchoedResponse({"detail": message}, status, headers)
