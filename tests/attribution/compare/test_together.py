"""Several models side by side: what is comparable by construction comes out equal, and only the same bytes count."""

import math
from pathlib import Path
from typing import Any

import pytest

from attribution.errors import CannotFit, InvalidArgument, InvalidRequest, ModelLoadFailed, ModelNotFound
from attribution.model.load import LoadSpec, load
from attribution.operations import compare as operations
from attribution.session import LocalSession
from tests.comparing import byte_tokenizer, bytes_of, tiny, unigram
from tests.models import VOCAB, save_tiny, tiny_tokenizer

TEXTS = ["the rest is in a while", "ä 漢 the other", "on"]


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`compare` over models that are in memory already."""

    def run(models: list[Any], *arguments: Any, **options: Any) -> dict[str, Any]:
        there = {model.id: model for model in models}
        monkeypatch.setattr(operations, "load", lambda spec: there[spec.model_id])
        monkeypatch.setattr(operations, "check_fits", lambda spec: None)
        monkeypatch.setattr("attribution.compare.plan.check_known", lambda names: None)
        return LocalSession(store=tmp_path / "store").compare([*there], *arguments, **options)

    return run


def byte_weights() -> dict[int, float]:
    """A probability for each byte: letters and blanks weigh 40, all others 1."""
    weights = {byte: 40 if byte in b"abcdefghijklmnopqrstuvwxyz " else 1 for byte in range(256)}
    return {byte: one / sum(weights.values()) for byte, one in weights.items()}


def weight(text: bytes) -> float:
    return math.prod(byte_weights()[byte] for byte in text)


def bytewise(name: str = "bytes", **options: bool) -> Any:
    """A model that gives each byte its probability; its bos next to none."""
    tokenizer = byte_tokenizer(**options)
    return unigram(name, tokenizer, [*(weight(bytes_of(tokenizer, token)) for token in range(256)), 1e-30])


def merged(name: str = "merged", *, add_bos: bool = False) -> tuple[Any, float]:
    """A model whose tokens, some of several bytes, have the product of their bytes' probabilities over Z; and Z."""
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    products = [weight(bytes_of(tokenizer, token)) for token in range(256 + 21)]
    return unigram(name, tokenizer, [*products, *[1e-30] * (VOCAB - len(products))]), sum(products)


def test_tokenizers_of_one_distribution_over_bytes_have_the_same_bits_but_for_what_merges_cost(compare: Any):
    model, z = merged(add_bos=True)
    found = compare([bytewise(bos=True), model], TEXTS)
    assert z > 1.01
    for row, text in zip(found["sentences"], TEXTS, strict=True):
        size = len(text.encode())
        assert (row["compared_from"], row["compared_bytes"], row["bytes"], row["note"]) == (0, size, size, None)
        bits = -math.log2(weight(text.encode()))
        one, other = row["models"]["bytes"], row["models"]["merged"]
        assert one["bits"] == pytest.approx(bits, rel=1e-6)
        assert one["bits_per_byte"] == pytest.approx(bits / size, rel=1e-6)
        cost = other["own"]["n_tokens"] * math.log2(z)
        assert other["own"]["n_tokens"] < one["own"]["n_tokens"]
        assert other["bits"] == pytest.approx(bits + cost, rel=1e-6)
        assert row["best"] == ["bytes"]
    total = sum(row["models"]["merged"]["bits"] for row in found["sentences"]) / sum(len(t.encode()) for t in TEXTS)
    assert found["models"][1]["bits_per_byte"] == pytest.approx(total, rel=1e-12)
    assert [one["n_sentences"] for one in found["models"]] == [3, 3]


