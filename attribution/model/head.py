"""The output head: the final norm and the unembedding, for the whole vocabulary or for some candidates."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.model.block import family_of, read_norm
from attribution.model.dequantise import dense_weight
from attribution.model.traced import TracedModel


class OutputHead:
    """Residual stream to logits of `candidate_ids`, or of the whole vocabulary when that is None."""

    def __init__(self, model: TracedModel, candidate_ids: list[int] | None) -> None:
        path = family_of(model).final_norm
        module: Any = model.module.get_submodule(path)
        self.dtype, self.norm_dtype, self.device = model.work_dtype, module.weight.dtype, module.weight.device
        self.norm = read_norm(model, module)
        self.norm_envoy: Any = model.envoy.get(path)
        unembedding: Any = model.module.get_output_embeddings()
        rows = slice(None) if candidate_ids is None else candidate_ids
        self._weight = dense_weight(unembedding)[rows]
        self._bias = None if unembedding.bias is None else unembedding.bias.detach()[rows].to(self.dtype)
        self._softcap = getattr(model.module.config.get_text_config(), "final_logit_softcapping", None)

    @property
    def width(self) -> int:
        """How many logits there are."""
        return len(self._weight)

    def logits(self, normed: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows candidate"]:
        """The logits of rows that went through the final norm, softcap included."""
        weight = self._weight.to(normed.device)
        logits = torch.nn.functional.linear(normed.to(weight.dtype), weight).to(self.dtype)
        if self._bias is not None:
            logits = logits + self._bias
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap
