"""`sightline knockout`, in process, on the embedded model and on a cache of tiny ones."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest

from attribution.model import load as loading
from attribution.session import LocalSession
from server.commands.knockout import FETCH, PROMPT
from tests.models import D_MODEL, N_HEADS, N_LAYERS, save_tiny
from tests.server.command_line import cells, refusal, sightline

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own Hugging Face cache, not yet there."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3", tmp_path_factory.mktemp("tiny"))


def put(cache: Path, name: str) -> Path:
    """The snapshot folder of a repository in the cache, empty."""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def put_unsupported(cache: Path) -> None:
    """A model of another family, and one of which there is only the config."""
    (put(cache, "org/half") / "config.json").write_text('{"model_type": "llama"}')
    (put(cache, "org/strange") / "config.json").write_text('{"model_type": "mamba"}')


def facts(text: str) -> dict[str, str]:
    """The lines before the table, by their names."""
    return dict(cells(line)[:2] for line in text.split("\n\n")[0].splitlines())


def test_a_folder_is_run_with_the_default_experiment_and_every_number_is_shown(tiny: Path, tmp_path: Path):
    result = sightline("knockout", tiny)
    assert result.exit_code == 0, result.stderr
    shown = facts(result.stdout)
    model = LocalSession(str(tiny), store=tmp_path / "store")
    expected = model.knockout(PROMPT)
    length = len(expected["token_ids"])
    dims = f"{N_LAYERS} layers, {N_HEADS} heads, hidden size {D_MODEL}, float32 on {model.model.device}"
    assert shown["model"] == f"{tiny}: {dims}"
    assert shown["prompt"] == f"{PROMPT!r} ({length} tokens)"
    assert shown["removed"].startswith(f"layer 1, all {N_HEADS} heads, edge {length - 1} → 0 (")
    assert shown["removed"].endswith(" no longer reads 'T')")
    assert shown["memory"].count("iB") == 2
    assert "loaded in" in shown["time"]
    assert float(shown["KL"].removesuffix(" nats")) == pytest.approx(expected["kl_divergence"], rel=1e-4)
    (difference,) = expected["logit_diff"]
    line = shown[f"logit diff {difference['token']!r}"]
    assert float(line.split()[0]) == pytest.approx(difference["value"], abs=1e-5)
    assert (
        f"(id {difference['token_id']}; the edges {'supported' if difference['value'] > 0 else 'opposed'} it)" in line
    )
    header, *rows = [cells(line) for line in result.stdout.split("\n\n")[1].splitlines()]
    assert header == ["rank", "token", "id", "before", "after", "change"]
    assert len(rows) == 10
    for row, change in zip(rows, expected["top_changed"], strict=True):
        assert row[:3] == [str(change["rank"]), repr(change["token"]), str(change["token_id"])]
        before, after, difference = map(float, row[3:])
        assert (before, after) == pytest.approx((change["baseline_prob"], change["ablated_prob"]), abs=1e-5)
        assert abs(difference) == pytest.approx(change["abs_diff"], rel=1e-2)


def test_what_was_typed_is_what_is_removed_and_written(tiny: Path, tmp_path: Path):
    file = tmp_path / "deep" / "er" / "out.json"
    options = ["--layer", "0", "--edge", "-2,1", "--head", "4", "--head", "2", "--tokens", " the", "--tokens", "id:9"]
    result = sightline("knockout", tiny, "the cat sat", *options, "--top-k", 3, "--output", file)
    assert result.exit_code == 0, result.stderr
    assert f"written to {file}" in result.stdout
    found = json.loads(file.read_text())
    expected = LocalSession(str(tiny), store=tmp_path / "store").knockout(
        "the cat sat", layers=0, heads=[4, 2], edges=[[-2, 1]], tokens=[" the", 9], top_k=3
    )
    assert list(found)[:10] == [
        "model_id",
        "prompt",
        "n_layers",
        "n_heads",
        "hidden_size",
        "target_layer",
        "knockout_edge",
        "kl_divergence",
        "logit_diff",
        "top_changed",
    ]
    assert (found["model_id"], found["prompt"]) == (str(tiny), "the cat sat")
    assert (found["n_layers"], found["n_heads"], found["hidden_size"]) == (N_LAYERS, N_HEADS, D_MODEL)
    assert (found["target_layer"], found["knockout_edge"]) == (0, [len(expected["token_ids"]) - 2, 1])
    assert (found["layers"], found["heads"]) == ([0], [4, 2])
    assert found["kl_divergence"] == pytest.approx(expected["kl_divergence"], rel=1e-3)
    assert (found["logit_diff"]["token"], found["logit_diff"]["token_id"]) == (
        " the",
        expected["logit_diff"][0]["token_id"],
    )
    assert found["logit_diff"]["value"] == pytest.approx(expected["logit_diff"][0]["value"], abs=1e-5)
    assert [one["token_id"] for one in found["logit_diffs"]][1] == 9
    assert [one["token_id"] for one in found["top_changed"]] == [one["token_id"] for one in expected["top_changed"]]
    assert found["rss_after_bytes"] > 10_000_000


def test_several_layers_and_edges_are_shown_as_such(tiny: Path, tmp_path: Path):
    file = tmp_path / "out.json"
    many = ["--layer", "1:", "--edge", "*,1", "--edge", "-1,0"]
    result = sightline("knockout", tiny, "the cat sat", *many, "--output", file)
    length = len(json.loads(file.read_text())["token_ids"])
    assert f"layers 1, 2, all 6 heads, edges * → 1, {length - 1} → 0 (query → key)" in result.stdout
    found = json.loads(file.read_text())
    assert (found["target_layer"], found["knockout_edge"]) == (None, None)
    assert (found["layers"], found["knockout_edges"]) == ([1, 2], [["*", 1], [length - 1, 0]])


@pytest.mark.parametrize(
    ("typed", "layers"), [(["all"], [0, 1, 2]), (["-1"], [2]), (["0", "2:"], [0, 2]), (["2", "1"], [1, 2])]
)
def test_layers_are_typed_in_several_ways(tiny: Path, tmp_path: Path, typed: list[str], layers: list[int]):
    options = [part for one in typed for part in ("--layer", one)]
    result = sightline("knockout", tiny, *options, "--output", tmp_path / "out.json")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "out.json").read_text())["layers"] == layers


def test_the_embedded_model_gets_a_puzzle_whose_answer_it_knows(tmp_path: Path):
    result = sightline("knockout", "demo", "--output", tmp_path / "out.json")
    assert result.exit_code == 0, result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["model_id"] == "demo"
    assert found["prompt"].startswith("Input:\n")
    assert "".join(found["tokens"]).endswith("<|im_start|>assistant\n")
    assert found["top_changed"][0]["baseline_prob"] > 0.9
    assert found["logit_diff"]["token"] == " B"


# --- the cache


def test_every_supported_model_of_the_cache_runs_each_freed_before_the_next(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    save_tiny("llama", put(cache, "org/one"))
    save_tiny("gpt2", put(cache, "org/two"))
    put_unsupported(cache)
    alive: list[weakref.ref[Any]] = []
    real = loading.load

    def load(spec: Any) -> Any:
        assert [one() for one in alive] == [None] * len(alive), "the one before was freed"
        model = real(spec)
        alive.append(weakref.ref(model.module))
        return model

    monkeypatch.setattr(loading, "load", load)
    gc.disable()  # the command frees by itself
    try:
        result = sightline("knockout", "--top-k", 1)
    finally:
        gc.enable()
    assert result.exit_code == 0, result.stderr
    assert "org/strange is skipped: its family 'mamba' is not supported" in result.stdout
    assert "org/half is skipped: its weights are not here" in result.stdout
    models = [line for line in result.stdout.splitlines() if line.startswith("model ")]
    assert [cells(line)[1].split(":")[0] for line in models] == ["org/one", "org/two"]
    assert len(alive) == 2


def test_a_model_that_fails_does_not_keep_the_others_from_running(cache: Path):
    save_tiny("llama", put(cache, "org/one"))
    broken = save_tiny("llama", put(cache, "org/broken"))
    (broken / "tokenizer.json").unlink()
    result = sightline("knockout")
    assert result.exit_code == 1
    first, last = result.stderr.splitlines()
    assert first.startswith("org/broken failed: cannot load")
    assert last == "sightline: 1 of 2 models failed: org/broken"
    assert "org/one: 3 layers" in result.stdout


def test_without_a_model_output_is_ignored_and_why_is_said(cache: Path, tmp_path: Path):
    save_tiny("llama", put(cache, "org/one"))
    result = sightline("knockout", "--output", tmp_path / "deep" / "out.json")
    assert result.exit_code == 0
    assert "is ignored: it holds the result of one model, and no MODEL is named" in result.stderr
    assert not (tmp_path / "deep").exists()


def test_an_empty_cache_is_said_plainly_with_the_command_that_fetches_a_model(cache: Path):
    line = refusal(sightline("knockout"), 2)
    assert (
        line == f"sightline: no model is in the Hugging Face cache; '{FETCH}' fetches one, 'demo' is the embedded one"
    )


def test_a_cache_of_unsupported_models_names_them(cache: Path):
    put_unsupported(cache)
    result = sightline("knockout")
    assert result.exit_code == 2
    assert "org/strange is skipped" in result.stdout
    assert FETCH in result.stderr


# --- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--edge", "1"], "--edge is Q,K as -1,0 or '*,2' or 5:,0:3; found '1'"),
        (["--edge", "a,0"], "found 'a,0'"),
        (["--edge", "99,0"], "the query of the edge [99, 0] is 99; allowed are 0 to"),
        (["--edge", "2,*"], "query 2 would have no key left"),
        (["--layer", "most"], "--layer: a number, a range as '3:7'"),
        (["--layer", "3"], "a layer is 3; allowed are 0 to 2"),
        (["--head", "6"], "heads is 6; the heads of"),
        (["--head", "x"], "'--head'"),
        (["--tokens", "id:x"], "id: is followed by a token id; found 'id:x'"),
        (["--tokens", "two words"], "the text 'two words' is"),
        (["--top-k", "0"], "'--top-k'"),
        (["--output", "."], "'.' is a folder"),
        (["--dtype", "int3"], "dtype is one of"),
    ],
)
def test_what_was_typed_wrong_is_one_line_and_exit_code_2(tiny: Path, options: list[str], words: str):
    assert words in refusal(sightline("knockout", tiny, *options), 2)


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path):
    assert "cannot load" in refusal(sightline("knockout", tmp_path / "nowhere"), 1)
