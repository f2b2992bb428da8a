"""Training finds what was planted, and its constants are folded without a trace."""

import pytest
import torch

from attribution.errors import InvalidArgument
from attribution.features.autoencoder import Autoencoder
from attribution.features.places import Place
from attribution.features.scaling import Scale, folded
from attribution.features.streaming import Sample, shuffled_rows
from attribution.features.training import Recipe, Trainer, train
from tests.models import traced

WIDTH, PLANTED, ACTIVE = 20, 32, 2


def directions(seed, width=WIDTH):
    draw = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(PLANTED, width, generator=draw), dim=-1)


def sparse_rows(count, draw):
    """Rows in which two of the planted features are active, with strengths from 2 to 5."""
    active = torch.rand(count, PLANTED, generator=draw).topk(ACTIVE, dim=-1).indices
    strengths = 2 + 3 * torch.rand(count, ACTIVE, generator=draw)
    return torch.zeros(count, PLANTED).scatter(-1, active, strengths)


def trained(architecture, writes=None, **options):
    """An autoencoder of planted directions, far from the origin; with `writes` a transcoder to other directions."""
    recipe = Recipe(PLANTED, architecture, ACTIVE, rows=120_000, batch_rows=512, learning_rate=5e-3, **options)
    draw, reads = torch.Generator().manual_seed(1), directions(0, WIDTH if writes is None else 2 * WIDTH)
    offset = 3 * torch.randn(reads.shape[1], generator=torch.Generator().manual_seed(9))
    trainer = None
    for _ in range(recipe.steps):
        planted = sparse_rows(recipe.batch_rows, draw)
        x, y = planted @ reads + offset, None if writes is None else planted @ writes + 7
        trainer = trainer or Trainer(recipe, x, y)
        trainer.step(x, y)
    planted = sparse_rows(2000, draw)
    return trainer.finish(), planted, planted @ reads + offset


def unexplained(y, written):
    return float((y - written).square().sum() / (y - y.mean(0)).square().sum())


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_a_planted_dictionary_is_recovered(architecture):
    found, planted, x = trained(architecture)
    likeness = directions(0) @ found.W_dec.T
    assert (likeness.max(dim=1).values > 0.95).float().mean() > 0.9
    features = found.encode(x)
    assert unexplained(x, found.decode(features, x)) < 0.05
    assert float((features > 0).float().sum(-1).mean()) == pytest.approx(ACTIVE, abs=0.3)
    # where a planted feature is on, the one that was found for it is, too, about as strong
    for one, other in enumerate(likeness.argmax(dim=1).tolist()):
        if likeness[one, other] > 0.95:
            assert torch.corrcoef(torch.stack([planted[:, one], features[:, other]]))[0, 1] > 0.75


def test_a_transcoder_finds_what_is_written_for_what_is_read():
    writes = directions(5)
    found, planted, x = trained("jumprelu", writes)
    assert unexplained(planted @ writes + 7, found.reconstruct(x)) < 0.1
    assert ((writes @ found.W_dec.T).max(dim=1).values > 0.95).float().mean() > 0.8


def test_decoder_rows_have_length_one_and_the_threshold_is_that_of_the_end():
    found, _, _ = trained("jumprelu")
    torch.testing.assert_close(found.W_dec.norm(dim=-1), torch.ones(PLANTED))
    assert found.threshold is not None
    assert len(found.threshold.unique()) == 1


def test_folding_scales_gives_the_same_as_scaling_by_hand():
    draw = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    x, y = 5 * random(40, 6) + 2, 3 * random(40, 4) - 1
    weights = random(6, 9), random(9), random(9, 4), random(4)
    one = Autoencoder("jumprelu", *weights, threshold=0.3 * random(9).abs(), W_skip=random(6, 4))
    reads, writes = Scale.of(x), Scale.of(y)
    by_hand = one.reconstruct((x - x.mean(0)) * reads.factor) / writes.factor + y.mean(0)
    torch.testing.assert_close(folded(one, reads, writes).reconstruct(x), by_hand)
    # mean square 1 in every coordinate: Σ (x − mean)² · factor² = rows · width
    assert float(((x - x.mean(0)) * reads.factor).square().sum()) == pytest.approx(40 * 6)


