"""The logit lens: what the model would say next if the stream entering a layer were the final one.

nostalgebraist, "interpreting GPT: the logit lens" (2020).

1. The stream entering each layer, and the final one, are read off one forward pass (or off a stored sample).
2. Each goes through the model's own final norm and output head, called as the model calls them, final softcap included:
   of the final stream the lens gives the model's own logits, which is seen to at the last position of every forward.
3. Softmax, entropy and divergence are taken in float64, a few positions at a time: no tensor is [layer, pos, vocab].

The divergence from the final distribution is Σ p ln(p/q) over the whole vocabulary, p being final. It is not that of
`attribution.divergence`, which leaves out where q is tiny: of an early layer that is where the divergence lies.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.activations import padded
from attribution.errors import CannotFit, NotFinite, UnsupportedModel
from attribution.model.block import family_of
from attribution.model.capture import Stream, forward
from attribution.model.resolve import stream_of
from attribution.model.traced import TracedModel

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_MOST_NUMBERS = 2**22  # of one tensor over the vocabulary


@dataclass(frozen=True)
class Cell:
    """The lens at one layer and position.

    Attributes:
        kl: of the final distribution from this one, in nats.
        entropy: in nats.
        top: (token id, probability) of the most likely tokens, of equal ones the lower id first.
        asked: (token id, probability, rank) of the tokens that were asked for; rank 1 is the most likely one, and equal
            ones share the better rank.
    """

    kl: float
    entropy: float
    top: list[tuple[int, float]]
    asked: list[tuple[int, float, int]]


Streams = Callable[[int, list[int]], Tensor]
"""The stream entering a layer at some positions, [pos, d_model]; the number of layers gives the final one."""


@torch.no_grad()
def lens_logits(model: TracedModel, stream: Float[Tensor, "pos d_model"]) -> Float[Tensor, "pos vocab"]:
    """The model's logits, in its dtype and on the device of its head, if `stream` were the final one.

    Raises:
        UnsupportedModel: the points of the model are not proved.
    """
    norm: Any = model.module.get_submodule(family_of(model).final_norm)
    head: Any = model.module.get_output_embeddings()
    logits = _called(head, _called(norm, stream[None]))[0]
    softcap = getattr(model.module.config.get_text_config(), "final_logit_softcapping", None)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _called(module: Any, rows: Tensor) -> Tensor:
    """A module on rows that are brought to it; what is offloaded to the disk brings itself."""
    weight = next(module.parameters(), rows)
    return module(rows if weight.is_meta else rows.to(weight.device))


def streams_of(model: TracedModel, token_ids: list[int], layers: Iterable[int]) -> Streams:
    """Run some tokens and keep the streams entering these layers; the final one is always there.

    Raises:
        UnsupportedModel: the points of the model are not proved, or its output head is more than a norm and a matrix.
        CannotFit: there is no memory for them.
    """
    family_of(model)
    last = model.dimensions.n_layers
    order = sorted({*layers, last})
    _check_room(model, len(order), len(token_ids))
    entering = stream_of(model, "resid_pre", order[:-1]).sites
    wanted = Stream(entering + stream_of(model, "resid_post", [last - 1]).sites)
    logits, captured = forward(model, padded(model, [token_ids]), [wanted])
    kept = captured[wanted][:, 0]
    _check_head(model, logits[0, -1:], kept[-1, -1:])
    return lambda layer, positions: kept[order.index(layer), positions]


def _check_room(model: TracedModel, layers: int, tokens: int) -> None:
    """The streams are in memory twice for a moment: as they were caught, and stacked."""
    needed = 2 * layers * tokens * model.dimensions.d_model * model.dtype.itemsize
    if needed > (there := psutil.virtual_memory().available):
        raise CannotFit(
            f"the streams of {tokens} tokens entering {layers} layers take {needed:,} bytes and {there:,} are free: "
            "ask for fewer layers at a time, or for a shorter prompt",
            param="layers",
        )


def _check_head(model: TracedModel, own: Tensor, stream: Tensor) -> None:
    own, seen = own.double().cpu(), lens_logits(model, stream).double().cpu()
    error = float((own - seen).norm() / own.norm().clamp_min(1e-30))
    if own.isfinite().all() and not error <= _TOLERANCE.get(model.dtype, 1e-1):
        raise UnsupportedModel(
            f"{model.id!r} has no lens: its final norm and output head give other logits than it does itself "
            f"(relative error {error:.1e})",
            param="model",
        )


def pieces_of(positions: list[int], vocabulary: int) -> list[list[int]]:
    """Positions in pieces whose distributions are in memory together."""
    size = max(1, _MOST_NUMBERS // vocabulary)
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def final_log_probs(model: TracedModel, streams: Streams, positions: list[int]) -> Float[Tensor, "pos vocab"]:
    """The log-probabilities of the final distribution, in float64.

    Raises:
        NotFinite: the model computes NaN or inf there.
    """
    return _log_probs(model, streams, model.dimensions.n_layers, positions)


def lens_cells(
    model: TracedModel,
    streams: Streams,
    layer: int,
    positions: list[int],
    final: Float[Tensor, "pos vocab"],
    top_k: int,
    asked: list[int],
) -> list[Cell]:
    """The lens at one layer and some positions; `final` as `final_log_probs` has it there.

    Raises:
        NotFinite: the model computes NaN or inf there.
    """
    log_q = _log_probs(model, streams, layer, positions)
    q = log_q.exp()
    kl = (final.exp() * (final - log_q)).sum(-1).clamp_min(0.0)  # rounding leaves −1e-17 of equal ones
    entropy = -(q * log_q).sum(-1)
    chosen = log_q[:, asked]
    ranks = torch.stack([1 + (log_q > one[:, None]).sum(-1) for one in chosen.unbind(1)], 1) if asked else chosen.long()
    return [
        Cell(
            kl=float(kl[row]),
            entropy=float(entropy[row]),
            top=[(token, float(q[row, token])) for token in _most_likely(log_q[row], top_k)],
            asked=[
                (token, float(q[row, token]), int(rank)) for token, rank in zip(asked, ranks[row].tolist(), strict=True)
            ],
        )
        for row in range(len(positions))
    ]


def _log_probs(model: TracedModel, streams: Streams, layer: int, positions: list[int]) -> Float[Tensor, "pos vocab"]:
    found = lens_logits(model, streams(layer, positions)).double().log_softmax(-1).cpu()
    if not found.isfinite().all():
        where = positions[int((~found.isfinite().all(-1)).nonzero()[0])]
        raise NotFinite(f"the stream entering layer {layer} gives NaN or inf at position {where}")
    return found


def _most_likely(log_probs: Float[Tensor, "vocab"], count: int) -> list[int]:
    """The ids of the `count` highest entries: 16-bit logits are often equal, and then the lower id comes first."""
    least = log_probs.topk(count).values[-1]
    ids = (log_probs >= least).nonzero()[:, 0]
    order = log_probs[ids].sort(descending=True, stable=True).indices[:count]
    return ids[order].tolist()
