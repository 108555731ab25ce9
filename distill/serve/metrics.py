"""What the server counts, in Prometheus's text format. Names and units follow its conventions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """Counters of one server. running: samples in the engine. waiting: requests in the queue."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("distill_requests", "Requests", ("endpoint", "status"), registry=self.registry)
        self._prompt = Counter("distill_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self._completion = Counter("distill_completion_tokens", "Tokens of completions", registry=self.registry)
        self._finished = Counter("distill_choices", "Choices", ("finish_reason",), registry=self.registry)
        self._seconds = Histogram(
            "distill_request_seconds", "Time of a request", buckets=SECONDS, registry=self.registry
        )
        self._first = Histogram(
            "distill_first_token_seconds",
            "Time to the first token of a stream",
            buckets=SECONDS,
            registry=self.registry,
        )
        Gauge("distill_samples_running", "Samples in the engine", registry=self.registry).set_function(running)
        Gauge("distill_requests_waiting", "Requests in the queue", registry=self.registry).set_function(waiting)

    def answered(self, endpoint: str, status: int) -> None:
        """Count a request. status: of HTTP; 499 where the client went away."""
        self._requests.labels(endpoint, str(status)).inc()

    def used(self, prompt_tokens: int, completion_tokens: int, reasons: list[str]) -> None:
        """Count the tokens of an answer, and why its choices ended."""
        self._prompt.inc(prompt_tokens)
        self._completion.inc(completion_tokens)
        for reason in reasons:
            self._finished.labels(reason).inc()

    @contextmanager
    def timed(self) -> Iterator[Callable[[], None]]:
        """Measure a request; call what this yields when the first token of a stream is there."""
        begun, first = perf_counter(), False

        def token() -> None:
            nonlocal first
            if not first:
                first = True
                self._first.observe(perf_counter() - begun)

        try:
            yield token
        finally:
            self._seconds.observe(perf_counter() - begun)

    def text(self) -> bytes:
        """All counters, as Prometheus reads them."""
        return generate_latest(self.registry)
