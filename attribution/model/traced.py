"""A loaded model: the nnsight envoy, its tokenizer, and the facts about it that everything else reads."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attribution.model.families import Family

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from attribution.model.twins import Twins


class Site(NamedTuple):
    """One side of one module. `path` counts from the root of the model; "" is the model, whose output is its logits."""

    path: str
    side: str


LOGITS = Site("", "output")
PROBE_ROWS, PROBE_TOKENS = 2, 7  # of the forward that sees the sites of a model


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model. `window` is the longest sequence that it takes, in tokens."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_vocab: int
    window: int

    @classmethod
    def of(cls, config: Any) -> "Dimensions":
        """Read the sizes off a transformers config."""
        n_heads = config.num_attention_heads
        return cls(
            n_layers=config.num_hidden_layers,
            n_heads=n_heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
            d_head=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
            d_model=config.hidden_size,
            d_vocab=config.vocab_size,
            window=getattr(config, "max_position_embeddings", None) or 2048,
        )


@dataclass(frozen=True)
class Seen:
    """What a probe forward saw at a site.

    Attributes:
        shape: widths after [row, position], or the whole shape when the tensor is not one row per token.
        dtype: of the tensor.
        tokenwise: whether the first two axes are [row, position].
        tail: whether only the last positions of a prompt pass here (the output head).
        visits: how often the module runs in one forward.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    tokenwise: bool
    tail: bool
    visits: int = 1


@dataclass(frozen=True)
class TracedModel:
    """One model that can be traced. One thread owns it; everything that runs the model runs there.

    Attributes:
        id: the name under which it was asked for.
        source: the folder or hub id that it was loaded from, with `revision` the commit where known.
        family: what is known about its points; None when it is served with module paths only.
        note: why `family` is None, in a sentence.
        end_token_ids: what ends a generation: the tokens of generation_config, of the config, and the tokenizer's.
        sites: what a probe forward saw, by site.
        fingerprint: of its weights, when it was loaded (`attribution.model.fingerprint`).
        quantization: "gptq", "nf4", "int8" or what its config calls another way; None when it is dense.
        twins: the dense twins of its layers when it is quantised.
        gradients_refused: why a quantised model gives no gradients, in a sentence; None when it does.
    """

    id: str
    source: str
    revision: str | None
    envoy: "TransformersModel"
    tokenizer: "PreTrainedTokenizerBase"
    dimensions: Dimensions
    family: Family | None
    note: str | None
    end_token_ids: frozenset[int]
    sites: dict[Site, Seen] = field(repr=False)
    load_seconds: float = 0.0
    memory_bytes: int = 0
    fingerprint: str = ""
    quantization: str | None = None
    twins: "Twins | None" = field(default=None, repr=False)
    gradients_refused: str | None = None

    @property
    def module(self) -> "PreTrainedModel":
        """The transformers model under the envoy."""
        return self.envoy._module  # type: ignore[return-value]

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations."""
        return self.module.dtype

    def describe(self) -> dict[str, Any]:
        """What the model is, as JSON; sizes in bytes, times in seconds."""
        sizes = self.dimensions
        return {
            "model": self.id,
            "model_type": self.model_type,
            "revision": self.revision,
            "points": self.family is not None,
            "note": self.note,
            "n_layers": sizes.n_layers,
            "n_heads": sizes.n_heads,
            "n_kv_heads": sizes.n_kv_heads,
            "hidden_size": sizes.d_model,
            "window": sizes.window,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "attn_implementation": self.attn_implementation,
            "quantization": self.quantization,
            "gradients_refused": self.gradients_refused,
            "load_seconds": round(self.load_seconds, 3),
            "memory_bytes": self.memory_bytes,
        }

    @property
    def work_dtype(self) -> torch.dtype:
        """The dtype of gradients and scores: float32, or float64 when the model is."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def layer(self, index: int) -> Any:
        """The envoy of a decoder layer whose points are known, to be traced alone; dense where it is quantised."""
        assert self.family is not None
        if self.twins is not None:
            return self.twins.layer(index)
        return self.envoy.get(self.family.layers)[index]

    @property
    def device(self) -> torch.device:
        """The device of the embedding, where token ids go."""
        return self.module.get_input_embeddings().weight.device  # type: ignore[return-value, union-attr]

    @property
    def model_type(self) -> str:
        """The name of the family in transformers."""
        return str(self.module.config.model_type)

    @property
    def attn_implementation(self) -> str:
        """The attention that the model runs: sdpa, eager or a kernel's name."""
        return str(self.module.config._attn_implementation)

    @cached_property
    def module_names(self) -> frozenset[str]:
        """The paths of all modules, counted from the root."""
        return frozenset(name for name, _ in self.module.named_modules() if name)

    @cached_property
    def template_hash(self) -> str | None:
        """The sha256 of the chat template, or None when there is none."""
        template = self.tokenizer.chat_template
        return None if template is None else hashlib.sha256(str(template).encode()).hexdigest()


def first_tensor(value: Any) -> Tensor | None:
    """The tensor of a module's input or output: itself, or the first of a tuple (attention returns output, pattern)."""
    if isinstance(value, tuple | list):
        value = next((item for item in value if isinstance(item, Tensor)), None)
    return value if isinstance(value, Tensor) else None
