"""What ``GET /metrics`` shows, in Prometheus' text format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_BATCH_SIZES = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0)


class Metrics:
    """The metrics of one app, in a registry of their own, so that two apps in one process do not clash."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests_total = self._counter("requests", "Requests answered", "route", "method", "status")
        self.request_seconds = self._histogram(
            "request_seconds", "Time from a request to the end of its answer", _REQUEST_SECONDS, "route"
        )
        self.prompt_tokens_total = self._counter("prompt_tokens", "Prompt tokens processed", "model")
        self.completion_tokens_total = self._counter("completion_tokens", "Tokens generated", "model")
        self.queue_length = self._gauge("queue_length", "Requests waiting for a model", "model")
        self.batch_size = self._histogram("batch_size", "Sequences in a step", _BATCH_SIZES, "model")
        self.step_seconds = self._histogram("step_seconds", "Time of one step", _STEP_SECONDS, "model")
        self.time_to_first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "Time from a request to its first token", _REQUEST_SECONDS, "model"
        )
        self.capture_bytes_total = self._counter("capture_bytes", "Bytes of activations written", "model")
        self.models_loaded = self._gauge("models_loaded", "Models loaded")

    def render(self) -> tuple[bytes, str]:
        """The body of the answer and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace="sightline", registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace="sightline", registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace="sightline", registry=self.registry, buckets=buckets)
