"""The oracles themselves: against finite differences of the real modules, and against the identities.

The differences know nothing of autograd or of the oracles' patches: every norm is replaced by the gains that it
was seen to apply, what a node holds fixed is put back at the output of its projection, and a head is its slice
of what the output projection reads. Everything is in float64.
"""

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.attribution.autograd_oracle import (
    reference_ablation,
    reference_attn_attribution,
    reference_gradient,
    reference_residual,
)
from tests.attribution.plain import distance, prompts_of, watch
from tests.models import D_MODEL, FAMILIES, N_HEADS, N_LAYERS, tiny_model

IDS = prompts_of([8])[0]
ALL = list(range(8))
HEAD, LAYER = 4, 2  # reads key/value head 1; in Gemma 2 the layer slides
NODES = ("attn_v", "attn_q", "attn_k", "attn_a", "mlp_i", "mlp_g")
VARYING = {"attn_v": "v", "attn_q": "q", "attn_k": "k", "attn_a": "qk"}


def model_of(family: str) -> Any:
    return tiny_model(family, seed=3).double()


def random_like(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def float64_softmax() -> Any:
    softmax = torch.nn.functional.softmax
    return patch.object(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))


class RealLayer:
    """The model with its last layers' parts put under control by hooks: inputs moved, some outputs held."""

    def __init__(self, model: Any) -> None:
        self.model, self.hooks = model, ExitStack()
        decoder = model.get_decoder()
        self.layer = (decoder.h if hasattr(decoder, "h") else decoder.layers)[LAYER]
        self.final_norm = decoder.ln_f if hasattr(decoder, "ln_f") else decoder.norm
        self.attention = self.layer.attn if hasattr(self.layer, "attn") else self.layer.self_attn
        self.norms = [m for name, m in self.layer.named_modules() if "norm" in name or "ln_" in name]
        self.norm_in = self.layer.ln_1 if hasattr(self.layer, "ln_1") else self.layer.input_layernorm
        names = ("ln_2", "pre_feedforward_layernorm", "post_attention_layernorm")
        self.norm_mid = next(getattr(self.layer, name) for name in names if hasattr(self.layer, name))

    def on_input(self, module: Any, change: Any) -> None:
        self.hooks.callback(module.register_forward_pre_hook(lambda m, args: (change(args[0]),)).remove)

    def on_output(self, module: Any, change: Any) -> None:
        self.hooks.callback(module.register_forward_hook(lambda m, args, output: change(args[0], output)).remove)

    def run(self) -> Any:
        with torch.no_grad(), float64_softmax():
            return self.model(torch.tensor([IDS]), use_cache=False).logits

    def value(self, module: Any, side: int) -> Tensor:
        kept: list[Any] = []
        handle = module.register_forward_hook(lambda m, args, output: kept.append((args, output)))
        self.run()
        handle.remove()
        return kept[0][1] if side else kept[0][0][0]

    def freeze_norms(self) -> None:
        """Each norm multiplies by what it multiplied by, element for element."""
        for norm in [*self.norms, self.final_norm]:
            before, after = self.value(norm, 0), self.value(norm, 1)
            centre = (lambda x: x - x.mean(-1, keepdim=True)) if isinstance(norm, torch.nn.LayerNorm) else lambda x: x
            offset = norm.bias.detach() if isinstance(norm, torch.nn.LayerNorm) else 0.0
            gain = (after - offset) / centre(before)
            self.on_output(norm, lambda x, y, gain=gain, centre=centre, offset=offset: centre(x) * gain + offset)

    def hold_projections(self, varying: str) -> None:
        """The q, k and v that do not vary are put back to what they are, after their projection."""
        if hasattr(self.attention, "c_attn"):
            actual = self.value(self.attention.c_attn, 1)
            keep = torch.cat([torch.full((D_MODEL,), float(name not in varying)) for name in "qkv"]).bool()
            self.on_output(self.attention.c_attn, lambda x, y: torch.where(keep, actual, y))
            return
        for name in "qkv":
            if name not in varying:
                projection = getattr(self.attention, f"{name}_proj")
                actual = self.value(projection, 1)
                self.on_output(projection, lambda x, y, actual=actual: actual)


