"""The attributed pattern against autograd by the pattern itself, and the pattern's arithmetic in float64."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from attribution.attention import attention_pattern, attention_scores, hidden_edges, repeat_heads
from attribution.errors import InvalidArgument, OutOfRange, ShapeMismatch
from attribution.norms import Norm
from attribution.operations.scores import attribute_attn_weights, attribute_residual
from attribution.session import LocalSession
from tests.attribution.autograd_oracle import reference_attn_attribution
from tests.attribution.plain import distance, watch
from tests.attribution.scoring import LIMITS, PROMPTS, ask, plain_model, random_grad, stored_session
from tests.models import D_MODEL, FAMILIES, N_HEADS, N_KV_HEADS, N_LAYERS

Sessions = Callable[..., LocalSession]

IDS, POSITIONS = PROMPTS[0], [8, 2, 6]
GRADS = random_grad(2, len(POSITIONS))


@pytest.fixture(scope="module")
def session_of(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    return cache(lambda family, dtype="float32": stored_session(family, tmp_path_factory.mktemp("store"), dtype))


def question(**change: Any) -> dict[str, Any]:
    given = {"layer": 2, "head": 4, "downstream_grads": [grad[None] for grad in GRADS], "pos_ids": POSITIONS}
    return given | change


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_edges_are_attributed_their_slope(session_of: Sessions, family: str, dtype: str, signed: bool) -> None:
    model = plain_model(family, dtype)
    for layer in range(N_LAYERS):
        for head in (0, 3, N_HEADS - 1):
            pattern, scores = reference_attn_attribution(model, IDS, layer, head, GRADS, POSITIONS, signed=signed)
            given = question(layer=layer, head=head, signed=signed)
            aw, aa = ask(session_of(family, dtype), attribute_attn_weights, **given)
            assert aw.shape == aa.shape == (len(POSITIONS), len(IDS))
            assert aw.dtype == aa.dtype == getattr(torch, dtype)
            assert distance(aw, pattern) < LIMITS[dtype], (layer, head)
            assert distance(aa, scores) < LIMITS[dtype], (layer, head)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_is_the_models_and_its_rows_sum_to_one(session_of: Sessions, family: str) -> None:
    aw, aa = ask(session_of(family), attribute_attn_weights, **question())
    assert distance(aw, watch(plain_model(family), IDS)["pattern"][2, 0, 4][POSITIONS]) < 1e-5
    assert torch.allclose(aw.sum(-1), torch.ones(len(POSITIONS)))
    for row, query in enumerate(POSITIONS):
        assert bool((aw[row, query + 1 :] == 0).all())
        assert bool((aa[row, query + 1 :] == 0).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_signed_edges_sum_to_what_the_head_is_attributed(session_of: Sessions, family: str) -> None:
    _, aa = ask(session_of(family), attribute_attn_weights, **question(signed=True))
    whole = ask(
        session_of(family),
        attribute_residual,
        pos_ids=POSITIONS,
        downstream_grads=GRADS,
        downstream_layers=[3.0, 3.0],
        per_position=True,
    )
    assert distance(aa.sum(-1), whole[2, 4].sum(0)) < 1e-4


def test_each_gradient_adds_its_absolute_value(session_of: Sessions) -> None:
    both = ask(session_of("llama"), attribute_attn_weights, **question())[1]
    opposed = question(downstream_grads=[GRADS[:1], -GRADS[:1]])
    assert float(ask(session_of("llama"), attribute_attn_weights, **opposed, signed=True)[1].abs().max()) < 1e-5
    twice = ask(session_of("llama"), attribute_attn_weights, **opposed)[1]
    once = ask(session_of("llama"), attribute_attn_weights, **question(downstream_grads=GRADS[:1]))[1]
    other = ask(session_of("llama"), attribute_attn_weights, **question(downstream_grads=GRADS[1:]))[1]
    assert distance(twice, 2 * once) < 1e-6
    assert distance(both, once + other) < 1e-6


@pytest.mark.parametrize(
    ("change", "error", "param", "parts"),
    [
        ({"layer": 3}, OutOfRange, "layer", ["3", "0 to 2"]),
        ({"layer": -1}, OutOfRange, "layer", ["-1", "0 to 2"]),
        ({"head": 6}, OutOfRange, "head", ["6", "0 to 5"]),
        ({"pos_ids": [8, 2, 11]}, OutOfRange, "pos_ids", ["11", "0 to 10"]),
        ({"pos_ids": []}, InvalidArgument, "pos_ids", ["empty"]),
        ({"pos_ids": [8, 2]}, ShapeMismatch, "downstream_grads", ["[3, 48]", "[2, 48]"]),
        ({"downstream_grads": []}, InvalidArgument, "downstream_grads", ["at least one"]),
        ({"downstream_grads": "none"}, InvalidArgument, "downstream_grads", ["list of tensors"]),
        ({"signed": "maybe"}, InvalidArgument, "signed", ["maybe"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    session_of: Sessions, change: dict[str, Any], error: type[InvalidArgument], param: str, parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        ask(session_of("qwen2"), attribute_attn_weights, **question(**change))
    assert type(caught.value) is error
    assert caught.value.param == param
    for part in parts:
        assert part in str(caught.value)


# --- the functions of tensors, in float64


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 4.0)])
def test_the_pattern_of_tensors_is_written_out_softmax(window: int | None, softcap: float | None) -> None:
    queries, keys, heads = [2, 6, 0], 7, [5, 0, 2]
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(3, len(heads), 10, generator=generator, dtype=torch.float64)
    kv = torch.randn(keys, N_KV_HEADS, 10, generator=generator, dtype=torch.float64)
    k = repeat_heads(kv, heads, N_HEADS)
    hidden = hidden_edges(torch.tensor(queries), torch.arange(keys), window)
    found = attention_pattern(attention_scores(q, k, 0.7), hidden, softcap)
    for number, head in enumerate(heads):
        for row, query in enumerate(queries):
            scores = [0.7 * float(q[row, number] @ kv[key, head // 3]) for key in range(keys)]
            if softcap is not None:
                scores = [softcap * float(torch.tensor(one / softcap, dtype=torch.float64).tanh()) for one in scores]
            seen = [key <= query and (window is None or query - key < window) for key in range(keys)]
            sizes = torch.tensor(scores, dtype=torch.float64).exp() * torch.tensor(seen)
            assert distance(found[number, row], sizes / sizes.sum()) < 1e-12


@pytest.mark.parametrize("centred", [False, True])
def test_a_frozen_norm_is_affine_and_its_backward_is_its_gradient(centred: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, bias, x, other, grad = torch.randn(5, D_MODEL, generator=generator, dtype=torch.float64)
    norm = Norm(weight, bias if centred else None, 1e-5, centred)
    frozen = norm.at(x)
    if centred:
        expected = torch.nn.functional.layer_norm(x, [D_MODEL], weight, bias, 1e-5)
    else:
        expected = torch.nn.functional.rms_norm(x, [D_MODEL], weight, 1e-5)
    assert distance(frozen(x), expected) < 1e-12
    assert distance(frozen(3 * other) - frozen(torch.zeros_like(x)), 3 * (frozen(other) - frozen(0 * x))) < 1e-12
    leaf = other.clone().requires_grad_()
    assert distance(frozen.backward(grad), torch.autograd.grad((frozen(leaf) * grad).sum(), leaf)[0]) < 1e-12
