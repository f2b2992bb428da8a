"""Edits inside a trace: against PyTorch hooks on the plain model, and against the same batch without them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from attribution.model.capture import Batch, forward
from attribution.model.edits import Edit, Target, changes_of, edited, in_order, present, targets_of
from attribution.model.load import trace_model
from attribution.model.resolve import resolve
from attribution.model.traced import Site, TracedModel
from attribution.selectors import Point, parse_selector
from tests.attribution.plain import distance, prompts_of, watch
from tests.gptq import save_gptq, with_kernels
from tests.models import FAMILIES, tiny_model, tiny_tokenizer, traced
from tests.server.steering_oracle import Edit as Plainly
from tests.server.steering_oracle import steered_logits

POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "logits")
LENGTHS = [11, 4, 9]


def batch_of(prompts: list[list[int]], keep: int) -> Batch:
    columns = max(map(len, prompts))
    return Batch(
        ids=torch.tensor([[7] * (columns - len(prompt)) + prompt for prompt in prompts]),
        mask=torch.tensor([[0] * (columns - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        positions=torch.tensor([[3] * (columns - len(prompt)) + list(range(len(prompt))) for prompt in prompts]),
        cache=DynamicCache(),
        keep=keep,
    )


def at(model: TracedModel, selector: str) -> list[Target]:
    parsed = parse_selector(selector)
    point = parsed.name if isinstance(parsed, Point) else None
    return targets_of(model, resolve(model, selector).streams[0], point=point)


def selector_of(point: str, layers: str = "1") -> str:
    return point if point == "logits" else f"{point}[{layers}]"


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edited_row_is_what_a_hook_on_a_plain_model_makes_it_and_its_neighbours_stay_bit_by_bit(
    family: str, point: str
) -> None:
    model, prompts, told = traced(family), prompts_of(LENGTHS), []
    batch, everything = batch_of(prompts, keep=11), resolve(model, "resid_post[*]").streams[0]

    def function(x: Tensor) -> Tensor:
        return x.cos() * 3

    (target,) = at(model, selector_of(point))
    changes = changes_of(model, [Edit(target, 2, function, range(-6, 0, 2), told=told.append)])
    before, kept_before = forward(model, batch_of(prompts, keep=11), [everything])
    logits, kept = forward(model, batch, [everything], changes)
    assert told == [range(-6, 0, 2)]
    assert torch.equal(logits[[0, 1]], before[[0, 1]])
    assert torch.equal(kept[everything][:, [0, 1]], kept_before[everything][:, [0, 1]])
    plainly = Plainly(point, (1,), function, range(3, 9, 2))  # nine tokens: the columns -6, -4, -2 are 3, 5, 7
    expected = steered_logits(tiny_model(family), prompts[2], [plainly])
    assert distance(logits[2, -9:], expected) < 1e-5
    assert distance(before[2, -9:], expected) > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_put_back_as_it_was_changes_no_bit(family: str) -> None:
    model, prompts = traced(family), prompts_of(LENGTHS)
    edits = [
        Edit(target, row, lambda x: x.clone())
        for point in POINTS
        for target in at(model, selector_of(point, "*"))
        for row in (0, 2)
    ]
    streams = [resolve(model, selector_of(point, "*")).streams[0] for point in POINTS]
    before, kept_before = forward(model, batch_of(prompts, keep=3), streams)
    after, kept = forward(model, batch_of(prompts, keep=3), streams, changes_of(model, edits))
    assert torch.equal(before, after)
    assert all(torch.equal(kept[stream], kept_before[stream]) for stream in streams)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_kept_at_an_edited_site_is_what_the_edit_left_there(family: str) -> None:
    model, (prompt,) = traced(family), prompts_of([6])
    plain = watch(tiny_model(family), prompt)
    for point in POINTS[:-1]:
        stream, (target,) = resolve(model, f"{point}[2]").streams[0], at(model, f"{point}[2]")
        change = changes_of(model, [Edit(target, 0, lambda x: x - 1.5, range(-2, 0))])
        _, kept = forward(model, batch_of([prompt], keep=1), [stream], change)
        expected = plain[point][2, 0].clone()
        expected[-2:] -= 1.5
        assert distance(kept[stream][0, 0], expected) < 1e-5, point


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_around_the_mlp_of_one_layer_act_in_the_order_of_the_model(family: str) -> None:
    model, (prompt,) = traced(family), prompts_of([6])
    functions = {
        "resid_post": lambda x: x * 0.5,
        "resid_mid": lambda x: x + 2,
        "mlp_out": lambda x: x * -3,
        "attn_out": lambda x: x - 1,
        "resid_pre": lambda x: x * 1.5,
    }
    edits = [Edit(at(model, f"{point}[1]")[0], 0, function) for point, function in functions.items()]
    logits, _ = forward(model, batch_of([prompt], keep=6), [], changes_of(model, edits))
    plainly = [Plainly(point, (1,), function) for point, function in functions.items()]
    assert distance(logits[0], steered_logits(tiny_model(family), prompt, plainly)) < 1e-5


def test_edits_of_one_target_are_made_in_the_order_in_which_they_are_given() -> None:
    tensor, target = torch.full((1, 1, 2), 5.0), Target(Site("x", "output"))
    double, raise_by_one = Edit(target, 0, lambda x: x * 2), Edit(target, 0, lambda x: x + 1)
    assert edited(tensor, [double, raise_by_one]).tolist() == [[[11.0, 11.0]]]
    assert edited(tensor, [raise_by_one, double]).tolist() == [[[12.0, 12.0]]]
    assert tensor.tolist() == [[[5.0, 5.0]]], "what the model had is not overwritten"


def test_only_the_heads_that_are_named_and_only_their_third_are_written() -> None:
    tensor = torch.arange(24.0).reshape(1, 1, 24)
    target = Target(Site("c_attn", "output"), heads=4, third=1)  # 8 … 15 in heads of two
    changed = edited(tensor, [Edit(target, 0, lambda x: -x, heads=(3, 1))])
    assert (changed != tensor).nonzero()[:, 2].tolist() == [10, 11, 14, 15]
    assert changed[0, 0, [10, 11, 14, 15]].tolist() == [-10, -11, -14, -15]


@pytest.mark.parametrize(
    ("columns", "count", "kept"),
    [
        (None, 3, [-3, -2, -1]),
        (range(-5, 0), 3, [-3, -2, -1]),
        (range(-6, 0, 2), 3, [-2]),
        (range(-5, 0, 2), 3, [-3, -1]),
        (range(-5, -3), 3, []),
        (range(-2, -1), 3, [-2]),
        (range(0), 3, []),
    ],
)
def test_columns_that_a_tensor_does_not_have_are_left_out(columns: range | None, count: int, kept: list[int]) -> None:
    assert list(present(columns, count)) == kept


def test_an_edit_of_columns_that_do_not_pass_is_not_told() -> None:
    model, told = traced("qwen3"), []
    (target,) = at(model, "lm_head.input")
    edit = Edit(target, 0, lambda x: x * 0, range(-6, -2), told=told.append)
    (prompt,) = prompts_of([6])
    logits, _ = forward(model, batch_of([prompt], keep=2), [], changes_of(model, [edit]))
    assert told == []
    assert torch.equal(logits, forward(model, batch_of([prompt], keep=2), [])[0])


@pytest.mark.parametrize(
    ("path", "side"),
    [
        ("model.embed_tokens", "output"),
        ("model.layers.1.self_attn", "output"),  # a tuple, its second member the pattern
        ("model.layers.1.self_attn", "input"),  # named at the call, not given by place
        ("model.layers.2.mlp.down_proj", "input"),
        ("model.norm", "output"),
        ("lm_head", "output"),
    ],
)
def test_any_side_of_a_module_is_edited(path: str, side: str) -> None:
    model, plain, (prompt,) = traced("llama"), tiny_model("llama"), prompts_of([6])
    (target,) = at(model, f"{path}.{side}")
    logits, _ = forward(
        model, batch_of([prompt], keep=6), [], changes_of(model, [Edit(target, 0, lambda x: x * 1.5, range(-3, 0))])
    )

    def after(module: Any, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        first[:, 3:] *= 1.5

    def before(module: Any, args: Any, kwargs: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()))
        first[:, 3:] *= 1.5

    module = plain.get_submodule(path)
    _ = (
        module.register_forward_hook(after)
        if side == "output"
        else module.register_forward_pre_hook(before, with_kwargs=True)
    )
    with torch.no_grad():
        expected = plain(torch.tensor([prompt])).logits[0]
    assert distance(logits[0], expected) < 1e-5


def test_targets_are_ordered_so_that_the_stream_is_added_up_between_its_parts() -> None:
    model = traced("gemma2")
    names = ["resid_post[1]", "resid_mid[1]", "mlp_out[1]", "logits"]
    (post, mid, mlp, logits) = (at(model, name)[0] for name in names)
    assert mid.carried == (mlp.site, post.site)
    assert in_order([post, mid, mlp, logits]) == [mlp, logits, mid, post]


def test_a_place_that_holds_no_tensor_any_more_is_an_error() -> None:
    model, (prompt,) = traced("qwen2"), prompts_of([5])
    edit = Edit(Target(Site("model", "output")), 0, lambda x: x)
    with pytest.raises(RuntimeError, match=r"model\.output held a tensor .* and holds none now"):
        forward(model, batch_of([prompt], keep=1), [], changes_of(model, [edit]))


def test_the_probe_counts_how_often_a_module_runs() -> None:
    plain = tiny_model("qwen3")
    plain.model.layers[2].mlp.act_fn = plain.model.layers[0].mlp.act_fn  # one module at two places
    model = trace_model("shared", plain, tiny_tokenizer())
    assert {site.path for site, seen in model.sites.items() if seen.visits != 1} == {"model.layers.0.mlp.act_fn"}
    assert model.sites[Site("model.layers.0.mlp.act_fn", "output")].visits == 2


@pytest.mark.parametrize("point", ["resid_mid", "z", "mlp_out", "k"])
def test_a_quantised_model_is_edited_in_its_own_modules(point: str, tmp_path: Path) -> None:
    dense = save_gptq(tmp_path)
    model = trace_model(str(tmp_path), with_kernels(dense, tmp_path), tiny_tokenizer())
    (prompt,), (target,) = prompts_of([9]), at(model, f"{point}[1]")
    edit = Edit(target, 0, lambda x: x * 1.5 + 1, range(-4, 0))
    logits, _ = forward(model, batch_of([prompt], keep=9), [], changes_of(model, [edit]))
    plainly = Plainly(point, (1,), lambda x: x * 1.5 + 1, range(5, 9))
    assert distance(logits[0], steered_logits(dense, prompt, [plainly])) < 1e-4