def test_where_one_model_has_nothing_to_begin_with_the_same_bytes_count_for_all(compare: Any):
    model, z = merged()
    found = compare([bytewise(bos=True), model], TEXTS)
    for row, text, tokens in zip(found["sentences"], TEXTS, [1, 2, None], strict=True):
        one, other = row["models"]["bytes"], row["models"]["merged"]
        if tokens is None:  # "on" is one token of the one, and the other is compared with nobody
            assert (row["compared_from"], other["bits"], row["best"]) == (0, None, [])
            continue
        behind = text[1:].encode()  # "t" is a token, and "ä" two
        assert (row["compared_from"], row["compared_bytes"]) == (1, len(behind))
        assert "not every model has something to begin with" in row["note"]
        bits = -math.log2(weight(behind))
        cost = (other["own"]["n_tokens"] - tokens) * math.log2(z)
        assert one["bits"] == pytest.approx(bits, rel=1e-6)
        assert other["bits"] == pytest.approx(bits + cost, rel=1e-6)
        assert one["own"]["scored_bytes"] == len(text.encode())
    assert [one["n_sentences"] for one in found["models"]] == [2, 2]


def test_the_border_is_one_that_all_tokenizers_share(compare: Any):
    # bytes: t|h|e| … ; merged: t|he| |re … Behind "t" both may be cut; in "in a" the merged one has "in" as a token
    found = compare([bytewise(), merged()[0]], ["in a", "the", "inin"])
    assert [row["compared_from"] for row in found["sentences"]] == [2, 1, 2]
    assert [row["compared_bytes"] for row in found["sentences"]] == [2, 2, 2]


def test_a_model_alone_or_equal_ones(compare: Any):
    one = compare([bytewise(bos=True)], ["abc"])["sentences"][0]
    assert (one["best"], one["models"]["bytes"]["bits"] > 0) == ([], True)
    two = compare([bytewise("a", bos=True), bytewise("b", bos=True)], ["abc"])["sentences"][0]
    assert two["best"] == ["a", "b"]


def test_a_sentence_of_which_nothing_is_common_is_compared_by_nobody_and_says_so(compare: Any):
    # behind "in" the one could be scored on "g", behind "i" and "n" the other; "ing" is one token of a third
    found = compare([bytewise(), tiny("starts", add_bos=True), merged()[0]], ["ing", "ab"])
    row, other = found["sentences"]
    assert row["models"]["merged"]["own"]["note"] is not None
    assert [cell["bits"] is None for cell in row["models"].values()] == [True, True, True]
    assert (row["compared_from"], row["compared_bytes"], row["best"]) == (None, 0, [])
    assert "they share no border" in row["note"]
    assert [cell["bits"] is None for cell in other["models"].values()] == [False, False, False]
    assert [one["n_sentences"] for one in found["models"]] == [1, 1, 1]  # only what all have counts in the whole


def test_means_of_a_term_are_over_what_every_model_measured(compare: Any):
    found = compare([bytewise(bos=True), tiny("tiny")], ["the end, the end", "the"], ["the", "end", "absent"])
    the, end, absent = found["terms"]
    assert (the["n_occurrences"], the["n_compared"]) == (3, 1)
    assert [one["compared"] for one in the["occurrences"]] == [False, True, False]
    assert [the["models"][name]["n_measured"] for name in ("bytes", "tiny")] == [3, 1]
    for name in ("bytes", "tiny"):
        own = the["occurrences"][1]["models"][name]
        assert the["models"][name]["logprob"] == own["logprob"]
        assert the["models"][name]["mean_rank"] == own["mean_rank"]
        assert the["models"][name]["n_tokens"] == own["n_tokens"]
    expected = math.log(weight(b"the"))
    assert the["models"]["bytes"]["logprob"] == pytest.approx(expected, rel=1e-6)
    assert (end["n_compared"], absent["n_occurrences"], absent["n_compared"]) == (2, 0, 0)
    assert absent["models"]["bytes"] == {
        "n_measured": 0,
        "n_tokens": None,
        "logprob": None,
        "mean_rank": None,
        "features": [],
    }


