"""The step loop and the reference path, against transformers' own generation and a plain forward."""

from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor

from attribution.model.capture import Batch, Change, Stream, forward
from attribution.model.decode import DecodeBatch, Fed, Prefill
from attribution.model.load import trace_model
from attribution.model.reference import generate
from attribution.model.resolve import resolve
from attribution.model.traced import TracedModel
from tests.attribution.plain import distance, greedy, prompts_of, watch
from tests.attribution.running import Watcher, reference, step_loop
from tests.models import FAMILIES, VOCAB, tiny_model, tiny_tokenizer, traced

NAMES = ("resid_pre", "resid_post", "k", "z", "mlp_out")


class Collector(Watcher):
    """Keeps every row of some points in all layers, and the logits."""

    def __init__(self, model: TracedModel, prompt: list[int], limit: int, tail: int = 1) -> None:
        super().__init__(prompt, limit, tail)
        self.streams = {name: resolve(model, f"{name}[*]").streams[0] for name in NAMES}
        self.pieces: dict[str, list[Tensor]] = {name: [] for name in NAMES}
        self.logits: list[Tensor] = []

    def wanted(self, start: int, stop: int) -> set[Stream]:
        return set(self.streams.values()) if start < stop else set()

    def see(self, fed: Fed, row: int) -> None:
        self.logits.append(fed.logits[row])
        for name, stream in self.streams.items():
            rows = fed.captured[stream][:, row]
            real = min(rows.shape[1], max(fed.ends[row], 0))
            self.pieces[name].append(rows[:, rows.shape[1] - real :])

    def check(self, family: str, **config_changes: object) -> None:
        """Tokens exactly, logits and activations closely, row for row."""
        plain = tiny_model(family, **config_changes)
        tokens, logits = greedy(plain, self.prompt, self.limit)
        assert self.tokens == tokens
        assert distance(torch.stack([piece[-1] for piece in self.logits])[-self.limit :], logits) < 1e-5
        fed = self.prompt + tokens[:-1]
        expected = watch(plain, fed)
        for name in NAMES:
            found = torch.cat(self.pieces[name], dim=1)
            assert found.shape[1] == len(self.prompt) + self.limit - 1
            assert distance(found, expected[name][:, 0]) < 1e-5, name


def collectors(family: str, lengths: list[int], limits: list[int]) -> list[Collector]:
    model = traced(family)
    return [Collector(model, prompt, limit) for prompt, limit in zip(prompts_of(lengths), limits, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_that_join_and_leave_at_different_steps_get_what_they_get_alone(family: str) -> None:
    a, b, c, d, e = collectors(family, [9, 3, 17, 1, 6], [6, 9, 4, 12, 1])
    # e ends at its prefill; c is longer than all that are there, d joins last and stays longest
    step_loop(traced(family), [[a, b], [], [c], [e, d]])
    for sequence in (a, b, c, d, e):
        sequence.check(family)


@pytest.mark.parametrize("chunk", [1, 4, 5, 16, 17])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_fed_in_pieces_that_do_not_divide_them_get_what_they_get_alone(family: str, chunk: int) -> None:
    group = collectors(family, [17, 3, 11], [3, 5, 4])
    step_loop(traced(family), [group], chunk)
    for sequence in group:
        sequence.check(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_path_gives_what_transformers_gives(family: str) -> None:
    sequences = collectors(family, [9, 1], [5, 7])
    reference(traced(family), sequences)
    for sequence in sequences:
        sequence.check(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_loop_and_the_reference_path_agree(family: str) -> None:
    lengths, limits = [8, 12, 2], [5, 3, 7]
    steps, single = (collectors(family, lengths, limits) for _ in range(2))
    step_loop(traced(family), [steps[:2], steps[2:]], chunk=5)
    reference(traced(family), single)
    for one, other in zip(steps, single, strict=True):
        assert one.tokens == other.tokens
        for name in NAMES:
            assert distance(torch.cat(one.pieces[name], 1), torch.cat(other.pieces[name], 1)) < 1e-5


def test_a_generation_is_not_the_same_token_over_and_over() -> None:
    # else the tests above could not tell one step from the next
    for family in FAMILIES:
        tokens, _ = greedy(tiny_model(family), prompts_of([9])[0], 12)
        assert len(set(tokens)) > 4, family


def test_a_long_generation_stays_right() -> None:
    group = collectors("gemma2", [21, 5], [40, 60])
    step_loop(traced("gemma2"), [group], chunk=8)
    for sequence in group:
        sequence.check("gemma2")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("gemma2", {"sliding_window": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_a_sliding_window_slides_over_the_steps_too(family: str, changes: dict[str, object]) -> None:
    model = trace_model("sliding", tiny_model(family, **changes), tiny_tokenizer())
    group = [Collector(model, prompt, 9) for prompt in prompts_of([2, 7, 11])]
    step_loop(model, [group[1:], [], group[:1]], chunk=3)
    for sequence in group:
        sequence.check(family, **changes)


class Twice(torch.nn.Module):
    """An MLP that runs twice in one forward."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.inner = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner(2 * x)


def test_of_a_module_that_runs_twice_in_a_forward_both_paths_read_the_first_run() -> None:
    plain, watched, (prompt,) = tiny_model("qwen3"), tiny_model("qwen3"), prompts_of([5])
    for model in (plain, watched):
        model.model.layers[1].mlp = Twice(model.model.layers[1].mlp)
    model = trace_model("twice", watched, tiny_tokenizer())
    stream = resolve(model, "model.layers[1].mlp.inner.output").streams[0]

    class One(Watcher):
        def __init__(self) -> None:
            super().__init__(prompt, 3)
            self.rows: list[Tensor] = []

        def wanted(self, start: int, stop: int) -> set[Stream]:
            return {stream}

        def see(self, fed: Fed, row: int) -> None:
            self.rows.append(fed.captured[stream][0, row])

    steps, single, runs = One(), One(), []
    step_loop(model, [[steps]])
    reference(model, [single])
    plain.model.layers[1].mlp.inner.register_forward_hook(lambda module, args, output: runs.append(output[0]))
    with torch.no_grad():
        plain(torch.tensor([prompt + steps.tokens[:-1]]))
    assert distance(runs[1], runs[0]) > 1e-2
    for one in (steps, single):
        assert distance(torch.cat(one.rows), runs[0]) < 1e-5


@pytest.mark.parametrize("path", [step_loop, reference])
def test_logits_of_the_prompts_tail_are_given_with_the_prompt(path: Callable[..., None]) -> None:
    model = traced("qwen3")
    (prompt,) = prompts_of([9])
    sequence = Collector(model, prompt, 3, tail=4)
    path(model, [[sequence]] if path is step_loop else [sequence])
    assert [len(piece) for piece in sequence.logits] == [4, 1, 1]
    expected = watch(tiny_model("qwen3"), prompt)["logits"][0, -4:]
    assert distance(sequence.logits[0], expected) < 1e-5


def test_of_a_prompt_fed_in_pieces_only_the_columns_of_its_tail_get_logits() -> None:
    model = traced("qwen3")
    (prompt,) = prompts_of([11])
    expected = watch(tiny_model("qwen3"), prompt)["logits"][0]
    prefill, shapes = Prefill(model, [prompt]), []
    while not prefill.done:
        fed = prefill.advance(4, 6, [])
        kept = fed.logits.shape[1]
        shapes.append(kept)
        assert distance(fed.logits[0], expected[fed.ends[0] - kept : fed.ends[0]]) < 1e-5
    # the tail is positions 5 to 10; pieces end at 4, 8 and 11; a piece without tail still gets one row
    assert shapes == [1, 3, 3]


def test_the_ends_of_a_padded_prefill_count_only_real_tokens() -> None:
    prefill, ends = Prefill(traced("qwen2"), prompts_of([7, 2, 4])), []
    while not prefill.done:
        ends.append(prefill.advance(3, 1, []).ends)
    # 7 columns in pieces of 3: 3, 6, 7; rows of 2 and 4 tokens start at columns 5 and 3
    assert ends == [[3, -2, 0], [6, 1, 3], [7, 2, 4]]


def test_only_the_rows_named_join_and_stay_in_the_order_named() -> None:
    model, prompts = traced("llama"), prompts_of([5, 8, 3, 6])
    prefill = Prefill(model, prompts)
    fed = prefill.advance(100, 1, [])
    first = [int(row[-1].argmax()) for row in fed.logits]
    batch = DecodeBatch(model)
    batch.join(prefill, [3, 0, 2])
    assert batch.lengths == [6, 5, 3]
    batch.keep([2, 0])
    assert batch.lengths == [3, 6]
    fed = batch.step([first[2], first[3]], [])
    assert fed.ends == [4, 7]
    for row, index in enumerate((2, 3)):
        expected = watch(tiny_model("llama"), [*prompts[index], first[index]])["logits"][0, -1]
        assert distance(fed.logits[row, -1], expected) < 1e-5


def test_columns_that_are_padding_for_all_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, columns = traced("qwen2"), prompts_of([20, 4, 6]), []

    def watched(model: TracedModel, batch: Batch, streams: Iterable[Stream], changes: Sequence[Change]) -> object:
        columns.append(batch.mask.shape[1])
        return forward(model, batch, streams, changes)

    prefill = Prefill(model, prompts)
    prefill.advance(100, 1, [])
    monkeypatch.setattr("attribution.model.decode.forward", watched)
    batch = DecodeBatch(model)
    batch.join(prefill, [0, 1, 2])
    batch.step([1, 2, 3], [])
    batch.keep([1, 2])
    batch.step([2, 3], [])
    late = DecodeBatch(model)
    late.join(prefill, [1])
    late.step([2], [])
    # the cached columns and the one that is fed: 20 + 1; without the longest 7 + 1; the row of 4 alone 4 + 1
    assert columns == [21, 8, 5]


def test_a_batch_that_everybody_left_takes_new_sequences() -> None:
    model = traced("qwen2")
    first, second = collectors("qwen2", [12, 5], [3, 6])
    step_loop(model, [[first], [], [], [], [second]])
    second.check("qwen2")


def test_a_prefill_of_which_nobody_joins_leaves_the_batch_as_it_was() -> None:
    model = traced("qwen2")
    stays, prompts = collectors("qwen2", [5], [6])[0], prompts_of([9, 2])
    batch = DecodeBatch(model)
    mine = Prefill(model, [stays.prompt])
    stays.choose(mine.advance(100, 1, stays.wanted(0, 5)), 0)
    batch.join(mine, [0])
    other = Prefill(model, prompts)
    other.advance(100, 1, [])
    batch.join(other, [])
    while len(stays.tokens) < 6:
        stays.choose(batch.step([stays.tokens[-1]], stays.wanted(0, 1)), 0)
    stays.check("qwen2")


def test_the_reference_path_stops_when_it_is_told_to() -> None:
    model, (prompt,) = traced("qwen3"), prompts_of([5])
    ends: list[int] = []

    def take(fed: Fed) -> int | None:
        ends.append(fed.ends[0])
        return None if len(ends) == 3 else 7

    generate(model, prompt, 50, 1, [], take)
    assert ends == [5, 6, 7]


def test_the_reference_path_feeds_the_tokens_that_take_chose() -> None:
    model, (prompt,) = traced("qwen3"), prompts_of([5])
    chosen, seen = [VOCAB - 1, 0, 17], []

    def take(fed: Fed) -> int | None:
        seen.append(fed.logits[0, -1])
        return chosen[len(seen) - 1] if len(seen) <= 3 else None

    generate(model, prompt, 4, 1, [], take)
    expected = watch(tiny_model("qwen3"), prompt + chosen)["logits"][0, 4:]
    assert distance(torch.stack(seen), expected) < 1e-5


def test_an_error_of_the_one_who_takes_leaves_the_reference_path_usable() -> None:
    model = traced("qwen3")

    def take(fed: Fed) -> int | None:
        raise LookupError("the one who takes has failed")

    with pytest.raises(LookupError, match="the one who takes has failed"):
        generate(model, prompts_of([5])[0], 4, 1, [], take)
    (sequence,) = collectors("qwen3", [5], [4])
    reference(model, [sequence])
    sequence.check("qwen3")


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": 7},
        {"repetition_penalty": 3.0, "suppress_tokens": [7], "no_repeat_ngram_size": 1},
        {"max_time": 0.0},
        {"do_sample": True, "temperature": 5.0, "num_beams": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_models_own_settings_have_no_part_in_the_reference_path(settings: dict[str, object]) -> None:
    # what is drawn and what ends a sequence is the caller's; it may ask for more after an end token
    plain, (prompt,), seen = tiny_model("qwen3"), prompts_of([5]), []
    for name, value in settings.items():
        setattr(plain.generation_config, name, value)
    model = trace_model("with settings", plain, tiny_tokenizer())

    def take(fed: Fed) -> int | None:
        seen.append(fed.logits[0, -1])
        return 7

    generate(model, prompt, 4, 1, [], take)
    expected = watch(tiny_model("qwen3"), [*prompt, 7, 7, 7])["logits"][0, 4:]
    assert distance(torch.stack(seen), expected) < 1e-5
    assert model.end_token_ids == {280} | ({7} if "eos_token_id" in settings else set())


def test_all_rows_join_and_stay_in_another_order() -> None:
    model, prompts = traced("llama"), prompts_of([5, 8])
    prefill = Prefill(model, prompts)
    first = [int(row[-1].argmax()) for row in prefill.advance(100, 1, []).logits]
    batch = DecodeBatch(model)
    batch.join(prefill, [1, 0])
    second = [int(row[-1].argmax()) for row in batch.step([first[1], first[0]], []).logits]
    batch.keep([1, 0])
    logits = batch.step([second[1], second[0]], []).logits
    for row in (0, 1):
        text = [*prompts[row], first[row], second[1 - row]]
        assert distance(logits[row, -1], watch(tiny_model("llama"), text)["logits"][0, -1]) < 1e-5