def slope(model: Any, node: str, grad: Tensor, direction: Tensor, pos_ids: list[int]) -> float:
    """d/dε of the node's objective when its input moves by ε·direction, by central differences."""
    real = RealLayer(model)
    with real.hooks:
        real.freeze_norms()
        if node in VARYING:
            entry, written = real.norm_in, real.attention
            out = real.attention.c_proj if hasattr(real.attention, "c_proj") else real.attention.o_proj
            width = out.weight.shape[0 if hasattr(out, "nf") else 1] // N_HEADS
            mask = torch.zeros(N_HEADS * width).double()
            mask[HEAD * width : (HEAD + 1) * width] = 1
            real.hold_projections(VARYING[node])
            real.on_input(out, lambda z: z * mask)
            post = getattr(real.layer, "post_attention_layernorm", None)
        else:
            entry, mlp = real.norm_mid, real.layer.mlp
            held = {"mlp_i": "gate_proj", "mlp_g": "up_proj"}[node]
            if hasattr(mlp, held):
                actual = real.value(getattr(mlp, held), 1)
                real.on_output(getattr(mlp, held), lambda x, y: actual)
            written, post = mlp, getattr(real.layer, "post_feedforward_layernorm", None)
        if hasattr(real.layer, "pre_feedforward_layernorm"):
            written = post
        sizes = []
        for step in (1e-4, -1e-4):
            with ExitStack() as moved:
                hook = entry.register_forward_pre_hook(lambda m, args, step=step: (args[0] + step * direction,))
                moved.callback(hook.remove)
                output = real.value(written, 1)
                output = output[0] if isinstance(output, tuple) else output
                sizes.append(float((output[:, pos_ids] * grad).sum()))
    return (sizes[0] - sizes[1]) / 2e-4


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_gradients_are_the_slopes_of_the_real_modules_with_frozen_norms(family: str, node: str) -> None:
    if (family, node) == ("gpt2", "mlp_g"):
        return
    model, pos_ids = model_of(family), [3, 6, 7]
    grad, direction = random_like(1, 3, D_MODEL), random_like(1, 8, D_MODEL, seed=2)
    found = reference_gradient(model, IDS, node, LAYER, HEAD, pos_ids, grad, steps=0, src_pos_ids=ALL)["gradient"]
    moved = direction if found.shape[1] == len(ALL) else direction[:, pos_ids]
    expected = slope(model, node, grad, direction, pos_ids)
    assert float((found * moved).sum()) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("candidates", [None, [4, 9, 200, 31]])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_the_logits_is_the_slope_of_the_real_model(family: str, candidates: list[int] | None) -> None:
    model, direction = model_of(family), random_like(1, 8, D_MODEL)
    found = reference_gradient(
        model, IDS, "lm_head", N_LAYERS, 0, [2, 5], labels=[200, 9], candidate_ids=candidates, steps=0
    )
    real, values = RealLayer(model), []
    with real.hooks:
        real.freeze_norms()
        for step in (1e-4, 0.0, -1e-4):
            move = real.final_norm.register_forward_pre_hook(lambda m, a, step=step: (a[0] + step * direction,))
            logits = real.run()[0]
            move.remove()
            options = candidates or list(range(logits.shape[-1]))
            chosen = [
                logits[2][options].softmax(-1)[options.index(200)],
                logits[5][options].softmax(-1)[options.index(9)],
            ]
            values.append(float(torch.stack(chosen).log().sum()))
    assert found["objective"] == pytest.approx(values[1], rel=1e-6)
    slope_of_all = float((found["gradient"] * direction[:, [2, 5]]).sum())
    assert slope_of_all == pytest.approx((values[0] - values[2]) / 2e-4, rel=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_are_complete_at_many_nodes_and_rules_meet(family: str) -> None:
    model, grad = model_of(family), random_like(1, 2, D_MODEL)
    arguments = {"labels": [200, 9], "candidate_ids": [9, 4, 200]}
    for node in ("lm_head", *NODES):
        if node == "attn_a" or (family, node) == ("gpt2", "mlp_g"):
            continue
        given: dict[str, Any] = arguments if node == "lm_head" else {"output_grad": grad}
        fine = reference_gradient(model, IDS, node, 1, HEAD, [3, 7], steps=32, **given)
        assert fine["completeness_error"] < (1e-9 if node == "attn_v" else 1e-5), node
        uniform = reference_gradient(model, IDS, node, 1, HEAD, [3, 7], steps=50, rule="uniform", **given)
        assert distance(uniform["gradient"], fine["gradient"]) < 0.1, node


@pytest.mark.parametrize("family", FAMILIES)
def test_four_nodes_are_the_default_and_zero_steps_are_not_complete(family: str) -> None:
    model, grad = model_of(family), random_like(1, 2, D_MODEL)
    errors = []
    for steps in (None, 4, 0):
        found = reference_gradient(model, IDS, "mlp_i", 1, HEAD, [3, 7], grad, steps=steps)
        errors.append(found["completeness_error"])
    assert errors[0] == errors[1] < errors[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_objectives_of_all_heads_sum_to_what_the_attention_writes(family: str) -> None:
    model, grad = model_of(family), random_like(1, 2, D_MODEL)
    heads = [
        reference_gradient(model, IDS, "attn_q", 1, head, [3, 7], grad, steps=0)["objective"] for head in range(N_HEADS)
    ]
    written = watch(model, IDS)["attn_out"][1][:, [3, 7]]
    bias = reference_residual(model, IDS, [3, 7], grad, [2.0])["attn_bias"][1, 0]
    # `watch` computes eager attention, whose softmax is in float32
    assert sum(heads) + float(bias) == pytest.approx(float((written * grad).sum()), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_components_sum_to_the_stream_at_every_depth(family: str) -> None:
    model, depths = model_of(family), [0.0, 0.5, 1.0, 1.5, 2.5, 3.0]
    grads = random_like(len(depths), 3, D_MODEL)
    parts = reference_residual(model, IDS, [0, 4, 7], grads, depths)
    found = parts["embedding"] + parts["attr"].sum((0, 1)) + parts["attn_bias"].sum(0)
    limit = 1e-6 if family == "gemma2" else 1e-9  # its post-norms compute in float32
    assert distance(found, parts["total"]) < limit
    points = watch(model, IDS)
    stream = points["resid_mid"][1][0, [0, 4, 7]]
    assert float(parts["total"][3]) == pytest.approx(float((stream * grads[3]).sum()), abs=1e-3)
    later = reference_residual(model, IDS, [0, 4, 7], grads[4:], depths[4:], from_layer=1, per_position=True)
    assert later["attr"].shape == (N_LAYERS, N_HEADS + 1, 2, 3)
    assert torch.equal(later["attr"][0], torch.zeros(N_HEADS + 1, 2, 3, dtype=torch.float64))
    found = later["embedding"] + later["attr"].sum((0, 1, 3)) + later["attn_bias"].sum(0)
    assert distance(found, later["total"]) < limit


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attributed_pattern_sums_to_the_heads_write(family: str) -> None:
    model, grads = model_of(family), random_like(2, 3, D_MODEL)
    pattern, signed = reference_attn_attribution(model, IDS, LAYER, HEAD, grads, [1, 6, 7], signed=True)
    seen = watch(model, IDS)["pattern"][LAYER, 0, HEAD]
    assert torch.allclose(pattern, seen[[1, 6, 7]], atol=1e-6)
    parts = reference_residual(model, IDS, [1, 6, 7], grads, [3.0, 3.0], per_position=True)
    assert torch.allclose(signed.sum(-1), parts["attr"][LAYER, HEAD].sum(0), rtol=1e-5, atol=1e-7)
    _, one = reference_attn_attribution(model, IDS, LAYER, HEAD, grads[:1], [1, 6, 7])
    _, other = reference_attn_attribution(model, IDS, LAYER, HEAD, grads[1:], [1, 6, 7])
    _, both = reference_attn_attribution(model, IDS, LAYER, HEAD, grads, [1, 6, 7])
    assert torch.allclose(both, one + other)
    assert bool((both >= signed.abs() - 1e-12).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_zeroing_is_what_a_model_without_these_weights_computes(family: str) -> None:
    model, cut = model_of(family), model_of(family)
    decoder = cut.get_decoder()
    with torch.no_grad():
        if family == "gpt2":
            decoder.h[1].attn.c_proj.weight[8 * HEAD : 8 * HEAD + 8] = 0
            decoder.h[0].mlp.c_proj.weight.zero_()
            decoder.h[0].mlp.c_proj.bias.zero_()
        else:
            weight = decoder.layers[1].self_attn.o_proj.weight
            width = weight.shape[1] // N_HEADS
            weight[:, width * HEAD : width * (HEAD + 1)] = 0
            decoder.layers[0].mlp.down_proj.weight.zero_()
    found = reference_ablation(model, IDS, [(1, HEAD)], [0], "zero", [9, 30], None, [2, 7], [])
    with torch.no_grad():
        rows = [m(torch.tensor([IDS])).logits[0, [2, 7]].log_softmax(-1) for m in (model, cut)]
    assert found == pytest.approx([float(row[0, 9] + row[1, 30]) for row in rows], rel=1e-6)
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_of_one_token_is_the_token_and_of_more_it_is_pooled(family: str) -> None:
    model, alone, everything = model_of(family), [IDS[:1]], ([(0, 2), (2, 5)], [0, 2], "mean")
    before, after = reference_ablation(model, IDS[:1], *everything, [9], [3, 9], [0], alone)
    assert after == pytest.approx(before, rel=1e-9)
    _, pooled = reference_ablation(model, IDS, *everything, [9], [3, 9], [7], [IDS[:1], IDS[:1], IDS[:1], IDS])
    _, means = reference_ablation(model, IDS, *everything, [9], [3, 9], [7], [IDS[:1], IDS])
    assert abs(pooled - means) > 1e-4
