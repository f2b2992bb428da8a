"""Gradient × activation against the plain model: its autograd, and what really happens to the objective."""

import math
from typing import Any

import pytest
import torch

from attribution.errors import GradientsRefused, InvalidArgument, NotFinite
from attribution.model.load import trace_model
from attribution.operations.ablations import ablate
from attribution.operations.gradients import gradient_x_activation
from attribution.operations.samples import forward
from attribution.session import LocalSession
from tests.attribution.autograd_oracle import layers_of, log_probability, record
from tests.attribution.scoring import PROMPTS, ask, plain_model, stored_session
from tests.models import FAMILIES, N_HEADS, N_LAYERS, tiny_model, tiny_tokenizer

SCORED = {"labels": [17, 200, 3], "pos_ids": [9, 3, 6], "candidate_ids": [200, 3, 17, 90]}
STEP = 1e-2  # transformers computes norms in float32 even here: smaller steps drown in its rounding


def _objective_when_scaled(model: Any, layer: int, column: int, factor: float) -> float:
    """The objective of the plain model when a head's output, or an MLP's, is multiplied by a factor."""
    place = layers_of(model)[layer]

    def scale_head(module: Any, args: Any) -> Any:
        z, width = args[0].clone(), args[0].shape[-1] // N_HEADS
        z[..., column * width : (column + 1) * width] *= factor
        return (z,)

    if column < N_HEADS:
        handle = place.out_proj.register_forward_pre_hook(scale_head)
    else:
        module = place.norm_mlp or place.mlp
        handle = module.register_forward_hook(lambda module, args, output: output * factor)
    logits = record(model, PROMPTS[0])["logits"]
    handle.remove()
    return float(log_probability(logits, SCORED["pos_ids"], SCORED["labels"], SCORED["candidate_ids"]))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_slope_of_the_objective_when_a_component_is_scaled(tmp_path, family: str) -> None:
    session, model = stored_session(family, tmp_path, "float64"), plain_model(family, "float64")
    found = ask(session, gradient_x_activation, **SCORED)
    assert found.shape == (N_LAYERS, N_HEADS + 1)
    assert found.dtype == torch.float64
    for layer, column in [(0, 0), (0, N_HEADS), (1, 4), (2, 5), (2, N_HEADS)]:
        up, down = (_objective_when_scaled(model, layer, column, 1 + sign * STEP) for sign in (1, -1))
        assert float(found[layer, column]) == pytest.approx((up - down) / (2 * STEP), rel=3e-3, abs=1e-4)


def test_with_means_it_estimates_what_mean_ablation_takes_away(tmp_path) -> None:
    session = stored_session("qwen3", tmp_path)
    scores = ask(session, gradient_x_activation, mode="mean", **SCORED)
    losses = []
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            one = ask(session, ablate, heads=[(layer, head)], mode="mean", **SCORED)
            losses.append(one["before"] - one["after"])
    both = torch.stack([scores[:, :-1].flatten(), torch.tensor(losses)])
    assert float(torch.corrcoef(both)[0, 1]) > 0.8
    assert not torch.allclose(scores, ask(session, gradient_x_activation, mode="zero", **SCORED), rtol=1e-2)


def test_a_dataset_of_means_is_refused_where_no_mean_is_taken(tmp_path) -> None:
    session = stored_session("qwen3", tmp_path)
    with pytest.raises(InvalidArgument, match="mode 'zero' takes none") as refused:
        ask(session, gradient_x_activation, source_dataset_id="puzzles", **SCORED)
    assert refused.value.param == "source_dataset_id"


@pytest.mark.parametrize("operation", [gradient_x_activation, ablate])
def test_a_model_that_computes_nan_gives_no_number(tmp_path, operation: Any) -> None:
    module = tiny_model("llama")
    session = LocalSession(trace_model("broken", module, tiny_tokenizer()), store=tmp_path)
    ask(session, forward, token_ids=PROMPTS[0])
    with torch.no_grad():
        module.lm_head.weight[3] = math.nan
    with pytest.raises(NotFinite, match="NaN or inf"):
        ask(session, operation, **SCORED)


def test_a_model_whose_kernels_have_no_gradient_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = stored_session("llama", tmp_path)
    monkeypatch.setitem(session.model.__dict__, "quantization", "gptq")
    with pytest.raises(GradientsRefused, match="compute_node_gradient"):
        ask(session, gradient_x_activation, **SCORED)
