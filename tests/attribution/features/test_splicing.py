"""A reconstruction and its error in the place of what they make up: the model computes what it did."""

import pytest
import torch
from torch import Tensor

from attribution.features.autoencoder import Autoencoder
from attribution.features.places import PLACES, Place, place_rows, place_stream
from attribution.model.capture import Batch, forward
from attribution.model.edits import Edit, Target, changes_of, targets_of
from tests.attribution.features.plain_autoencoder import random_autoencoder
from tests.attribution.plain import distance, prompts_of
from tests.models import FAMILIES, traced

WRITABLE = [point for point in PLACES if point != "mlp_normalised"]
KINDS = [
    {"activation": "jumprelu", "subtracts_b_dec": True},
    {"activation": "topk", "rescaled": True},
    {"normalisation": "layer_norm"},
    {"normalisation": "constant_norm", "activation": "gated"},
]


def spliced(family: str, reads: Place, writes: Place, one: Autoencoder, *, error: bool) -> Tensor:
    """The logits with what the autoencoder makes of one place in the other, with or without the error."""
    model = traced(family)
    (target,) = targets_of(model, place_stream(model, writes), point=writes.point)
    stream = place_stream(model, reads)
    source = None if reads == writes else Target(stream.sites[0], stream.heads, stream.third)

    def put(rows: Tensor, read: Tensor | None = None) -> Tensor:
        x = place_rows(model, reads, rows if read is None else read)
        made = one.reconstruct(x)
        there = rows.reshape(len(rows), -1)
        return (made + (there - made) if error else made).reshape(rows.shape)

    return logits(family, [Edit(target, row, put, reads=source) for row in range(2)])


def logits(family: str, edits: list[Edit]) -> Tensor:
    model, ids = traced(family), torch.tensor(prompts_of([9, 9]))
    batch = Batch(ids, torch.ones_like(ids), torch.arange(9).expand_as(ids), None, 9)
    return forward(model, batch, [], changes_of(model, edits))[0]


def width(family: str, place: Place) -> int:
    model = traced(family)
    stream = place_stream(model, place)
    return int(stream.cut(torch.empty(model.sites[stream.sites[0]].shape)).numel())


@pytest.mark.parametrize("point", WRITABLE)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_autoencoder_with_its_error_changes_nothing(family: str, point: str) -> None:
    plain = logits(family, [])
    for layer, options in enumerate(KINDS):
        place = Place(point, layer % 3)
        one = random_autoencoder(seed=layer, dtype=torch.float32, d_in=width(family, place), n=31, **options)
        assert distance(spliced(family, place, place, one, error=True), plain) < 1e-5
        assert distance(spliced(family, place, place, one, error=False), plain) > 1e-3


@pytest.mark.parametrize("point", ["resid_mid", "mlp_normalised", "mlp_in", "mlp_hidden"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_transcoder_with_its_error_changes_nothing(family: str, point: str) -> None:
    plain = logits(family, [])
    for layer, options in enumerate([{}, {"skip": True}, {"activation": "jumprelu", "normalisation": "layer_norm"}]):
        reads, writes = Place(point, layer), Place("mlp_out", layer)
        sizes = {"d_in": width(family, reads), "d_out": width(family, writes), "n": 31, "restores": False}
        one = random_autoencoder(seed=layer, dtype=torch.float32, **sizes, **options)
        assert distance(spliced(family, reads, writes, one, error=True), plain) < 1e-5
        assert distance(spliced(family, reads, writes, one, error=False), plain) > 1e-3
