"""The preference server: routes over HTTP. `scripts/serve_preference_model.py` starts it.

One front process parses, tokenizes, batches and answers; a worker process for each device holds the model.
"""

import asyncio
import logging
import os
import resource
import signal
import socket
from contextlib import contextmanager

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from general_preference.errors import InputError, RunError
from general_preference.inference import ranking
from general_preference.inference.remote import KEY_VARIABLE
from general_preference.models.config import first_line
from general_preference.models.score import preference_probability
from general_preference.serving.arguments import ServingArguments
from general_preference.serving.middleware import Gate, refuse
from general_preference.serving.protocol import AnyCompareRequest, GymCompareRequest
from general_preference.serving.refusal import Refused
from general_preference.serving.rerank_routes import add_reranking
from general_preference.serving.sample_routes import add_samples, compare_as_gym
from general_preference.serving.service import PreferenceService

logger = logging.getLogger(__name__)

_LAST = 0.5  # seconds in which whoever is connected when the server stops listening is still refused in words


def build_app(service: PreferenceService) -> FastAPI:
    """The routes of one served model."""
    about = {"title": "General Preference Model", "description": __doc__.split("\n")[0]}
    app = FastAPI(**about, redirect_slashes=False)
    add_reranking(app, service)
    add_samples(app, service)

    @app.post("/compare")
    async def compare(body: AnyCompareRequest) -> dict:
        """Rewards of K responses to one prompt, and P(row is preferred to column) for all pairs."""
        if isinstance(body, GymCompareRequest):
            return await compare_as_gym(service, body)
        embedded = await service.embed(body.prompt, body.responses, "responses")
        scores = embedded.scores()
        reply = {
            "rewards": await service.rewards(embedded, body.mode),
            "matrix": preference_probability(scores, service.encoder.tau).tolist(),
            "cyclic_share": ranking.hodge(scores).cyclic_share,
            "model": service.arguments.model,
        }
        if body.return_embeddings:
            reply |= {"embeddings": embedded.embeddings.tolist()}
            reply |= {} if embedded.gate is None else {"gate": embedded.gate.tolist()}
        return reply

    @app.get("/health")
    async def health() -> Response:
        """200 when ready; 503 while loading, draining or broken."""
        return JSONResponse({"status": service.state}, 200 if service.state == "ready" else 503)

    @app.get("/model")
    async def model() -> dict:
        """What is served: head, temperature, limit of tokens, devices."""
        return service.about

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    handle_errors(app)
    return app


def handle_errors(app: FastAPI) -> None:
    """Every error as a status and one line that says what to change; never a number."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        first, kind = error.errors()[0], request.headers.get("content-type", "")
        if "json" not in kind.lower():
            return refuse(415, f"the body has the content type {kind!r}: send content-type: application/json")
        if first["type"] == "json_invalid":
            return refuse(400, f"the body is no JSON: {first['ctx']['error']}")
        place = ".".join(str(part) for part in first["loc"] if part not in ("body", "compare", "NeMo Gym"))
        return refuse(422, f"{place or 'the body'}: {first['msg']}")

    @app.exception_handler(InputError)
    async def unusable(_: Request, error: InputError):
        return refuse(422, str(error))

    @app.exception_handler(RunError)
    async def failed(_: Request, error: RunError):
        return refuse(500, str(error))

    @app.exception_handler(RecursionError)
    async def nested(_: Request, error: RecursionError):
        return refuse(422, "the body is nested too deeply")

    @app.exception_handler(Exception)  # a fault of the server itself, whose traceback is logged
    async def faulty(_: Request, error: Exception):
        return refuse(500, f"{type(error).__name__} in the server: see its log")

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused):
        headers = None if error.retry_after is None else {"retry-after": str(error.retry_after)}
        return refuse(error.status, str(error), headers)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self):
        yield  # `serve` handles them: uvicorn itself would not answer what waits for siblings or for the model


def run(arguments: ServingArguments) -> None:
    """Serve until SIGTERM or SIGINT, and answer what was accepted.

    Raises:
        InputError: no such model or device, or the address is taken. RunError: a worker process died.
    """
    arguments.check()
    torch.set_num_threads(1)  # the workers compute
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # samples that wait for siblings hold a connection each
    with listen(arguments.host, arguments.port) as listener:
        asyncio.run(serve(arguments, listener))


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; InputError if that address is taken or not of this machine."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # Connections inherit it; asyncio sets it only where the protocol is named. Without it, the second part of an
        # answer waits 40 ms for the client to acknowledge the first.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        cure = "choose another host or port, or end what listens there"
        raise InputError(f"cannot listen on {host} port {port} ({first_line(error)}): {cure}") from error


async def serve(arguments: ServingArguments, listener: socket.socket) -> None:
    """See `run`."""
    service, loop, stop = PreferenceService(arguments), asyncio.get_running_loop(), asyncio.Event()
    app = build_app(service)
    routes = frozenset(route.path for route in app.routes)
    gate, options = Gate(app, service, read_key(), routes), {"log_level": "warning", "access_log": False}
    options |= {"timeout_keep_alive": 60, "timeout_graceful_shutdown": 1}  # whoever was accepted is answered before it
    server = _Server(uvicorn.Config(gate, lifespan="off", **options))
    listening = asyncio.create_task(server.serve(sockets=[listener]))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    host, port = listener.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    loading = asyncio.create_task(service.load())
    try:
        stopping, broken = asyncio.create_task(stop.wait()), asyncio.create_task(service.broke.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            logger.info("serving %s on http://%s:%d (pages: /docs)", arguments.model, host, port)
            await asyncio.wait((stopping, broken), return_when=asyncio.FIRST_COMPLETED)
        await drain(service, gate, server, arguments.drain_timeout)
    finally:
        server.should_exit = True
        loading.cancel()
        service.close()
        await listening
    if service.broke.is_set():
        raise RunError(
            "a worker process has died, so that the server ended: see its log, and the memory of the machine"
        )


def read_key() -> str | None:
    """The key that requests need, if there is one; InputError for white space, which no header can hold."""
    key = os.environ.get(KEY_VARIABLE) or None
    if key is not None and not key.strip():
        raise InputError(f"{KEY_VARIABLE} is white space: set it to a key, or unset it")
    return key


async def drain(service: PreferenceService, gate: Gate, server: uvicorn.Server, timeout: float) -> None:
    """Refuse what comes; return when all that was accepted is answered, or after `timeout` seconds."""
    if service.state != "broken":
        service.state = "draining"
    service.barrier.close()
    ends = asyncio.get_running_loop().time() + timeout
    while gate.running and asyncio.get_running_loop().time() < ends:
        await asyncio.sleep(0.02)
    if gate.running:
        logger.warning("%d requests were not answered within %g seconds", gate.running, timeout)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # it would log them once more, with tracebacks
    gate.stop_reading()
    for one in server.servers:
        one.close()
    await asyncio.sleep(_LAST)
