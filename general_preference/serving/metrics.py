"""What the server counts, for Prometheus: requests, responses, tokens, calls of the model, waiting, latency."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180, 600)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The counters of one server; all begin with `gpm_`, but those of the front process."""

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter("gpm_requests", "Requests answered", ["route", "status"], registry=registry)
        self._seconds = Histogram(
            "gpm_request_seconds", "Time to the answer", ["route"], buckets=_SECONDS, registry=registry
        )
        self._responses = Counter("gpm_responses", "Responses scored", registry=registry)
        self._tokens = Counter("gpm_tokens", "Tokens of prompts and responses scored", registry=registry)
        self._batches = Histogram("gpm_batch_rows", "Prompts in a call of the model", buckets=_SIZES, registry=registry)
        self._cut = Counter("gpm_cut", "Prompts and responses cut to max_length", ["what"], registry=registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, rows: list[dict], tokens: int) -> None:
        """Count a call of the model."""
        self._batches.observe(len(rows))
        self._responses.inc(sum(len(row["response_ids"]) for row in rows))
        self._tokens.inc(tokens)

    def cut(self, prompts: int, responses: int) -> None:
        """Count what did not fit into max_length."""
        self._cut.labels("prompt").inc(prompts)
        self._cut.labels("response").inc(responses)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)
