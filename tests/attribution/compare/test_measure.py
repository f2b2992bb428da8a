"""One model's numbers: against plain transformers in float64, by hand, and against themselves in other batches."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from attribution.compare.measure import token_scores
from attribution.errors import CannotFit, InvalidArgument, NotFinite
from attribution.model.load import trace_model
from attribution.session import LocalSession
from tests.comparing import byte_tokenizer, bytes_of, tiny, unigram
from tests.models import FAMILIES, VOCAB, tiny_model, tiny_tokenizer

SENTENCES = ["the rest is in a while, they sing", "ä 漢 the", "on", "the the the the the other"]


def session(model: Any, folder: Path) -> LocalSession:
    return LocalSession(model, store=folder / "store")


def by_a_loop(family: str, ids: list[int]) -> list[tuple[float, int]]:
    """Log-probability and rank of each token but the first, each by a forward of its own over what precedes it."""
    module = tiny_model(family).double()
    module.set_attn_implementation("eager")
    found = []
    for at in range(1, len(ids)):
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([ids[:at]])).logits[0, -1].tolist()
        largest = max(logits)
        total = largest + math.log(math.fsum(math.exp(one - largest) for one in logits))
        found.append((logits[ids[at]] - total, 1 + sum(one > logits[ids[at]] for one in logits)))
    return found


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_sentences_are_those_of_plain_transformers(family: str, add_bos: bool, tmp_path: Path):
    found = session(tiny(family, family, add_bos=add_bos), tmp_path).measure_text(SENTENCES, show_progress=False)
    assert found["starts_with"] == (["<|endoftext|>"] if add_bos else [])
    for row, text in zip(found["sentences"], SENTENCES, strict=True):
        ids = tiny_tokenizer(add_bos=add_bos).encode(text)
        expected = by_a_loop(family, ids)
        own = row["logprobs"] if add_bos else row["logprobs"][1:]
        assert own == pytest.approx([one for one, _ in expected], rel=1e-4, abs=1e-5)
        assert [*filter(None, row["ranks"])] == [rank for _, rank in expected]
        if not add_bos:
            assert row["logprobs"][0] is row["ranks"][0] is None


@pytest.mark.parametrize("add_bos", [False, True])
def test_bits_per_byte_counts_the_bytes_of_what_is_scored(add_bos: bool, tmp_path: Path):
    rows = session(tiny("tiny", add_bos=add_bos), tmp_path).measure_text(SENTENCES)["sentences"]
    # without a start: "t" and "on" are one token; "ä" is two, of which the second is no character without the first
    unscored = [0, 0, 0, 0] if add_bos else [1, 2, 2, 1]
    skipped = [0, 0, 0, 0] if add_bos else [1, 2, 1, 1]
    for row, text, left_out, tokens in zip(rows, SENTENCES, unscored, skipped, strict=True):
        assert row["bytes"] == len(text.encode())
        assert row["scored_bytes"] == len(text.encode()) - left_out
        if row["scored_bytes"]:
            bits = -sum(row["logprobs"][tokens:]) / math.log(2)
            assert row["bits"] == pytest.approx(bits, rel=1e-12)
            assert row["bits_per_byte"] == pytest.approx(bits / row["scored_bytes"], rel=1e-12)
    assert (rows[2]["bits"] is None) is not add_bos  # "on" is one token
    assert rows[2]["note"] == (
        None
        if add_bos
        else "the whole text is its first token, and this tokenizer has nothing that could come before it"
    )


def test_by_hand(tmp_path: Path):
    weights = [0.0] * 257
    table = {byte: token for token in range(256) for byte in bytes_of(byte_tokenizer(), token)}
    for letter, weight in {"a": 4.0, "b": 2.0, "c": 1.0, "d": 1.0}.items():  # of 8: 1, 2, 3 and 3 bits
        weights[table[ord(letter)]] = weight
    weights = [max(one, 1e-30) for one in weights]
    model = unigram("bits", byte_tokenizer(bos=True), weights)
    found = session(model, tmp_path).measure_text(["abc", "dab"], ["ab", "c"])
    assert [row["bits"] for row in found["sentences"]] == pytest.approx([6.0, 6.0], rel=1e-6)
    assert [row["bits_per_byte"] for row in found["sentences"]] == pytest.approx([2.0, 2.0], rel=1e-6)
    assert [row["ranks"] for row in found["sentences"]] == [[1, 2, 3], [3, 1, 2]]  # c and d share the better rank
    ab, c = found["terms"]
    assert (ab["n_occurrences"], ab["n_measured"], ab["n_tokens"]) == (2, 2, 2.0)
    assert ab["logprob"] == pytest.approx(-3 * math.log(2), rel=1e-6)
    assert ab["mean_rank"] == 1.5
    assert (c["logprob"], c["mean_rank"]) == (pytest.approx(-3 * math.log(2), rel=1e-6), 3.0)


def test_a_batch_gives_what_single_sentences_give(tmp_path: Path):
    here = session(tiny("tiny"), tmp_path)
    together = here.measure_text(SENTENCES, ["the"])
    for text, row in zip(SENTENCES, together["sentences"], strict=True):
        (alone,) = here.measure_text([text])["sentences"]
        assert row["logprobs"][0] is alone["logprobs"][0] is None
        assert row.pop("logprobs")[1:] == pytest.approx(alone.pop("logprobs")[1:], rel=1e-5, abs=1e-6)
        for name in ("bits", "bits_per_byte"):
            assert (row.pop(name) or 0.0) == pytest.approx(alone.pop(name) or 0.0, rel=1e-5), name
        assert row == alone


def test_terms_are_scored_over_the_tokens_that_have_their_characters(tmp_path: Path):
    found = session(tiny("tiny", add_bos=True), tmp_path).measure_text(["in there, then ä", "ää"], ["her", "ä", "no"])
    first, second = found["sentences"]
    assert first["tokens"][:3] == ["in", " the", "re"]
    her, umlaut, absent = found["terms"]
    (place,) = her["occurrences"]
    assert (place["sentence"], place["start"], place["end"]) == (0, 4, 7)
    assert (place["covered"], place["n_tokens"]) == (" there", 2)  # " the" and "re" have its characters, and more
    assert place["logprob"] == pytest.approx(sum(first["logprobs"][1:3]), rel=1e-12)
    assert place["mean_rank"] == sum(first["ranks"][1:3]) / 2
    assert [one["n_tokens"] for one in umlaut["occurrences"]] == [2, 2, 2]
    expected = [sum(first["logprobs"][-2:]), sum(second["logprobs"][:2]), sum(second["logprobs"][2:])]
    assert [one["logprob"] for one in umlaut["occurrences"]] == pytest.approx(expected, rel=1e-12)
    assert umlaut["logprob"] == pytest.approx(sum(expected) / 3, rel=1e-12)
    assert absent == {
        "term": "no",
        "n_occurrences": 0,
        "n_measured": 0,
        "n_tokens": None,
        "logprob": None,
        "mean_rank": None,
        "occurrences": [],
        "features": [],
    }


def test_a_term_that_begins_a_text_is_not_scored_where_nothing_comes_before(tmp_path: Path):
    (term,) = session(tiny("tiny"), tmp_path).measure_text(["the end, the end"], ["the"])["terms"]
    assert [one["logprob"] is None for one in term["occurrences"]] == [True, False]
    assert "nothing that could come before" in term["occurrences"][0]["note"]
    assert (term["n_occurrences"], term["n_measured"]) == (2, 1)
    assert term["logprob"] == term["occurrences"][1]["logprob"]


def test_what_the_tokens_do_not_stand_for_has_no_number_and_says_why(tmp_path: Path):
    model = unigram("lower", byte_tokenizer(bos=True, lowercase=True), [1.0] * 257)
    found = session(model, tmp_path).measure_text(["ab", "Ab"], ["b"])
    good, bad = found["sentences"]
    assert good["bits_per_byte"] == pytest.approx(math.log2(257), rel=1e-6)
    assert (bad["bits"], bad["bits_per_byte"], bad["logprobs"]) == (None, None, [None, None])
    assert "in place of 'Ab'" in bad["note"]
    assert [one["note"] for one in found["terms"][0]["occurrences"]] == [None, bad["note"]]
    assert found["terms"][0]["n_measured"] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_told(value: float):
    logits = torch.zeros(4, 7)
    logits[2, 5] = value
    with pytest.raises(NotFinite, match="at token 2 of a text of 4 tokens"):
        token_scores(logits, [0, 1, 2, 3])


def test_pieces_of_the_positions_change_nothing(monkeypatch: pytest.MonkeyPatch):
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    ids = [3, 1, 4, 1, 5, 2, 6, 0, 3]
    whole = token_scores(logits, ids)
    monkeypatch.setattr("attribution.compare.measure._MOST_NUMBERS", 14)
    assert token_scores(logits, ids) == whole


def test_a_text_whose_logits_do_not_fit_is_refused_before_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = session(tiny("tiny"), tmp_path)
    monkeypatch.setattr(here.model.dimensions.__class__, "d_vocab", 10**15, raising=False)
    object.__setattr__(here.model.dimensions, "d_vocab", 10**15)
    with pytest.raises(CannotFit, match="give shorter sentences"):
        here.measure_text(["the end"])


def test_batches_hold_so_many_logits_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = session(tiny("tiny"), tmp_path)
    whole = here.measure_text(SENTENCES)
    monkeypatch.setattr("attribution.compare.measure._MOST_LOGITS", VOCAB)  # one token: each text by itself
    alone = here.measure_text(SENTENCES)
    for one, other in zip(whole["sentences"], alone["sentences"], strict=True):
        assert one["logprobs"][1:] == pytest.approx(other["logprobs"][1:], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words", "param"),
    [
        ({"sentences": []}, "sentences is empty", "sentences"),
        ({"sentences": ["a", ""]}, "sentences.1 is empty", "sentences.1"),
        ({"sentences": ["a\ud800"]}, "its character 1 is half of a pair", "sentences.0"),
        ({"domain_terms": [""]}, "domain_terms.0 is empty", "domain_terms.0"),
        ({"domain_terms": ["a", "b", "a"]}, "names 'a' twice", "domain_terms"),
        ({"top_features": 1001}, "top_features is 1001", "top_features"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: dict[str, Any], words: str, param: str, tmp_path: Path):
    given: dict[str, Any] = {"sentences": ["a"]} | arguments
    with pytest.raises(InvalidArgument, match=words) as refused:
        session(tiny("tiny"), tmp_path).measure_text(**given)
    assert refused.value.param == param


def test_a_model_without_points_is_measured_too(tmp_path: Path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20
    )
    model = trace_model("neox", GPTNeoXForCausalLM(config), tiny_tokenizer(add_bos=True))
    assert model.family is None
    (row,) = session(model, tmp_path).measure_text(["the end"])["sentences"]
    with torch.no_grad():
        ids = torch.tensor([tiny_tokenizer(add_bos=True).encode("the end")])
        expected = model.module(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])
    assert row["logprobs"] == pytest.approx(expected[:, 0].tolist(), rel=1e-5)
