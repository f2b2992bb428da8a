"""What a graph is about: one model, and the samples 0 … N − 1 of one dataset. Nothing else may enter it."""

import weakref
from dataclasses import dataclass
from typing import Any

from attribution.errors import InvalidArgument, ModelNotFound, OutOfRange, SampleMismatch
from attribution.results import SampleRef


@dataclass(frozen=True)
class GraphModel:
    """The model of a graph, as `status()` of a session tells it."""

    model: str
    dtype: str
    n_layers: int
    n_heads: int
    hidden_size: int
    gated_mlp: bool
    fingerprint: str

    @classmethod
    def of(cls, session: Any) -> "GraphModel":
        """The model that a `LocalSession` or `ModelClient` has.

        Raises:
            ModelNotFound: none is loaded.
        """
        status = session.status()
        if not status["model_loaded"]:
            raise ModelNotFound("no model is loaded; load_model(path) loads one", param="model")
        return cls(**{name: status[name] for name in cls.__dataclass_fields__})

    def __str__(self) -> str:
        sizes = f"{self.n_layers} layers, {self.n_heads} heads, width {self.hidden_size}"
        return f"{self.model!r} ({self.dtype}, {sizes}, weights {self.fingerprint[:12]})"

    def check(self, layer: int, head: int, node_type: str) -> None:
        """Raises: OutOfRange, InvalidArgument when the model has no such node."""
        if node_type == "mlp_g" and not self.gated_mlp:
            raise InvalidArgument(f"the MLPs of {self.model!r} have no gate; mlp_i is their only path", param="type")
        last = self.n_layers
        layers = range(last - 1, last + 1) if node_type == "lm_head" else range(last)
        column = {"lm_head": 0, "mlp_i": self.n_heads, "mlp_g": self.n_heads}.get(node_type)
        heads = range(self.n_heads) if column is None else range(column, column + 1)
        for name, value, allowed in (("layer", layer, layers), ("head", head, heads)):
            if value not in allowed:
                raise OutOfRange(
                    f"{name} of a node {node_type} is {value}; the model {self} has {allowed[0]} to {allowed[-1]}",
                    param=name,
                )


class GraphScope:
    """The model and dataset that a graph is tied to, by the first sample that enters it.

    Attributes:
        model: None until then, unless the graph comes from a file.
        dataset_id: of the samples that the gradients are of.
    """

    def __init__(self, dataset_size: int, hidden_size: int, model: GraphModel | None = None) -> None:
        self.dataset_size, self.hidden_size = dataset_size, hidden_size
        self.model = model
        self.dataset_id: str | None = None
        self._asked: weakref.ref[Any] | None = None

    def admit(self, r: Any, session: Any) -> SampleRef:
        """Where the sample of a result is stored, when it belongs here.

        Raises:
            InvalidArgument: `r` is no result, or was never run.
            OutOfRange: its index is not one of the dataset's.
            SampleMismatch: it is of another dataset, or the session of another model.
        """
        sample = sample_of(r)
        self.check_index(r.index)
        self.check_model(session)
        if self.dataset_id not in (None, sample.dataset_id):
            raise SampleMismatch(
                f"the gradients of this graph are of the dataset {self.dataset_id!r}, and this sample is of "
                f"{sample.dataset_id!r}; g.forget() lets go of them",
                param="r",
            )
        self.dataset_id = sample.dataset_id
        return sample

    def check_index(self, index: int) -> None:
        """Raises: OutOfRange when the dataset has no such sample."""
        if not 0 <= index < self.dataset_size:
            raise OutOfRange(
                f"the index of the result is {index}; the samples of this graph are 0 to {self.dataset_size - 1}",
                param="r",
            )

    def check_model(self, session: Any) -> GraphModel:
        """The model of a session, which is asked once.

        Raises:
            SampleMismatch: the graph is of another model.
            OutOfRange: the model has another width.
        """
        if self.model is not None and self._asked is not None and self._asked() is session:
            return self.model
        found = GraphModel.of(session)
        if self.model not in (None, found):
            raise SampleMismatch(f"this graph is of the model {self.model}, and this is {found}", param="model")
        if found.hidden_size != self.hidden_size:
            raise OutOfRange(f"hidden_size is {self.hidden_size}; the model is {found}", param="hidden_size")
        self.model, self._asked = found, weakref.ref(session)
        return found


def sample_of(r: Any) -> SampleRef:
    """Where the activations of a result are stored.

    Raises:
        InvalidArgument: it is no result, or was never run.
    """
    if not (hasattr(r, "outputs") and hasattr(r, "index")):
        raise InvalidArgument(f"a result is expected, not a {type(r).__name__}", param="r")
    if r.outputs is None:
        raise InvalidArgument(
            f"result {r.index} has no outputs, as its prompt was not run; model.forward_results(dataset_id, results) "
            "does",
            param="r",
        )
    return r.outputs
