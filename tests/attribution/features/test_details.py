"""One feature in words: effects on logits against plain transformers, neighbours against a loop."""

from pathlib import Path

import pytest
import torch

from attribution.session import LocalSession
from tests.autoencoders import N_FEATURES, random_autoencoder, save_random
from tests.models import FAMILIES, tiny_model, traced

NORMS = {"gpt2": "transformer.ln_f"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_whose_logits_a_step_along_the_decoder_moves_most(family: str, tmp_path: Path):
    session = LocalSession(traced(family), store=tmp_path / "store")
    session.load_features(str(save_random(tmp_path / "one")), "one")
    found = session.describe_feature("one", 7, 5)
    plain = tiny_model(family).double()
    norm, head = plain.get_submodule(NORMS.get(family, "model.norm")), plain.get_output_embeddings()
    direction = random_autoencoder().W_dec[7].double()
    # A norm divides by the size of a row. About a row of size 1 (mean square 1, centred for a LayerNorm) to which the
    # step d is orthogonal, so that the size stays, the logits move by U (γ ⊙ d). The norms compute in float32.
    row = torch.randn(len(direction), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    step = direction - direction.mean() if family == "gpt2" else direction
    row = row - row.mean() if family == "gpt2" else row
    row = row - step * (row @ step) / (step @ step)
    row = row / row.square().mean().sqrt()
    with torch.no_grad():
        moved = (head(norm(row + 4e-3 * direction)) - head(norm(row - 4e-3 * direction))) / 8e-3
    moved = moved - moved.mean()
    for name, order in (("promoted", moved.argsort(descending=True)), ("suppressed", moved.argsort())):
        assert [one["token_id"] for one in found[name]] == order[:5].tolist()
        assert [one["logit"] for one in found[name]] == pytest.approx(moved[order[:5]].tolist(), rel=1e-4)
        assert all(one["token"] == session.model.tokenizer.decode([one["token_id"]]) for one in found[name])


def test_what_is_known_of_a_feature_is_what_its_tensors_say(tmp_path: Path):
    session = LocalSession(traced("qwen3"), store=tmp_path / "store")
    lines = [
        '{"index": 7, "description": "seven", "explanationModelName": "m"}',
        '{"index": 7, "description": "other"}',
    ]
    (tmp_path / "said.jsonl").write_text("\n".join(lines))
    made = random_autoencoder()
    session.load_features(str(save_random(tmp_path / "one")), "one", descriptions=str(tmp_path / "said.jsonl"))
    found = session.describe_feature("one", 7, 3)
    assert (found["description"], [one["text"] for one in found["descriptions"]]) == ("seven", ["seven", "other"])
    assert found["descriptions"][0] == {"text": "seven", "explainer": "m", "method": None}
    assert made.b_enc is not None
    assert made.threshold is not None
    numbers = (made.W_dec[7].norm(), made.W_enc[:, 7].norm(), made.b_enc[7], made.threshold[7])
    names = ("decoder_norm", "encoder_norm", "bias", "threshold")
    assert [found[name] for name in names] == pytest.approx([float(one) for one in numbers], rel=1e-5)
    cosines = {
        other: float(torch.cosine_similarity(made.W_dec[7], made.W_dec[other], dim=0))
        for other in range(N_FEATURES)
        if other != 7
    }
    nearest = sorted(cosines, key=lambda other: -cosines[other])[:3]
    assert [one["index"] for one in found["neighbours"]] == nearest
    assert [one["cosine"] for one in found["neighbours"]] == pytest.approx([cosines[one] for one in nearest], rel=1e-4)
    assert len(session.describe_feature("one", 7, 10_000)["neighbours"]) == N_FEATURES - 1


def test_what_is_not_added_to_the_stream_moves_no_logit_directly(tmp_path: Path):
    session = LocalSession(traced("qwen3"), store=tmp_path / "store")
    session.load_features(str(save_random(tmp_path / "head", "z[1]", d_in=60, d_dec=60)), "head")
    session.load_features(
        str(save_random(tmp_path / "t", "mlp_in[1]", "mlp_out[1]", threshold=None, activation="relu"))
    )
    found = session.describe_feature("head", 7)
    assert (found["promoted"], found["suppressed"]) == (None, None)
    transcoder = session.describe_feature("1-mlp_in", 7)
    assert (transcoder["reads"], transcoder["writes"], transcoder["threshold"]) == ("mlp_in[1]", "mlp_out[1]", None)
    assert len(transcoder["promoted"]) == 10