def test_a_model_that_reads_another_text_is_left_out_where_it_does(compare: Any):
    lower = bytewise("lower", bos=True, lowercase=True)
    found = compare([bytewise(bos=True), lower], ["ab", "AB"], ["A", "b"])
    first, second = found["sentences"]
    assert first["best"] == ["bytes", "lower"]
    assert second["models"]["lower"]["bits"] is None
    assert "in place of 'AB'" in second["models"]["lower"]["own"]["note"]
    assert second["models"]["bytes"]["bits"] is not None
    upper, b = found["terms"]
    assert (upper["n_compared"], upper["models"]["lower"]["logprob"]) == (1, None)  # it measured none, and is left out
    assert (b["n_occurrences"], b["n_compared"]) == (1, 1)


# --- models that are loaded for it


def test_models_are_loaded_one_after_the_other_and_the_session_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import gc
    import weakref

    one, two = (str(save_tiny("llama", tmp_path / name, seed)) for seed, name in enumerate(("one", "two")))
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []

    def loading(spec: LoadSpec) -> Any:
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        model = load(spec)
        alive.append(weakref.ref(model.module))
        return model

    monkeypatch.setattr(operations, "load", loading)
    session = LocalSession(tiny("own"), store=tmp_path / "store")
    own = session.model
    found = session.compare([one, "own", two], TEXTS, ["the"], show_progress=False)
    gc.collect()
    assert counts == [0, 0]
    assert [ref() for ref in alive] == [None, None]
    assert session.model is own
    assert [row["model_id"] for row in found["models"]] == [one, "own", two]
    assert all(row["error"] is None for row in found["models"])
    alone = LocalSession(one, store=tmp_path / "store").measure_text(TEXTS)
    for row, expected in zip(found["sentences"], alone["sentences"], strict=True):
        assert row["models"][one]["own"]["bits"] == expected["bits"]


def test_a_model_that_fails_is_told_in_its_row_and_the_others_are_compared(tmp_path: Path):
    good, broken = save_tiny("llama", tmp_path / "good"), save_tiny("llama", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    session = LocalSession(store=tmp_path / "store")
    found = session.compare([str(broken), str(good)], TEXTS[:1])
    assert [row["error"] and row["error"]["code"] for row in found["models"]] == ["model_load_failed", None]
    assert "cannot load" in found["models"][0]["error"]["message"]
    assert list(found["sentences"][0]["models"]) == [str(good)]
    with pytest.raises(ModelLoadFailed, match="cannot load"):
        session.compare([str(broken)], TEXTS[:1])


def test_when_all_fail_the_error_names_each(tmp_path: Path):
    one, two = (str(save_tiny("llama", tmp_path / name)) for name in ("one", "two"))
    with pytest.raises(
        InvalidRequest, match=r"no model could be measured: .*one: sentences\.0 has .* tokens"
    ) as refused:
        LocalSession(store=tmp_path / "store").compare([one, two], ["a b c " * 300])
    assert f"{two}: sentences.0 has" in refused.value.message


def test_what_memory_does_not_hold_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = str(save_tiny("llama", tmp_path / "one"))
    monkeypatch.setattr("attribution.model.known.needed_bytes", lambda folder, dtype: 10**18)
    monkeypatch.setattr(operations, "load", None)
    with pytest.raises(CannotFit, match="takes about 1,000,000,000,000,000,000 bytes"):
        LocalSession(store=tmp_path / "store").compare([folder], ["a"])


@pytest.mark.parametrize(
    ("models", "options", "kind", "words"),
    [
        ([], {}, InvalidArgument, "models is empty"),
        (["demo", "demo"], {}, InvalidArgument, "names 'demo' twice"),
        (
            ["gpt2-small", "openai-community/gpt2"],
            {},
            InvalidArgument,
            "'openai-community/gpt2' twice, as 'gpt2-small'",
        ),
        (["demo", "no/such", "/no/folder"], {}, ModelNotFound, "'no/such': .*; '/no/folder': "),
        (["demo", "."], {}, ModelNotFound, "config.json"),
        (["demo"], {"dtype": "float8"}, InvalidRequest, "dtype is one of auto"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_loaded(
    models: list[str],
    options: dict[str, Any],
    kind: type[Exception],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(operations, "load", None)
    with pytest.raises(kind, match=words):
        LocalSession(store=tmp_path / "store").compare(models, ["a"], **options)
