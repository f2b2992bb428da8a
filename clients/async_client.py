"""`AsyncModelClient`: the methods of `ModelClient`, to be awaited."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, ParamSpec, TypeVar, cast

import httpx

from attribution.envelope import Packed
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
from attribution.results import batch_arguments, refer
from clients.options import check, checked_url, http_options, key_headers, load_body, moved, only_model
from clients.wire import RETRIES, Call, Exchange, call_of, get, post, status_path

P = ParamSpec("P")
R = TypeVar("R")


def awaited(operation: Operation[P, R]) -> Operation[P, Awaitable[R]]:
    """The same operation as a method of a session whose `run` is awaited; only its type is another."""
    return cast(Any, operation)


class AsyncModelClient:
    """`ModelClient` for asyncio: the same arguments and methods, each method to be awaited; an async context manager.

    `http_client` is an `httpx.AsyncClient`, or what has its methods.
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
        self._own = httpx.AsyncClient(**http_options(self.url, timeout)) if http_client is None else None
        self._http: Any = self._own or http_client

    async def __aenter__(self) -> "AsyncModelClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._own is not None:
            await self._own.aclose()

    async def run(self, operation: Operation[..., Any], arguments: dict[str, Any]) -> Any:
        """As `ModelClient.run`."""
        sent, own = check(operation, arguments)
        show = bool(own.get("show_progress", False))
        call = call_of(operation, sent, self.model, progress=show)
        return moved(await self._send(call, show=show), own.get("device", "cpu"))

    async def status(self) -> dict[str, Any]:
        """As `ModelClient.status`."""
        return await self._send(get(status_path(self.model), "status"))

    async def health(self) -> dict[str, Any]:
        """As `ModelClient.health`."""
        return await self._send(get("/health", "health"))

    async def models(self) -> dict[str, Any]:
        """As `ModelClient.models`."""
        return await self._send(get("/models", "models"))

    async def load_model(
        self, path: str, device: str = "auto", quantization: str | None = None, **load_options: Any
    ) -> dict[str, Any]:
        """As `ModelClient.load_model`."""
        call = post("/models/load", "load_model", load_body(path, device, quantization, load_options))
        loaded = await self._send(call)
        self.model = loaded["model"]
        return loaded

    async def unload_model(self) -> dict[str, Any]:
        """As `ModelClient.unload_model`."""
        name = self.model or only_model((await self.health())["loaded_models"])
        freed = await self._send(post("/models/unload", "unload_model", {"model_id": name}))
        self.model = None
        return freed

    async def forward_results(
        self, dataset_id: str, results: Sequence[Any], prompt_attr: str = "prompt", show_progress: bool = True
    ) -> Any:
        """As `attribution.results.forward_results`."""
        forwarded = await self.batch_forward(**batch_arguments(dataset_id, results, prompt_attr, show_progress))
        refer(dataset_id, results)
        return forwarded

    async def _send(self, call: Call, *, show: bool = False) -> Any:
        exchange = Exchange(call, self.url, self.retries)
        headers = call.headers | self._headers
        while True:
            content = call.chunks() if isinstance(call.body, Packed) else call.body
            try:
                with shown(call.name, show=show) as tell:
                    async with self._http.stream(
                        call.method, self.url + call.path, content=content, headers=headers
                    ) as response:
                        answer = exchange.answer(response.status_code, response.headers, tell)
                        async for chunk in response.aiter_bytes():
                            answer.feed(chunk)
                        return answer.finish()
            except exchange.failures as failure:
                pause = exchange.pause_after(failure)
            await asyncio.sleep(pause)

    # the operations, each declared once in `attribution.operations`
    forward = awaited(samples.forward)
    batch_forward = awaited(samples.batch_forward)
    estimate_memory = awaited(samples.estimate_memory)
    list_cached_samples = awaited(samples.list_cached_samples)
    clear_cache = awaited(samples.clear_cache)
    clear_all_cache = awaited(samples.clear_all_cache)
    empty_cuda_cache = awaited(samples.empty_cuda_cache)
    get_hidden_states = awaited(getters.get_hidden_states)
    get_attn_weights = awaited(getters.get_attn_weights)
    get_attn_weights_batch = awaited(getters.get_attn_weights_batch)
    get_head_output = awaited(getters.get_head_output)
    get_attn_output = awaited(getters.get_attn_output)
    get_mlp_output = awaited(getters.get_mlp_output)
    compute_node_gradient = awaited(gradients.compute_node_gradient)
    node_gradient_report = awaited(gradients.node_gradient_report)
    compute_node_gradient_batch = awaited(gradients.compute_node_gradient_batch)
    gradient_x_activation = awaited(gradients.gradient_x_activation)
    attribute_residual = awaited(scores.attribute_residual)
    attribute_residual_terms = awaited(scores.attribute_residual_terms)
    attribute_attn_weights = awaited(scores.attribute_attn_weights)
    ablate = awaited(ablations.ablate)
    ablate_sweep = awaited(ablations.ablate_sweep)
    patch = awaited(patching.patch)
    patch_sweep = awaited(patching.patch_sweep)
    run_calls = awaited(together.run_calls)
    knockout = awaited(interventions.knockout)
    knockout_sweep = awaited(interventions.knockout_sweep)
    create_steering_vector = awaited(steering.create_steering_vector)
    save_feature_vector = awaited(steering.save_feature_vector)
    list_steering_vectors = awaited(steering.list_steering_vectors)
    get_steering_vector = awaited(steering.get_steering_vector)
    delete_steering_vector = awaited(steering.delete_steering_vector)
    lens = awaited(lens.lens)
    features_topk = awaited(features.features_topk)
    load_features = awaited(features.load_features)
    list_features = awaited(features.list_features)
    unload_features = awaited(features.unload_features)
    describe_feature = awaited(features.describe_feature)
    search_features = awaited(features.search_features)
    trace_circuit = awaited(circuits.trace_circuit)
    measure_text = awaited(compare.measure_text)
    compare = awaited(compare.compare)
