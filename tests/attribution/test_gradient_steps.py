"""A small step along a gradient changes what the plain model computes as the gradient says.

The real norms are not frozen. A norm's scale does not change to first order when the step is orthogonal to the
normed value, so that the steps taken here are what is left of the gradient across that value.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attribution.operations.gradients import compute_node_gradient
from tests.attribution.autograd_oracle import log_probability
from tests.attribution.plain_layers import final_norm, layers_of
from tests.attribution.scoring import DATASET, PROMPTS, ask, plain_model, random_grad, stored_session
from tests.models import FAMILIES, N_LAYERS

IDS = PROMPTS[0]
POSITIONS, SCORED = [4, 9], {"labels": [17, 200], "candidate_ids": [200, 3, 17]}
STEP = 1e-4


def across(gradient: Tensor, x: Tensor, *, centred: bool) -> Tensor:
    """The part of a gradient that leaves the scale of a norm as it is at `x`, with length 1 at each position."""
    if centred:
        x = x - x.mean(-1, keepdim=True)
    left = gradient - x * (gradient * x).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True)
    return left / left.norm(dim=-1, keepdim=True)


def moved(model: Any, norm: Any, direction: Tensor, positions: list[int], read: Any) -> tuple[float, float]:
    """What `read` gives when the input of a norm is moved back and forth."""
    found = []
    for size in (STEP, -STEP):

        def move(module: Any, args: Any, size: float = size) -> Any:
            x = args[0].clone()
            x[0, positions] += size * direction
            return (x,)

        handle = norm.register_forward_pre_hook(move)
        found.append(read())
        handle.remove()
    return found[0], found[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_becomes_as_much_likelier_as_the_gradient_says(tmp_path: Path, family: str) -> None:
    session, model = stored_session(family, tmp_path, "float64"), plain_model(family, "float64")
    given = {"node_type": "lm_head", "layer": N_LAYERS, "pos_ids": POSITIONS, "steps": 0, **SCORED}
    gradient = ask(session, compute_node_gradient, **given)[0]
    x, norm = session.sample(DATASET, 0).read("resid", N_LAYERS, POSITIONS), final_norm(model)
    direction = across(gradient, x, centred=isinstance(norm, torch.nn.LayerNorm))

    def likelihood() -> float:
        with torch.no_grad():
            logits = model(torch.tensor([IDS])).logits
        return float(log_probability(logits, POSITIONS, SCORED["labels"], SCORED["candidate_ids"]))

    better, worse = moved(model, norm, direction, POSITIONS, likelihood)
    predicted = float((gradient * direction).sum())
    assert predicted > 0
    # the real norm computes in float32, which a difference of 2e-4 sees
    assert (better - worse) / (2 * STEP) == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gpt2"])  # Gemma 2 norms what the MLP writes
def test_the_mlp_writes_as_much_more_as_its_gradients_say(tmp_path: Path, family: str) -> None:
    session, model = stored_session(family, tmp_path, "float64"), plain_model(family, "float64")
    grad, layer = random_grad(1, 2), layers_of(model)[1]
    given = {"layer": 1, "pos_ids": POSITIONS, "output_grad": grad, "steps": 0}
    branches = ["mlp_i"] if family == "gpt2" else ["mlp_i", "mlp_g"]
    parts = [ask(session, compute_node_gradient, node_type=branch, **given)[0] for branch in branches]
    gradient = torch.stack(parts).sum(0)
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = layer.norm_mid.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        model(torch.tensor([IDS]))
        handle.remove()
    direction = across(gradient, seen[0][0, POSITIONS], centred=family == "gpt2")

    def written() -> float:
        kept: list[Tensor] = []
        handle = layer.mlp.register_forward_hook(lambda module, args, output: kept.append(output))
        with torch.no_grad():
            model(torch.tensor([IDS]))
        handle.remove()
        return float((kept[0][:, POSITIONS] * grad).sum())

    more, less = moved(model, layer.norm_mid, direction, POSITIONS, written)
    assert (more - less) / (2 * STEP) == pytest.approx(float((gradient * direction).sum()), rel=0.02)


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])  # without norms of q and k or of what is written
def test_attention_writes_as_much_more_as_the_gradients_of_all_heads_say(tmp_path: Path, family: str) -> None:
    session, model = stored_session(family, tmp_path, "float64"), plain_model(family, "float64")
    grad, layer, everywhere = random_grad(1, 2), layers_of(model)[1], list(range(len(IDS)))
    given = {"layer": 1, "head": None, "pos_ids": POSITIONS, "src_pos_ids": everywhere, "output_grad": grad, "steps": 0}
    parts = [ask(session, compute_node_gradient, node_type=name, **given) for name in ("attn_a", "attn_v")]
    gradient = torch.cat(parts).sum(0)
    x = session.sample(DATASET, 0).read("resid", 1)
    direction = across(gradient, x, centred=family == "gpt2")
    direction[POSITIONS[1] + 1 :] = 0  # no query sees them: their gradient is 0

    def written() -> float:
        kept: list[Tensor] = []
        handle = layer.out_proj.register_forward_hook(lambda module, args, output: kept.append(output))
        with torch.no_grad():
            model(torch.tensor([IDS]))
        handle.remove()
        return float((kept[0][:, POSITIONS] * grad).sum())

    more, less = moved(model, layer.norm_in, direction, everywhere, written)
    assert (more - less) / (2 * STEP) == pytest.approx(float((gradient * direction).sum()), rel=0.02)
