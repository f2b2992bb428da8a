"""`ModelClient`: a session that runs on a server.

Connecting may take 10 seconds; after that the client waits for as long as it takes, as one piece of work may last
minutes. `timeout` bounds the seconds in which nothing comes. Proxies of the environment are not used to reach this
machine.
"""

import time
from typing import Any

import httpx

from attribution.operation import Operation
from attribution.operations import (
    ablations,
    circuits,
    compare,
    features,
    getters,
    gradients,
    interventions,
    lens,
    patching,
    samples,
    scores,
    steering,
    together,
)
from attribution.progress import shown
from attribution.results import forward_results
from clients.options import check, checked_url, http_options, key_headers, load_body, moved, only_model
from clients.wire import RETRIES, Call, Exchange, call_of, get, post, status_path


class ModelClient:
    """The operations of `LocalSession`, carried out by a server; a context manager.

    Args:
        url: of the server.
        model: the loaded model that operations run on; None is the one that this client loaded last, else the only one.
        api_key: of the server, when it asks for one.
        timeout: seconds without a byte from the server after which a call fails; None waits.
        retries: how often a call that is safe to repeat is made again (`clients.wire` says when).
        http_client: an `httpx.Client`, or what has its methods, to send with; it stays open when this client closes.

    Raises:
        ServerUnreachable: from any method: no server answers.
        SightlineError: from any method: of the class that the server raised.
    """

    def __init__(
        self,
        url: str = "http://localhost:8000",
        model: str | None = None,
        api_key: str | None = None,
        timeout: float | None = None,
        *,
        retries: int = RETRIES,
        http_client: Any = None,
    ) -> None:
        self.url, self.model, self.retries = checked_url(url), model, retries
        self._headers = key_headers(api_key)
        self._own = httpx.Client(**http_options(self.url, timeout)) if http_client is None else None
        self._http: Any = self._own or http_client

    def __enter__(self) -> "ModelClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._own is not None:
            self._own.close()

    def run(self, operation: Operation[..., Any], arguments: dict[str, Any]) -> Any:
        """Run an operation on the server; its arguments are checked here first, in the same words."""
        sent, own = check(operation, arguments)
        show = bool(own.get("show_progress", False))
        call = call_of(operation, sent, self.model, progress=show)
        return moved(self._send(call, show=show), own.get("device", "cpu"))

    def status(self) -> dict[str, Any]:
        """Whether a model is loaded, which, where, and the datasets that are stored for it."""
        return self._send(get(status_path(self.model), "status"))

    def health(self) -> dict[str, Any]:
        """The server itself: version, device, loaded models."""
        return self._send(get("/health", "health"))

    def models(self) -> dict[str, Any]:
        """The models that the server could load, and those that it has loaded."""
        return self._send(get("/models", "models"))

    def load_model(
        self, path: str, device: str = "auto", quantization: str | None = None, **load_options: Any
    ) -> dict[str, Any]:
        """Load a model on the server, which this client's operations run on from now; returns its description.

        Args:
            path: a hub id, an alias, a folder there, or "demo".
            load_options: further fields of `POST /models/load`: dtype, revision, attn_implementation, savepoints.
        """
        loaded = self._send(post("/models/load", "load_model", load_body(path, device, quantization, load_options)))
        self.model = loaded["model"]
        return loaded

    def unload_model(self) -> dict[str, Any]:
        """Unload the model of this client on the server, for everybody; the stored samples stay."""
        name = self.model or only_model(self.health()["loaded_models"])
        freed = self._send(post("/models/unload", "unload_model", {"model_id": name}))
        self.model = None
        return freed

    def _send(self, call: Call, *, show: bool = False) -> Any:
        exchange = Exchange(call, self.url, self.retries)
        headers = call.headers | self._headers
        while True:
            try:
                with (
                    shown(call.name, show=show) as tell,
                    self._http.stream(
                        call.method, self.url + call.path, content=call.body, headers=headers
                    ) as response,
                ):
                    answer = exchange.answer(response.status_code, response.headers, tell)
                    for chunk in response.iter_bytes():
                        answer.feed(chunk)
                    return answer.finish()
            except exchange.failures as failure:
                pause = exchange.pause_after(failure)
            time.sleep(pause)

    # the operations, each declared once in `attribution.operations`
    forward = samples.forward
    batch_forward = samples.batch_forward
    estimate_memory = samples.estimate_memory
    list_cached_samples = samples.list_cached_samples
    clear_cache = samples.clear_cache
    clear_all_cache = samples.clear_all_cache
    empty_cuda_cache = samples.empty_cuda_cache
    get_hidden_states = getters.get_hidden_states
    get_attn_weights = getters.get_attn_weights
    get_attn_weights_batch = getters.get_attn_weights_batch
    get_head_output = getters.get_head_output
    get_attn_output = getters.get_attn_output
    get_mlp_output = getters.get_mlp_output
    compute_node_gradient = gradients.compute_node_gradient
    node_gradient_report = gradients.node_gradient_report
    compute_node_gradient_batch = gradients.compute_node_gradient_batch
    gradient_x_activation = gradients.gradient_x_activation
    attribute_residual = scores.attribute_residual
    attribute_residual_terms = scores.attribute_residual_terms
    attribute_attn_weights = scores.attribute_attn_weights
    ablate = ablations.ablate
    ablate_sweep = ablations.ablate_sweep
    patch = patching.patch
    patch_sweep = patching.patch_sweep
    run_calls = together.run_calls
    knockout = interventions.knockout
    knockout_sweep = interventions.knockout_sweep
    create_steering_vector = steering.create_steering_vector
    save_feature_vector = steering.save_feature_vector
    list_steering_vectors = steering.list_steering_vectors
    get_steering_vector = steering.get_steering_vector
    delete_steering_vector = steering.delete_steering_vector
    lens = lens.lens
    features_topk = features.features_topk
    load_features = features.load_features
    list_features = features.list_features
    unload_features = features.unload_features
    describe_feature = features.describe_feature
    search_features = features.search_features
    trace_circuit = circuits.trace_circuit
    measure_text = compare.measure_text
    compare = compare.compare
    forward_results = forward_results