@pytest.mark.parametrize("rescaled", [False, True])
def test_folding_keeps_what_takes_its_bias_off_and_what_rescales(rescaled):
    draw = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    x = 5 * random(40, 6) + 2
    scale = Scale.of(x)
    one = Autoencoder(
        "topk", random(6, 9), random(9), random(9, 6), random(6), k=3, subtracts_b_dec=True, rescaled=rescaled
    )
    by_hand = one.reconstruct((x - x.mean(0)) * scale.factor) / scale.factor + x.mean(0)
    torch.testing.assert_close(folded(one, scale, scale).reconstruct(x), by_hand)


def test_shuffled_rows_are_the_rows_of_the_model_each_once():
    model = traced("qwen3")
    place = Place("resid_post", 1)
    samples = [Sample([1 + n, 5, 7 + n], [True, False, True]) for n in range(30)]
    batches = [rows[place] for rows in shuffled_rows(model, [place], samples, batch_rows=8, buffer_rows=20)]
    assert [len(rows) for rows in batches] == [8] * 7 + [4]
    expected = []
    for sample in samples:
        hidden = model.module(torch.tensor([sample.token_ids]), output_hidden_states=True).hidden_states
        expected.append(hidden[2][0, [0, 2]])
    expected = torch.cat(expected)
    found = torch.cat(batches)
    distance = torch.cdist(found.double(), expected.double())
    assert sorted(distance.argmin(dim=1).tolist()) == list(range(60))
    assert float(distance.min(dim=1).values.max()) < 1e-3  # the rows are about 100 apart
    assert distance.argmin(dim=1).tolist() != list(range(60))


def drive(steps):
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return end.value, seen


def test_training_on_a_model_gives_an_autoencoder_of_its_place_and_tells_how_far_it_is():
    model = traced("gpt2")
    width = model.dimensions.d_model
    draw = torch.Generator().manual_seed(0)
    samples = [Sample(torch.randint(1, 90, (9,), generator=draw).tolist()) for _ in range(30)]
    recipe = Recipe(24, "jumprelu", 4, rows=256, batch_rows=32)
    found, seen = drive(train(model, Place("mlp_in", 0), Place("mlp_out", 0), recipe, samples))
    assert (found.d_in, found.n_features, found.d_out) == (width, 24, width)
    assert [one.done for one in seen] == [32 * n for n in range(1, 9)]
    assert all(torch.isfinite(one).all() for one in (found.W_enc, found.b_enc, found.W_dec, found.b_dec))
    with pytest.raises(InvalidArgument, match="the samples have 270 rows, and the training asks for 1000"):
        drive(train(model, Place("mlp_in", 0), Place("mlp_out", 0), Recipe(24, k=4, rows=1000), samples))


def test_what_cannot_be_trained_is_refused():
    rows = torch.ones(5, WIDTH)
    with pytest.raises(InvalidArgument, match="the 5 rows to begin with are all the same"):
        Trainer(Recipe(8, k=2), rows)
    with pytest.raises(InvalidArgument, match="only a transcoder has a skip path"):
        Trainer(Recipe(8, k=2, skip=True), torch.randn(5, WIDTH))
    with pytest.raises(InvalidArgument, match="k is at most the number of features, 8; found 9"):
        Recipe(8, k=9)
    with pytest.raises(InvalidArgument, match="rows is at least 1; found 0"):
        Recipe(8, k=2, rows=0)
    with pytest.raises(InvalidArgument, match="a sample of 3 tokens has 2 flags"):
        Sample([1, 2, 3], [True, False]).kept()
