"""A session: one traced model and the activations of named samples. Every operation is a function of it.

`LocalSession` runs operations here. A server is local sessions behind threads and HTTP, and its client has the same
methods, each of which is one line in the class body (`attribution.operation`).
"""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attribution.errors import ModelNotFound
from attribution.features.sources import FeatureStore
from attribution.means import MeanCache
from attribution.model.load import LoadSpec, load
from attribution.model.traced import TracedModel
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
from attribution.progress import drive
from attribution.results import forward_results
from attribution.steering import VectorStore
from attribution.store import ActivationStore
from attribution.stored import Identity, StoredSample

DEFAULT_STORE = Path("/tmp/nnsight_store")
DEFAULT_STORE_RAM = 4 * 1024**3
DEFAULT_RUNS = Path("/tmp/nnsight_activations")
NONE_LOADED = "no model is loaded; load_model(path), or POST /models/load, loads one"


def vectors_beside(store: ActivationStore, folder: Path | str | None) -> VectorStore:
    """The steering vectors in a folder; None is the one beside that of the stored samples."""
    root = store.root.resolve()
    return VectorStore(root.with_name(f"{root.name}_vectors") if folder is None else Path(folder))


class LocalSession:
    """A model in this process and the samples stored for it, with every operation as a method.

    Args:
        model: a hub id, an alias, a folder, "demo", or a `TracedModel`; None to load one later.
        store: the folder of the stored samples, or an `ActivationStore` that is shared with other sessions.
        runs_dir: the folder in which a server records its runs, for `forward(run_id=…)`.
        vectors_dir: the folder of the steering vectors, or a `VectorStore` that is shared with other sessions; None is
            the folder of the samples with "_vectors" after its name. `vectors` is the store itself.
        features: the autoencoders: a registry file (features.toml), or a `FeatureStore` that is shared with other
            sessions; None begins with those of the embedded model alone. `features` is the store itself.
        load_options: fields of `LoadSpec`: dtype, device_map, quantization, …
    """

    def __init__(
        self,
        model: str | TracedModel | None = None,
        *,
        store: ActivationStore | Path | str = DEFAULT_STORE,
        runs_dir: Path | str = DEFAULT_RUNS,
        vectors_dir: VectorStore | Path | str | None = None,
        features: FeatureStore | Path | str | None = None,
        **load_options: Any,
    ) -> None:
        self.store = store if isinstance(store, ActivationStore) else ActivationStore(Path(store), DEFAULT_STORE_RAM)
        self.runs_dir = Path(runs_dir)
        self.vectors = vectors_dir if isinstance(vectors_dir, VectorStore) else vectors_beside(self.store, vectors_dir)
        self.features = features if isinstance(features, FeatureStore) else FeatureStore(features)
        self.means = MeanCache()
        self._model: TracedModel | None = None
        self._lock = threading.RLock()  # a model is traced by one thread at a time
        if isinstance(model, TracedModel):
            self._model = model
        elif model is not None:
            self.load_model(model, **load_options)

    @property
    def model(self) -> TracedModel:
        """The model of this session.

        Raises:
            ModelNotFound: none is loaded.
        """
        if self._model is None:
            raise ModelNotFound(NONE_LOADED, param="model")
        return self._model

    @property
    def loaded(self) -> TracedModel | None:
        """The model of this session; None when none is loaded."""
        return self._model

    def beside(self, model: TracedModel) -> "LocalSession":
        """A session of another model that shares all stores with this one."""
        return LocalSession(
            model, store=self.store, runs_dir=self.runs_dir, vectors_dir=self.vectors, features=self.features
        )

    def run(self, operation: Operation[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Run an operation here, with a progress bar when it is long and `show_progress` is not off."""
        checked = operation.validate(arguments)
        with self._lock:
            steps = operation.start(self, checked)
            return drive(steps, operation.name, show=bool(checked.get("show_progress", False)))

    def load_model(
        self, path: str, device: str = "auto", quantization: str | None = None, **load_options: Any
    ) -> dict[str, Any]:
        """Load a model in place of the present one; `load_options` are fields of `LoadSpec`. Says what it is."""
        self.unload_model()
        self._model = load(LoadSpec(path, device_map=device, quantization=quantization, **load_options))
        return self._model.describe()

    def unload_model(self) -> None:
        """Let go of the model and of the weights of its autoencoders; the stored samples stay."""
        if self._model is not None:
            self.features.drop(self._model.id)
        self._model = None

    @property
    def identity(self) -> Identity:
        """What ties stored samples to the model of this session."""
        return Identity.of(self.model)

    def sample(self, dataset_id: str, sample_id: int | str) -> StoredSample:
        """A stored sample of this model.

        Raises:
            DatasetNotFound, SampleNotFound, SampleMismatch, StorageFailed: as `ActivationStore.sample`.
        """
        return self.store.sample(dataset_id, sample_id, self.identity)

    def sample_ids(self, dataset_id: str) -> list[int | str]:
        """The samples of a dataset, integers first.

        Raises:
            DatasetNotFound, SampleMismatch, StorageFailed: as `ActivationStore.sample_ids`.
        """
        return self.store.sample_ids(dataset_id, self.identity)

    def status(self) -> dict[str, Any]:
        """Whether a model is loaded, which, where, the datasets stored for it, and what the store takes."""
        store = self.store
        room = {
            "dir": str(store.root),
            "ram_bytes": store.ram_bytes,
            "ram_used": store.ram_used,
            "disk_bytes": store.disk_used(),
        }
        if self._model is None:
            return {"model_loaded": False, "model": None, "cached_datasets": {}, "store": room}
        model, dims = self._model, self._model.dimensions
        return {
            "model_loaded": True,
            "model": model.id,
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "n_layers": dims.n_layers,
            "n_heads": dims.n_heads,
            "hidden_size": dims.d_model,
            "gated_mlp": model.family is not None and model.family.gate is not None,
            "fingerprint": model.fingerprint,
            "cached_datasets": store.datasets(self.identity),
            "store": room,
        }

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
