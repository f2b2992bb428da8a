"""One feature: its descriptions, what it writes, and its neighbours.

With d what one unit of the feature writes, γ the weight of the final norm and U the output head:

    effect on the logit of token t = ⟨γ ⊙ d, U_t⟩ − mean over the vocabulary

(d less its mean where the norm takes it off). The norm divides by the size of the whole stream, which is another at
every position: it scales all these effects alike, and is left out.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.features.autoencoder import Autoencoder
from attribution.features.source import Source
from attribution.model.block import family_of, read_norm
from attribution.model.dequantise import dense_weight
from attribution.model.traced import TracedModel
from attribution.prompts import token_text

_ADDED = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
"""Points of the stream, and what is added to it as it is."""
_ROWS_AT_ONCE = 1 << 14


@torch.no_grad()
def feature_details(model: TracedModel, source: Source, index: int, top_k: int) -> dict[str, Any]:
    """What there is to say about a feature, as JSON; the keys are those of the operation `describe_feature`."""
    autoencoder = source.autoencoder(model.device, model.work_dtype)
    (direction,) = autoencoder.directions([index])
    (reader,) = autoencoder.readers([index])
    promoted, suppressed = _effects(model, source, direction, top_k)
    threshold = autoencoder.threshold
    return {
        "index": index,
        "source": source.name,
        "model_id": source.model_id,
        "layer": source.layer,
        "reads": str(source.reads),
        "writes": str(source.writes),
        "description": source.descriptions.of(index),
        "descriptions": [vars(one) for one in source.descriptions.all_of(index)],
        "decoder_norm": float(direction.norm()),
        "encoder_norm": float(reader.norm()),
        "bias": float(_bias(autoencoder)[index]),
        "threshold": None if threshold is None else float(threshold[index]),
        "promoted": promoted,
        "suppressed": suppressed,
        "neighbours": _neighbours(source, autoencoder, index, top_k),
    }


def logit_effects(model: TracedModel, direction: Float[Tensor, "d_model"]) -> Float[Tensor, "vocab"]:
    """What a direction of the stream does to the logits by its direct path; the head of this module has the formula."""
    module: Any = model.module.get_submodule(family_of(model).final_norm)
    norm = read_norm(model, module)
    written = direction.to(norm.weight)
    if norm.centred:
        written = written - written.mean()
    written = written * norm.weight
    unembedding = dense_weight(model.module.get_output_embeddings())
    effects = torch.cat([rows.to(written) @ written for rows in unembedding.split(_ROWS_AT_ONCE)])
    return effects - effects.mean()


def _effects(model: TracedModel, source: Source, direction: Tensor, top_k: int) -> tuple[Any, Any]:
    if source.writes.point not in _ADDED:
        return None, None
    effects = logit_effects(model, direction).cpu()
    count = min(top_k, len(effects))
    return _tokens(model, effects, effects.topk(count).indices), _tokens(model, effects, (-effects).topk(count).indices)


def _tokens(model: TracedModel, effects: Tensor, chosen: Tensor) -> list[dict[str, Any]]:
    return [
        {"token": token_text(model, token), "token_id": token, "logit": float(effects[token])}
        for token in chosen.tolist()
    ]


def _bias(autoencoder: Autoencoder) -> Tensor:
    """What is added to a feature's pre-activation."""
    if autoencoder.gate is not None:
        return autoencoder.gate.b_mag
    assert autoencoder.b_enc is not None
    return autoencoder.b_enc * autoencoder.decoder_norm if autoencoder.rescaled else autoencoder.b_enc


def _neighbours(source: Source, autoencoder: Autoencoder, index: int, top_k: int) -> list[dict[str, Any]]:
    rows, norms = autoencoder.W_dec, autoencoder.decoder_norm
    cosines = (rows @ rows[index]) / (norms * norms[index])
    cosines[index] = -2.0  # itself
    values, indices = cosines.topk(min(top_k, autoencoder.n_features - 1))
    return [
        {"index": one, "cosine": value, "description": source.descriptions.of(one)}
        for value, one in zip(values.tolist(), indices.tolist(), strict=True)
    ]
