"""Savepoints end to end, from selector and window to the saved tensor, against one plain forward of the whole text."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attribution.errors import CaptureTooLarge
from attribution.model.capture import Stream
from attribution.model.decode import Fed
from attribution.model.traced import TracedModel
from server.savepoints import Recorder, SavepointSpec, declare
from tests.attribution.plain import distance, greedy, module_value, prompts_of, watch
from tests.attribution.running import Watcher, reference, step_loop
from tests.models import D_MLP, D_MODEL, FAMILIES, VOCAB, tiny_model, traced

PROMPT, NEW = 9, 5
FED = PROMPT + NEW - 1  # the last token is never fed
EVERY, GENERATED = list(range(FED)), list(range(PROMPT, FED))

# name: selector, positions, dtype → what a plain model computes, its layers (None: no such axis), the positions by hand
SAVED: dict[str, tuple[str, object, str | None, str, Any, list[int]]] = {
    "stream": ("resid_post[*]", None, None, "resid_post", [0, 1, 2], EVERY),
    "entering": ("resid_pre[-1]", "all", None, "resid_pre", 2, EVERY),
    "prompt": ("resid_mid[1]", "prompt", None, "resid_mid", 1, list(range(9))),
    "generated": ("z[0:3:2]", "generated", None, "z", [0, 2], [9, 10, 11, 12]),
    "last": ("k[*]", "last", None, "k", [0, 1, 2], [8]),
    "slice": ("mlp_out[2]", {"start": 2, "stop": 11, "step": 3}, None, "mlp_out", 2, [2, 5, 8]),
    "open": ("q[1:2]", {"start": 4, "step": 5}, None, "q", [1], [4, 9]),
    "across": ("v[::-1]", {"start": 7, "stop": 11}, None, "v", [2, 1, 0], [7, 8, 9, 10]),
    "half": ("attn_out[0]", None, "bfloat16", "attn_out", 0, EVERY),
    "double": ("v[1]", "prompt", "float64", "v", 1, list(range(9))),
    "drawn": ("logits", None, None, "logits", None, [8, 9, 10, 11, 12]),
    "drawn_later": ("logits", "generated", None, "logits", None, GENERATED),
    "scored": ("logits", {"start": 3, "step": 2}, None, "logits", None, [3, 5, 7, 9, 11]),
    "pattern": ("pattern[*]", None, None, "pattern", [0, 1, 2], EVERY),
    "pattern_prompt": ("pattern[2]", "prompt", None, "pattern", 2, list(range(9))),
    "pattern_new": ("pattern[0:3:2]", "generated", None, "pattern", [0, 2], GENERATED),
    "pattern_some": ("pattern[1]", {"start": 3, "step": 4}, "float16", "pattern", 1, [3, 7, 11]),
}


class Recording(Watcher):
    """A sequence whose recorder is given its rows."""

    def __init__(self, model: TracedModel, prompt: list[int], limit: int, specs: list[SavepointSpec]) -> None:
        self.recorder = Recorder(model, declare(model, specs), len(prompt), 1 << 30)
        super().__init__(prompt, limit, self.recorder.tail)

    def wanted(self, start: int, stop: int) -> set[Stream]:
        return self.recorder.wanted(start, stop)

    def see(self, fed: Fed, row: int) -> None:
        self.recorder.take(fed, row)

    def finish(self) -> dict[str, tuple[Tensor, range]]:
        return self.recorder.finish(len(self.prompt) + len(self.tokens) - 1)


def specs() -> list[SavepointSpec]:
    return [SavepointSpec(name, selector, window, dtype) for name, (selector, window, dtype, *_) in SAVED.items()]


def check(sequence: Recording, family: str) -> None:
    """Every savepoint of `SAVED`: the tensor, its positions, its axes, its dtype."""
    plain = tiny_model(family)
    assert sequence.tokens == greedy(plain, sequence.prompt, NEW)[0]
    expected = watch(plain, sequence.prompt + sequence.tokens[:-1])
    for name, (tensor, positions) in sequence.finish().items():
        _, _, dtype, point, layers, rows = SAVED[name]
        stacked = isinstance(layers, list)
        value = expected["logits"][0] if layers is None else expected[point][layers]
        value = value[:, 0] if stacked else value if layers is None else value[0]
        axis = int(stacked) + int(point == "pattern")
        assert list(positions) == rows, name
        assert tensor.dtype == getattr(torch, dtype or "float32"), name
        tolerance = {"bfloat16": 1e-2, "float16": 1e-3}.get(dtype or "", 1e-5)
        assert distance(tensor, value.index_select(axis, torch.tensor(rows))) < tolerance, name


@pytest.mark.parametrize("family", FAMILIES)
def test_savepoints_of_a_sequence_alone_hold_what_a_plain_forward_of_the_whole_text_computes(family: str) -> None:
    sequence = Recording(traced(family), prompts_of([PROMPT])[0], NEW, specs())
    step_loop(traced(family), [[sequence]])
    check(sequence, family)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_savepoints_do_not_depend_on_who_else_is_in_the_batch(family: str, chunk: int) -> None:
    model = traced(family)
    mine, first, second, later, longest = prompts_of([PROMPT, 14, 3, 6, 21])
    sequence = Recording(model, mine, NEW, specs())
    others = [
        Recording(model, first, 3, [SavepointSpec("a", "resid_post[1]", "last")]),
        Recording(model, second, 9, []),
        Recording(model, later, 2, [SavepointSpec("b", "logits", "prompt")]),
        Recording(model, longest, 4, specs()),
    ]
    step_loop(model, [[others[0], sequence, others[1]], [], [others[2]], [others[3]]], chunk)
    check(sequence, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_savepoints_on_the_reference_path_hold_the_same(family: str) -> None:
    sequence = Recording(traced(family), prompts_of([PROMPT])[0], NEW, specs())
    reference(traced(family), [sequence])
    check(sequence, family)


def run(
    family: str, limit: int, *selectors: tuple[str, object], chunk: int = 100, prompt: int = PROMPT
) -> tuple[Recording, list[Tensor]]:
    """One sequence with these selectors and windows; its tensors in their order."""
    wanted = [SavepointSpec(str(i), selector, window) for i, (selector, window) in enumerate(selectors)]
    sequence = Recording(traced(family), prompts_of([prompt])[0], limit, wanted)
    step_loop(traced(family), [[sequence]], chunk)
    return sequence, [tensor for tensor, _ in sequence.finish().values()]


@pytest.mark.parametrize("new", [1, 2, 6])
def test_n_tokens_mean_prompt_plus_n_minus_one_rows_and_row_k_of_the_logits_drew_token_k(new: int) -> None:
    sequence, (stream, one, logits, head) = run(
        "qwen3", new, ("resid_post[*]", None), ("q[0]", None), ("logits", None), ("lm_head.output", "all")
    )
    assert stream.shape == (3, PROMPT + new - 1, D_MODEL)
    assert one.shape == (PROMPT + new - 1, 6, 10)
    assert logits.shape == head.shape == (new, VOCAB)
    assert logits.argmax(dim=-1).tolist() == sequence.tokens
    assert torch.equal(logits, head)


def test_gemma2s_logits_are_the_capped_ones_that_tokens_are_drawn_from() -> None:
    sequence, (logits, head) = run("gemma2", 4, ("logits", None), ("lm_head.output", None))
    _, drawn_from = greedy(tiny_model("gemma2"), sequence.prompt, 4)
    assert distance(logits, drawn_from) < 1e-5
    assert distance(logits, 6 * torch.tanh(head / 6)) < 1e-5


@pytest.mark.parametrize("chunk", [2, 4, 100])
@pytest.mark.parametrize(
    ("window", "rows"),
    [("prompt", list(range(9))), ({"start": 6}, [6, 7, 8, 9, 10]), ({"start": 2, "stop": 9, "step": 3}, [2, 5, 8])],
)
def test_the_output_head_is_read_over_the_prompt_when_asked_for(window: object, rows: list[int], chunk: int) -> None:
    sequence, (head_out, head_in) = run("qwen2", 3, ("lm_head.output", window), ("lm_head.input", window), chunk=chunk)
    text = sequence.prompt + sequence.tokens[:-1]
    for tensor, side in ((head_out, "output"), (head_in, "input")):
        assert distance(tensor, module_value(tiny_model("qwen2"), text, "lm_head", side)[rows]) < 1e-5


@pytest.mark.parametrize(
    ("family", "selector", "path", "side"),
    [
        ("gemma2", "model.layers[*].mlp.down_proj.input", "model.layers.{}.mlp.down_proj", "input"),
        ("gpt2", "transformer.h[*].attn.c_attn.output", "transformer.h.{}.attn.c_attn", "output"),
    ],
)
def test_module_paths_are_recorded_over_the_steps(family: str, selector: str, path: str, side: str) -> None:
    sequence, (whole, some) = run(family, 4, (selector, None), (selector, {"start": 8, "step": 2}), chunk=4)
    text = sequence.prompt + sequence.tokens[:-1]
    expected = torch.stack([module_value(tiny_model(family), text, path.format(i), side) for i in range(3)])
    assert distance(whole, expected) < 1e-5
    assert distance(some, expected[:, [8, 10]]) < 1e-5


def test_token_ids_are_recorded_as_the_integers_they_are() -> None:
    sequence, (ids,) = run("llama", 3, ("model.embed_tokens.input", None))
    assert ids.dtype == torch.int64
    assert ids.tolist() == sequence.prompt + sequence.tokens[:-1]


@pytest.mark.parametrize(
    ("selector", "shape"),
    [
        ("resid_post[*]", (3, 0, D_MODEL)),
        ("resid_post[1]", (0, D_MODEL)),
        ("z[1:]", (2, 0, 6, 10)),
        ("pattern[*]", (3, 6, 0, PROMPT)),
        ("pattern[0]", (6, 0, PROMPT)),
        ("logits", (0, VOCAB)),
        ("model.layers[*].mlp.down_proj.input", (3, 0, D_MLP)),
    ],
)
def test_a_window_that_was_never_reached_gives_no_rows_of_the_right_shape(
    selector: str, shape: tuple[int, ...]
) -> None:
    # one token is generated and never fed
    sequence, (tensor,) = run("qwen3", 1, (selector, "generated"))
    assert tensor.shape == shape
    assert len(sequence.tokens) == 1


def test_a_sequence_that_ends_early_keeps_what_was_fed() -> None:
    model, (prompt,) = traced("qwen3"), prompts_of([PROMPT])
    window = {"start": 7, "stop": 20, "step": 2}
    sequence = Recording(model, prompt, 3, [SavepointSpec("x", "resid_post[0]", window)])
    step_loop(model, [[sequence]])
    # 9 + 3 − 1 = 11 fed positions
    tensor, positions = sequence.finish()["x"]
    assert list(positions) == [7, 9]
    text = prompt + sequence.tokens[:-1]
    assert distance(tensor, watch(tiny_model("qwen3"), text)["resid_post"][0, 0, [7, 9]]) < 1e-5


# the recorder by itself


def recorder(*savepoints: tuple[str, object], max_bytes: int = 1 << 30) -> Recorder:
    model = traced("qwen3")
    wanted = [SavepointSpec(str(i), selector, window) for i, (selector, window) in enumerate(savepoints)]
    return Recorder(model, declare(model, wanted), PROMPT, max_bytes)


def names(streams: set[Stream]) -> set[str]:
    """The modules that are read, by the end of their path."""
    return {stream.sites[0].path.rpartition(".")[2] or "logits" for stream in streams}


def test_only_what_a_window_can_use_is_captured() -> None:
    one = recorder(("attn_out[0]", "prompt"), ("mlp_out[0]", "generated"), ("v[0]", "last"), ("logits", None))
    assert names(one.wanted(0, 4)) == {"o_proj"}
    assert names(one.wanted(4, 9)) == {"o_proj", "v_proj", "logits"}
    assert names(one.wanted(9, 10)) == {"mlp", "logits"}
    assert names(one.wanted(4, 4)) == set()
    stepped = recorder(("mlp_out[0]", {"start": 2, "stop": 9, "step": 3}))  # 2, 5, 8
    assert [bool(stepped.wanted(i, i + 1)) for i in range(10)] == [i in (2, 5, 8) for i in range(10)]


def test_a_pattern_needs_the_keys_of_every_position_and_only_its_own_queries() -> None:
    one = recorder(("pattern[0]", "generated"))
    assert names(one.wanted(0, 9)) == {"k_norm"}
    assert names(one.wanted(9, 10)) == {"q_norm", "k_norm"}


@pytest.mark.parametrize(
    ("savepoints", "tail"),
    [
        ([], 1),
        ([("resid_post[*]", None)], 1),
        ([("logits", None)], 1),
        ([("logits", "last")], 1),
        ([("logits", "generated")], 1),
        ([("logits", "prompt")], 9),
        ([("lm_head.output", {"start": 4})], 5),
        ([("lm_head.input", {"start": 30})], 1),
        ([("logits", None), ("lm_head.output", {"start": 2, "step": 3}), ("resid_post[0]", "prompt")], 7),
    ],
)
def test_logits_of_the_prompt_are_computed_as_far_back_as_a_savepoint_asks(
    savepoints: list[tuple[str, object]], tail: int
) -> None:
    assert recorder(*savepoints).tail == tail


def fed_with(one: Recorder, positions: range, fill: float = 1.0) -> Fed:
    """A forward of one row that fed these positions, every stream filled with one number."""
    streams = one.wanted(positions.start, positions.stop)
    width = {"k_norm": (2, 10), "q_norm": (6, 10)}
    captured = {
        stream: torch.full((len(stream.sites), 1, len(positions), *width.get(next(iter(names({stream}))), (48,))), fill)
        for stream in streams
    }
    return Fed(torch.zeros(1, 1, VOCAB), captured, [positions.stop])


def test_what_was_kept_does_not_change_with_the_tensors_it_was_taken_from() -> None:
    one = recorder(("resid_post[*]", None))
    fed = fed_with(one, range(9))
    one.take(fed, 0)
    for tensor in fed.captured.values():
        tensor.zero_()
    assert (one.finish(9)["0"][0] == 1).all()


def test_only_what_is_kept_is_held_in_memory() -> None:
    one = recorder(("resid_post[*]", "last"))
    one.take(fed_with(one, range(9)), 0)
    tensor, _ = one.finish(9)["0"]
    assert tensor.untyped_storage().nbytes() == 3 * 1 * 48 * 4


@pytest.mark.parametrize(
    ("savepoint", "size"),
    [
        (("resid_post[*]", None), 3 * 11 * 48 * 4),
        (("resid_post[1]", "generated"), 1 * 2 * 48 * 4),
        # q and k of what is needed of them, and the pattern itself
        (("pattern[1]", "generated"), (2 * 6 * 10 + 11 * 2 * 10 + 6 * 2 * 11) * 4),
    ],
)
def test_a_request_may_keep_just_as_many_bytes_as_the_limit_says(savepoint: tuple[str, object], size: int) -> None:
    def record(limit: int) -> None:
        one = recorder(savepoint, max_bytes=limit)
        for positions in (range(4), range(4, 9), range(9, 10), range(10, 11)):
            fed = fed_with(one, range(positions.start, positions.stop))
            one.take(fed, 0)
        one.finish(11)

    record(size)
    with pytest.raises(CaptureTooLarge, match="savepoint '0': this request keeps more bytes than the server allows"):
        record(size - 1)


def test_a_missing_piece_is_an_error_and_not_a_shorter_tensor() -> None:
    one = recorder(("resid_post[0]", None))
    one.take(fed_with(one, range(4)), 0)
    one.take(fed_with(one, range(5, 9)), 0)
    with pytest.raises(RuntimeError, match="0: kept 8 rows of 9"):
        one.finish(9)
