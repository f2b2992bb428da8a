"""Figures, and losses with reconstructions in place, against hooks on the plain model."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from attribution.errors import InvalidArgument
from attribution.features.autoencoder import Autoencoder
from attribution.features.measuring import Piece, measure, spliced_logits
from attribution.features.places import Place
from attribution.features.streaming import Sample
from tests.models import traced

LAYERS = {"gpt2": ("transformer.h", "mlp"), "llama": ("model.layers", "mlp"), "gemma2": ("model.layers", None)}


def samples():
    draw = torch.Generator().manual_seed(0)
    lengths = (7, 12, 5, 12)
    ids = [torch.randint(1, 90, (length,), generator=draw).tolist() for length in lengths]
    # of the first sample two rows are left as they are, and one token is not scored
    keep, scored = [False, True, True, True, False, True, True], [True] * 6 + [False]
    return [Sample(ids[0], keep, scored), *(Sample(one) for one in ids[1:])]


def random_autoencoder(width, seed=0):
    draw = torch.Generator().manual_seed(seed)
    encoder, decoder = torch.randn(width, 30, generator=draw), torch.randn(30, width, generator=draw)
    return Autoencoder("relu", encoder / width**0.5, torch.randn(30, generator=draw) - 1, decoder / 5, decoder[0])


def exact(width):
    """max(x, 0) − max(−x, 0) is x: what it reconstructs is what it reads."""
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    return Autoencoder("relu", both.T.contiguous(), torch.zeros(2 * width), both, torch.zeros(width))


def drive(steps):
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def hooked_logits(model, family, sample, layer, changes):
    """The plain model's logits; `changes` gives what a layer ("resid_post") or its MLP ("mlp_out") leaves."""
    layers, mlp = LAYERS[family]
    module = model.module.get_submodule(f"{layers}.{layer}")
    keep = sample.kept()[None, :, None]
    with ExitStack() as stack:
        for point, change in changes.items():
            place = module if point == "resid_post" else module.get_submodule(mlp)

            def hook(_, given, output, change=change):
                tensor = output[0] if isinstance(output, tuple) else output
                tensor = torch.where(keep, change(given[0], tensor), tensor)
                return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

            stack.callback(place.register_forward_hook(hook).remove)
        return model.module(torch.tensor([sample.token_ids])).logits[0]


def loss_by_hand(logits, some):
    """−log softmax of each scored token at the place before it, by numpy."""
    total = count = 0
    for rows, sample in zip(logits, some, strict=True):
        rows = rows.double().numpy()
        for place in range(1, len(sample.token_ids)):
            if sample.scored is None or sample.scored[place]:
                row = rows[place - 1]
                total += np.log(np.exp(row - row.max()).sum()) - (row[sample.token_ids[place]] - row.max())
                count += 1
    return total / count, count


@pytest.mark.parametrize(
    ("family", "reads", "writes"),
    [("gpt2", "resid_post", "resid_post"), ("llama", "resid_post", "resid_post"), ("llama", "mlp_in", "mlp_out")],
)
def test_the_figures_are_those_of_hooks_on_the_plain_model(family, reads, writes):
    model, some, layer = traced(family), samples(), 1
    width = model.dimensions.d_model
    one = random_autoencoder(width)
    found = drive(measure(model, Piece(one, Place(reads, layer), Place(writes, layer)), some))

    x, y = [], []

    def see(read, written):
        x.append(written if reads == writes else read)
        y.append(written)
        return written

    plain = [hooked_logits(model, family, sample, layer, {writes: see}) for sample in some]
    kept = torch.cat([sample.kept() for sample in some])
    x, y = (torch.cat([one[0] for one in rows])[kept].double().numpy() for rows in (x, y))
    weights = [tensor.double().numpy() for tensor in (one.W_enc, one.b_enc, one.W_dec, one.b_dec)]
    active = np.maximum(x @ weights[0] + weights[1], 0)
    error = y - (active @ weights[2] + weights[3])
    assert found.rows == len(x) == 34
    assert found.l0 == pytest.approx((active > 0).sum(axis=1).mean())
    assert found.dead == (active.max(axis=0) == 0).sum()
    variance = ((y - y.mean(axis=0)) ** 2).sum()
    assert found.explained_variance == pytest.approx(1 - (error**2).sum() / variance, rel=1e-5)

    def reconstructed(read, written):
        return one.reconstruct(written if reads == writes else read)

    mean = torch.from_numpy(y.mean(axis=0)).float()
    changes = {
        "loss": {},
        "spliced": {writes: reconstructed},
        "zero": {writes: lambda _, written: torch.zeros_like(written)},
        "mean": {writes: lambda _, written: mean.expand_as(written)},
    }
    for name, change in changes.items():
        expected, count = loss_by_hand([hooked_logits(model, family, sample, layer, change) for sample in some], some)
        assert getattr(found, name) == pytest.approx(expected, rel=1e-5), name
        assert found.tokens == count == 31
    assert loss_by_hand(plain, some)[0] == pytest.approx(found.loss, rel=1e-5)
    assert found.recovered == pytest.approx((found.zero - found.spliced) / (found.zero - found.loss))
    assert found.recovered_of_mean == pytest.approx((found.mean - found.spliced) / (found.mean - found.loss))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("point", ["resid_pre", "resid_mid", "resid_post", "z", "attn_out", "mlp_out", "mlp_hidden"])
def test_an_exact_reconstruction_leaves_the_logits_as_they_are(family, point):
    model, some = traced(family), samples()
    place = Place(point, 1)
    from attribution.features.declared import width_of

    pieces = [Piece(exact(width_of(model, place)), place, place)]
    for with_it, without in zip(spliced_logits(model, some, pieces), spliced_logits(model, some, []), strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-5, atol=1e-5)


def test_several_pieces_read_what_those_before_them_left():
    model, some = traced("llama"), samples()
    width = model.dimensions.d_model
    first, second = random_autoencoder(width, 1), random_autoencoder(width, 2)
    pieces = [Piece(one, Place("mlp_in", layer), Place("mlp_out", layer)) for layer, one in enumerate((first, second))]
    found = spliced_logits(model, some, pieces)
    handles = [
        model.module.get_submodule(f"model.layers.{layer}.mlp").register_forward_hook(
            lambda _, given, __, one=one: one.reconstruct(given[0])
        )
        for layer, one in enumerate((first, second))
    ]
    whole = some[1:]  # every row of these is replaced
    expected = [model.module(torch.tensor([sample.token_ids])).logits[0] for sample in whole]
    for handle in handles:
        handle.remove()
    for one, other in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_samples_without_anything_to_measure_are_refused():
    model = traced("llama")
    piece = Piece(exact(model.dimensions.d_model), Place("resid_post", 0), Place("resid_post", 0))
    with pytest.raises(InvalidArgument, match="no token of the samples is kept"):
        drive(measure(model, piece, [Sample([1, 2, 3], [False] * 3)]))
    with pytest.raises(InvalidArgument, match="no token of the samples is counted"):
        drive(measure(model, piece, [Sample([1])]))
