"""The logit lens, held against plain transformers and against the formulas of each family's norm and head."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attribution.errors import CannotFit, InvalidArgument, NotFinite, OutOfRange, SampleNotFound, UnsupportedModel
from attribution.interventions import lens as lens_module
from attribution.model.load import trace_model
from attribution.operation import Progress
from attribution.operations.lens import lens
from attribution.session import LocalSession
from tests.attribution.plain import watch
from tests.models import FAMILIES, N_LAYERS, VOCAB, tiny_model, tiny_tokenizer, traced

IDS = [5, 9, 100, 42, 7, 250, 31]
EVERY = list(range(VOCAB))


def session_of(family: str, folder: Path) -> LocalSession:
    return LocalSession(traced(family), store=folder / "store")


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> LocalSession:
    return session_of("qwen3", tmp_path_factory.mktemp("session"))


def table(result: dict[str, Any], field: str) -> Tensor:
    """[layer, position], in float64."""
    return torch.tensor([[cell[field] for cell in row] for row in result["cells"]], dtype=torch.float64)


def probabilities(result: dict[str, Any]) -> Tensor:
    """[layer, position, vocab], of a lens that was asked for every token."""
    rows = [[[one["probability"] for one in cell["asked"]] for cell in row] for row in result["cells"]]
    return torch.tensor(rows, dtype=torch.float64)


def by_hand(family: str, stream: Tensor) -> Tensor:
    """Final norm and output head by their formulas, in float64, from the weights of a plain model."""
    model = tiny_model(family).double()
    decoder, x = model.get_decoder(), stream.double()
    norm = getattr(decoder, "norm", None) or decoder.ln_f
    if family == "gpt2":
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
    else:
        eps = norm.eps if family == "gemma2" else norm.variance_epsilon
        weight = 1 + norm.weight if family == "gemma2" else norm.weight
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    logits = x @ model.lm_head.weight.T
    return torch.tanh(logits / 6.0) * 6.0 if family == "gemma2" else logits


def plain_streams(family: str) -> Tensor:
    """The streams entering each layer and the final one, [layer, position, d_model], by hooks on a plain model."""
    seen = watch(tiny_model(family), IDS)
    return torch.cat([seen["resid_pre"][:, 0], seen["resid_post"][-1:, 0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_of_the_final_stream_the_lens_gives_the_models_own_logits(family: str, tmp_path: Path):
    found = session_of(family, tmp_path).lens(token_ids=IDS, layers=N_LAYERS, tokens=EVERY)
    with torch.no_grad():
        own = tiny_model(family)(torch.tensor([IDS])).logits[0].double()
    assert (probabilities(found)[0].log() - own.log_softmax(-1)).abs().max() < 1e-5
    assert table(found, "kl").abs().max() < 1e-12
    for position, cell in enumerate(found["cells"][0]):
        assert [one["token_id"] for one in cell["top"]] == own[position].topk(5).indices.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_layer_it_is_what_the_formulas_of_norm_and_head_give(family: str, tmp_path: Path):
    found = session_of(family, tmp_path).lens(token_ids=IDS, tokens=EVERY)
    assert found["layers"] == list(range(N_LAYERS + 1))
    assert found["positions"] == list(range(len(IDS)))
    log_q = by_hand(family, plain_streams(family)).log_softmax(-1)
    assert (probabilities(found).log() - log_q).abs().max() < 1e-4
    log_p = log_q[-1]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.allclose(table(found, "kl"), kl, rtol=1e-4, atol=1e-9)
    assert table(found, "kl")[:-1].min() > 0.01  # no layer is the final one
    assert torch.allclose(table(found, "entropy"), -(log_q.exp() * log_q).sum(-1), rtol=1e-4)


def test_ranks_count_from_the_most_likely_token(session: LocalSession):
    found = session.lens(token_ids=IDS, tokens=EVERY, top_k=VOCAB)
    for row in found["cells"]:
        for cell in row:
            by_rank = sorted(cell["asked"], key=lambda one: one["rank"])
            assert [one["rank"] for one in by_rank] == list(range(1, VOCAB + 1))
            assert [one["token_id"] for one in by_rank] == [one["token_id"] for one in cell["top"]]
            assert sum(one["probability"] for one in cell["top"]) == pytest.approx(1.0, abs=1e-12)


def constant(rows: list[list[float]]) -> Any:
    """In the place of `lens_logits`: these logits, whatever the stream."""
    return lambda model, stream: torch.tensor(rows)[: len(stream)]


def test_a_cell_by_hand(session: LocalSession, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lens_module, "lens_logits", constant([[0.0, 0.0, float(torch.tensor(2.0).log()), 0.0]]))
    final = torch.tensor([[0.7, 0.1, 0.1, 0.1]], dtype=torch.float64).log()
    (cell,) = lens_module.lens_cells(session.model, lambda layer, at: torch.zeros(1, 48), 0, [0], final, 3, [1, 2])
    # q = 0.2 0.2 0.4 0.2, and p = 0.7 0.1 0.1 0.1
    # KL = 0.7 ln 3.5 + 0.1 ln 0.5 + 0.1 ln 0.25 + 0.1 ln 0.5; entropy = −0.6 ln 0.2 − 0.4 ln 0.4
    assert cell.kl == pytest.approx(0.599676, abs=1e-6)
    assert cell.entropy == pytest.approx(1.332179, abs=1e-6)
    assert [token for token, _ in cell.top] == [2, 0, 1]  # of equal ones the lower id
    assert [round(share, 6) for _, share in cell.top] == [0.4, 0.2, 0.2]
    assert [(token, rank) for token, _, rank in cell.asked] == [(1, 2), (2, 1)]  # equal ones share the rank


def test_a_divergence_is_counted_where_the_lens_gives_next_to_nothing(
    session: LocalSession, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(lens_module, "lens_logits", constant([[-60.0, 0.0]]))
    final = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    (cell,) = lens_module.lens_cells(session.model, lambda layer, at: torch.zeros(1, 48), 0, [0], final, 1, [])
    # 0.9 (ln 0.9 + 60) + 0.1 ln 0.1: leaving out where q < 1e-10 would give −0.23
    assert cell.kl == pytest.approx(0.9 * 60 - 0.325083, abs=1e-5)


def test_a_small_divergence_keeps_its_digits(session: LocalSession, monkeypatch: pytest.MonkeyPatch):
    p = torch.full((1, 4), 0.25, dtype=torch.float64)
    delta = 1e-3
    q = p + torch.tensor([[delta, -delta, delta, -delta]])
    monkeypatch.setattr(lens_module, "lens_logits", lambda model, stream: q.log())
    (cell,) = lens_module.lens_cells(session.model, lambda layer, at: torch.zeros(1, 48), 0, [0], p.log(), 1, [])
    # −½ ln(1 − 16 δ²) = 8 δ² + 64 δ⁴ …
    assert cell.kl == pytest.approx(8e-6 + 64e-12, rel=1e-8)


@pytest.mark.parametrize(
    ("layers", "positions", "expected"),
    [
        (None, None, ([0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6])),
        (1, -1, ([1], [6])),
        (-1, [2, -2], ([3], [2, 5])),
        ("1:3", "-2:", ([1, 2], [5, 6])),
        ("all", {"start": 1, "stop": 3}, ([0, 1, 2, 3], [1, 2])),
        ([3, "0:2"], range(2), ([3, 0, 1], [0, 1])),
    ],
)
def test_layers_and_positions_are_those_asked_for_in_their_order(
    session: LocalSession, layers: Any, positions: Any, expected: tuple[list[int], list[int]]
):
    whole = session.lens(token_ids=IDS)
    found = session.lens(token_ids=IDS, layers=layers, positions=positions)
    assert (found["layers"], found["positions"]) == expected
    assert (found["token_ids"], len(found["tokens"])) == (IDS, len(IDS))
    for layer, row in zip(found["layers"], found["cells"], strict=True):
        for position, cell in zip(found["positions"], row, strict=True):
            there = whole["cells"][layer][position]
            assert [one["token_id"] for one in cell["top"]] == [one["token_id"] for one in there["top"]]
            assert cell["kl"] == pytest.approx(there["kl"], rel=1e-5, abs=1e-12)


def test_texts_and_messages_are_tokenised_as_everywhere(session: LocalSession):
    tokenizer = session.model.tokenizer
    assert session.lens("the rest")["token_ids"] == tokenizer.encode("the rest")
    found = session.lens(messages=[{"role": "user", "content": "the rest"}])
    assert "".join(found["tokens"]) == "<|im_start|>user\nthe rest<|im_end|>\n<|im_start|>assistant\n"


def test_a_stored_sample_gives_what_its_prompt_gives(session: LocalSession):
    session.forward("set", 0, token_ids=IDS)
    stored = session.lens(dataset_id="set", sample_id=0, tokens=[3, " the"])
    again = session.lens(token_ids=IDS, tokens=[3, " the"])
    assert stored == again


def test_the_vocabulary_is_taken_in_pieces_between_which_others_may_use_the_model(
    session: LocalSession, monkeypatch: pytest.MonkeyPatch
):
    whole = session.lens(token_ids=IDS, tokens=[1])
    monkeypatch.setattr(lens_module, "_MOST_NUMBERS", 3 * VOCAB)
    sizes, original = [], lens_module.lens_logits

    def watched(model: Any, stream: Tensor) -> Tensor:
        sizes.append(len(stream))
        return original(model, stream)

    monkeypatch.setattr(lens_module, "lens_logits", watched)
    steps = lens.start(session, lens.validate({"token_ids": IDS, "tokens": [1]}))
    progress = []
    while True:
        try:
            progress.append(next(steps))
        except StopIteration as end:
            found = end.value
            break
    assert max(sizes) == 3
    cells = (N_LAYERS + 1) * len(IDS)
    assert progress[0] == Progress(3, cells)
    assert progress[-1] == Progress(cells, cells)
    assert len(progress) == 3 * (N_LAYERS + 1)  # pieces of 3, 3 and 1 positions
    assert torch.allclose(table(found, "kl"), table(whole, "kl"), atol=1e-6)
    assert [[c["top"][0]["token_id"] for c in row] for row in found["cells"]] == [
        [c["top"][0]["token_id"] for c in row] for row in whole["cells"]
    ]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_16_bit_model_has_the_lens_of_its_own_rounding(family: str, tmp_path: Path):
    model = tiny_model(family).bfloat16()
    session = LocalSession(trace_model("half", model, tiny_tokenizer()), store=tmp_path / "store")
    found = session.lens(token_ids=IDS, layers=-1, tokens=EVERY)
    with torch.no_grad():
        own = tiny_model(family).bfloat16()(torch.tensor([IDS])).logits[0].double().log_softmax(-1)
    assert (probabilities(found)[0].log() - own).abs().max() < 0.05


def test_a_head_that_is_more_than_a_norm_and_a_matrix_has_no_lens(tmp_path: Path):
    model = tiny_model("llama")
    model.config.final_logit_softcapping = 3.0  # which Llama does not look at: a lens with it would be wrong
    session = LocalSession(trace_model("odd", model, tiny_tokenizer()), store=tmp_path / "store")
    with pytest.raises(UnsupportedModel, match=r"'odd' has no lens: .* other logits than it does itself"):
        session.lens(token_ids=IDS)


def test_nan_is_told_with_its_layer_and_position(tmp_path: Path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[42] = float("nan")  # 0 · NaN: attention brings it to every position
    session = LocalSession(trace_model("broken", model, tiny_tokenizer()), store=tmp_path / "store")
    with pytest.raises(NotFinite, match="the stream entering layer 3 gives NaN or inf at position 0"):
        session.lens(token_ids=IDS)


def test_what_would_not_fit_into_memory_is_not_begun(session: LocalSession, monkeypatch: pytest.MonkeyPatch):
    class Room:
        available = 5000

    monkeypatch.setattr(lens_module.psutil, "virtual_memory", Room)
    with pytest.raises(CannotFit, match="of 7 tokens entering 4 layers take 10,752 bytes and 5,000 are free"):
        session.lens(token_ids=IDS)  # 2 copies · 4 layers · 7 tokens · 48 wide · 4 bytes
    assert session.lens(token_ids=IDS[:2], layers=[0])["layers"] == [0]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"token_ids": None}, InvalidArgument, "exactly one of prompt, messages and token_ids"),
        ({"prompt": "x"}, InvalidArgument, "found prompt and token_ids"),
        ({"dataset_id": "set"}, InvalidArgument, "found dataset_id and token_ids"),
        ({"token_ids": None, "dataset_id": "set"}, InvalidArgument, "a dataset_id and a sample_id; one is missing"),
        ({"token_ids": None, "dataset_id": "set", "sample_id": 99}, SampleNotFound, "no sample 99"),
        ({"layers": 4}, OutOfRange, r"layers is 4; allowed are 0 to 3"),
        ({"layers": [0, -5]}, OutOfRange, "layers is -5; allowed are 0 to 3, and -1 to -4 from the end"),
        ({"layers": []}, InvalidArgument, "layers is empty"),
        ({"layers": "last"}, InvalidArgument, "layers: a number, a range"),
        ({"positions": 7}, OutOfRange, "positions is 7; allowed are 0 to 6"),
        ({"positions": [1, -6]}, InvalidArgument, "positions names a position twice"),
        ({"top_k": 0}, OutOfRange, "top_k is 0; tiny-qwen3 has 1 to 281"),
        ({"top_k": 1000}, OutOfRange, "top_k is 1000"),
        ({"tokens": [VOCAB]}, OutOfRange, "tokens is 281"),
        ({"tokens": ["two words"]}, InvalidArgument, "a text of one token is expected"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(
    session: LocalSession, changes: dict[str, Any], error: type, words: str
):
    session.forward("set", 0, token_ids=IDS)
    with pytest.raises(error, match=words):
        session.lens(**{"token_ids": IDS} | changes)
