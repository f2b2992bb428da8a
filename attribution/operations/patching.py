"""Activation patching: a corrupted sample with activations of a clean one in their place. See `docs/ablation.md`.

Both samples are stored ones. To ask what breaks the clean answer in place of what repairs the corrupted one, swap them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from attribution import checks
from attribution.activation_patching import Effect, Effects, Patch, patched
from attribution.arguments import DatasetId, Index, Positions, SampleId
from attribution.errors import BadSelector, InvalidArgument
from attribution.model.replaced import POINTS
from attribution.operation import Steps, operation
from attribution.operations.devices import on_device
from attribution.rerun import Answer
from attribution.selectors import Point, parse_selector, pick
from attribution.stored import StoredSample
from attribution.sweeps import cells_of, grid, shaped
from attribution.written import check_positions

if TYPE_CHECKING:
    from attribution.session import LocalSession

Over = Literal["heads", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post"]


@operation(path="interventions/patch")
def patch(
    session: "LocalSession",
    dataset_id: DatasetId,
    clean_id: SampleId,
    corrupted_id: SampleId,
    heads: list[tuple[Index, Index]] | None = None,
    points: list[str] | None = None,
    positions: Positions | None = None,
    labels: Positions | None = None,
    candidate_ids: Positions | None = None,
    pos_ids: Positions | None = None,
    against: Positions | None = None,
    clean_dataset_id: DatasetId | None = None,
    show_progress: bool = False,
) -> Steps[dict[str, Any]]:
    """What the answer is worth in the corrupted sample with activations of the clean one put in place.

    Args:
        heads: (layer, head) each, before the output projection.
        points: selectors such as "resid_post[2]", "mlp_out[*]", "z[0:2]"; resid_pre, z, attn_out, resid_mid, mlp_out
            and resid_post can be patched.
        positions: the token positions at which they are; None is all, of samples of one length.
        labels: one token id per entry of `pos_ids`.
        candidate_ids: the softmax runs over these tokens; None is the whole vocabulary.
        pos_ids: the positions whose logits are scored, the same in both samples.
        against: one token id per label, whose logits are taken off the labels'.
        clean_dataset_id: the dataset that the clean sample is in; None is `dataset_id`.

    Returns:
        log_prob and, with `against`, logit_diff (else None), each a dict: clean, corrupted and patched, summed over
        `pos_ids` (nats, logits); recovery: (patched − corrupted) / (clean − corrupted), None when clean and corrupted
        are equal up to rounding, as `note` then says.
    """
    clean, corrupted = _pair(session, dataset_id, clean_id, corrupted_id, clean_dataset_id)
    _check(positions, pos_ids, clean, corrupted)
    at = None if positions is None else tuple(checks.positions("positions", positions, corrupted.seq_len))
    patches = _patches(session, heads or [], points or [], at)
    answer = Answer.of(session.model, corrupted.seq_len, labels, candidate_ids, pos_ids, against)
    effects = yield from patched(session.model, clean, corrupted, [patches], answer)
    return _shown(effects, lambda values: float(values[0]))


@operation(path="interventions/patch_sweep")
def patch_sweep(
    session: "LocalSession",
    dataset_id: DatasetId,
    clean_id: SampleId,
    corrupted_id: SampleId,
    over: Over,
    per_position: bool = False,
    layers: Positions | None = None,
    positions: Positions | None = None,
    labels: Positions | None = None,
    candidate_ids: Positions | None = None,
    pos_ids: Positions | None = None,
    against: Positions | None = None,
    clean_dataset_id: DatasetId | None = None,
    show_progress: bool = False,
    device: str = "cpu",
) -> Steps[dict[str, Any]]:
    """`patch` for every cell of a grid, as rows of shared batches.

    Args:
        over: every head by itself, or this point of every layer.
        per_position: every position by itself as well.
        layers: of the grid; None is all.
        positions: of the grid; None is all.
        labels, candidate_ids, pos_ids, against, clean_dataset_id: as in `patch`.

    Returns:
        axes: what the entries are, in order: "layer", then "head" and "position" where the grid has them; log_prob and
        logit_diff as in `patch`, with patched and recovery `[*axes]`. `sweep_table` and `sweep_map` show it.
    """
    clean, corrupted = _pair(session, dataset_id, clean_id, corrupted_id, clean_dataset_id)
    _check(positions, pos_ids, clean, corrupted)
    at = None if positions is None else checks.positions("positions", positions, corrupted.seq_len)
    axes = grid(session.model, layers, at, corrupted.seq_len, heads=over == "heads", each=per_position)
    point = "z" if over == "heads" else over
    sets = [[Patch(point, cell.layer, cell.head, cell.positions)] for cell in cells_of(axes, at)]
    answer = Answer.of(session.model, corrupted.seq_len, labels, candidate_ids, pos_ids, against)
    effects = yield from patched(session.model, clean, corrupted, sets, answer)
    return {"axes": axes, **_shown(effects, lambda values: on_device(shaped(values, axes), device))}


def _pair(
    session: "LocalSession",
    dataset_id: str,
    clean_id: int | str,
    corrupted_id: int | str,
    clean_dataset_id: str | None,
) -> tuple[StoredSample, StoredSample]:
    return session.sample(clean_dataset_id or dataset_id, clean_id), session.sample(dataset_id, corrupted_id)


def _check(
    positions: list[int] | None, pos_ids: list[int] | None, clean: StoredSample, corrupted: StoredSample
) -> None:
    """See that what is patched and what is scored is in both samples."""
    check_positions("positions", positions, clean, corrupted)
    check_positions("pos_ids", pos_ids, clean, corrupted)


def _patches(
    session: "LocalSession", heads: list[tuple[int, int]], points: list[str], positions: tuple[int, ...] | None
) -> list[Patch]:
    dims, name = session.model.dimensions, session.model.id
    for layer, head in heads:
        checks.in_range("heads", layer, dims.n_layers, f"the layers of {name}")
        checks.in_range("heads", head, dims.n_heads, f"the heads of {name}")
    found = [Patch("z", layer, head, positions) for layer, head in heads]
    for number, text in enumerate(points):
        try:
            point, layers = _point(text, dims.n_layers, name)
        except BadSelector as error:
            raise BadSelector(error.message, param=f"points.{number}") from error
        found += [Patch(point, layer, None, positions) for layer in layers]
    if not found:
        raise InvalidArgument("nothing is patched; name heads or points", param="points")
    return found


def _point(text: str, n_layers: int, model: str) -> tuple[str, list[int]]:
    point = parse_selector(text)
    if not isinstance(point, Point) or point.index is None or point.name not in POINTS:
        raise BadSelector(f"{text!r}: patched can be {', '.join(POINTS)}, each with a layer, as in 'resid_post[2]'")
    return point.name, pick(point.index, n_layers, text, f"the list of layers of {model}")


def _shown(effects: Effects, values: Callable[[Tensor], Any]) -> dict[str, Any]:
    return {"log_prob": _effect(effects.log_prob, values), "logit_diff": _effect(effects.logit_diff, values)}


def _effect(effect: Effect | None, values: Callable[[Tensor], Any]) -> dict[str, Any] | None:
    if effect is None:
        return None
    return {
        "clean": effect.clean,
        "corrupted": effect.corrupted,
        "patched": values(effect.patched),
        "recovery": None if effect.recovery is None else values(effect.recovery),
        "note": effect.note,
    }
