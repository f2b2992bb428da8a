"""Models come and go: loading, sharing a load, replacing savepoints, unloading."""

import gc
import json
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import server.registry
from attribution.model import hub
from tests.models import randomised, save_tiny, tiny_tokenizer
from tests.server.support import HELLO, LAST_LOGITS, Served, error_of, serve, wait_until


@pytest.fixture
def empty(tmp_path: Path):
    """A server without a model."""
    with serve(tmp_path, no_model=True) as served:
        yield served


def _load(served: Served, model: Path | str, **options: Any) -> Any:
    return served.post({"model_id": str(model)} | options, "/models/load")


def _loaded(served: Served) -> list[str]:
    """What can serve; /health, /v1/models and /models agree on it."""
    health = served.http.get("/health").json()["loaded_models"]
    assert [entry.id for entry in served.openai.models.list()] == health
    assert [entry["model"] for entry in served.http.get("/models").json()["loaded"]] == health
    return health


def _save(*selectors: str) -> list[dict[str, Any]]:
    return [{"name": chr(97 + i), "selector": text} for i, text in enumerate(selectors)]


def test_a_load_says_what_was_loaded(empty: Served, folders: dict[str, Path]):
    answer = _load(empty, folders["llama"], savepoints=_save("q[0]"))
    body = answer.json()
    assert answer.status_code == 200
    assert body["ok"] is True
    assert body["model"] == str(folders["llama"])
    assert (body["n_layers"], body["n_heads"], body["n_kv_heads"], body["hidden_size"]) == (3, 6, 2, 48)
    assert (body["window"], body["dtype"], body["device"]) == (256, "float32", "cpu")
    assert (body["model_type"], body["points"], body["note"]) == ("llama", True, None)
    assert [(one["name"], one["selector"]) for one in body["savepoints"]] == [("a", "q[0]")]
    # 1,664 + 281 × 48 twice … in float32: what the file of weights holds, and buffers
    assert body["memory_bytes"] >= sum(f.stat().st_size for f in folders["llama"].glob("*.safetensors")) * 0.95
    assert 0 < body["load_seconds"] < 60


def test_a_loaded_model_is_listed_in_openais_shape(empty: Served, folders: dict[str, Path]):
    assert _loaded(empty) == []
    _load(empty, folders["llama"])
    assert _loaded(empty) == [str(folders["llama"])]
    card = empty.openai.models.retrieve(str(folders["llama"]))
    assert (card.id, card.object, card.owned_by) == (str(folders["llama"]), "model", "sightline")
    assert abs(card.created - time.time()) < 60
    with pytest.raises(openai.NotFoundError) as caught:
        empty.openai.models.retrieve("gpt-4")
    assert caught.value.code == "model_not_found"
    assert str(folders["llama"]) in caught.value.message


def test_what_could_be_loaded_is_listed_too(folders: dict[str, Path], tmp_path: Path):
    with serve(tmp_path, no_model=True, models_dir=folders["llama"].parent) as served:
        rows = {row["id"]: row for row in served.http.get("/models").json()["available"]}
        for family, folder in folders.items():
            row = rows[str(folder)]
            assert (row["model_type"], row["supported"], row["source"]) == (family, True, "folder")
            assert row["memory_bytes"] > 200_000


def test_loading_again_is_no_second_load(empty: Served, folders: dict[str, Path]):
    _load(empty, folders["qwen3"], savepoints=_save("q[0]"))
    before = empty.loaded(str(folders["qwen3"]))
    again = _load(empty, folders["qwen3"])
    assert again.status_code == 200
    assert [one["selector"] for one in again.json()["savepoints"]] == ["q[0]"]
    assert empty.loaded(str(folders["qwen3"])) is before


def test_loading_again_with_other_savepoints_replaces_them(empty: Served, folders: dict[str, Path]):
    model = str(folders["qwen3"])
    _load(empty, model, savepoints=_save("q[0]"))
    before = empty.loaded(model)
    answer = _load(empty, model, savepoints=_save("k[0]", "v[*]"))
    assert [one["selector"] for one in answer.json()["savepoints"]] == ["k[0]", "v[*]"]
    assert empty.loaded(model).model is before.model
    meta = empty.chat(model, max_tokens=1).activations_meta  # type: ignore[attr-defined]
    assert [one["selector"] for one in meta.values()] == ["k[0]", "v[*]"]


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"attn_implementation": "eager"}, {"revision": "x"}, {"device_map": "cpu"}]
)
def test_loading_again_with_other_options_is_refused(empty: Served, folders: dict[str, Path], options):
    _load(empty, folders["qwen3"])
    answer = _load(empty, folders["qwen3"], **options)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (409, "busy", "model_id")
    assert next(iter(options)) in error["message"]
    assert empty.chat(str(folders["qwen3"]), max_tokens=1).usage is not None


class _Loads:
    """Counts what the registry loads, and lets it wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ids: list[str] = []
        self.go_on = threading.Event()
        load = server.registry.load

        def counted(spec: Any) -> Any:
            self.ids.append(spec.model_id)
            self.go_on.wait(30)
            return load(spec)

        monkeypatch.setattr(server.registry, "load", counted)


def test_loads_of_one_model_at_once_wait_for_one_load(
    empty: Served, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    loads = _Loads(monkeypatch)
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(_load, empty, folders["qwen3"]) for _ in range(5)]
        wait_until(lambda: bool(loads.ids))
        assert _loaded(empty) == []  # listed once it can serve
        time.sleep(0.2)
        loads.go_on.set()
        assert {answer.result(60).status_code for answer in answers} == {200}
    assert loads.ids == [str(folders["qwen3"])]


def test_a_load_with_other_options_during_a_load_is_refused(
    empty: Served, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    loads = _Loads(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(_load, empty, folders["qwen3"])
        wait_until(lambda: bool(loads.ids))
        other = pool.submit(_load, empty, folders["qwen3"], dtype="bfloat16")
        time.sleep(0.2)
        loads.go_on.set()
        assert first.result(60).status_code == 200
        assert (other.result(60).status_code, error_of(other.result())["code"]) == (409, "busy")
    assert loads.ids == [str(folders["qwen3"])]


def test_the_loop_answers_while_a_model_loads(empty: Served, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    _load(empty, folders["gpt2"])
    loads = _Loads(monkeypatch)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(_load, empty, folders["qwen3"])
        wait_until(lambda: bool(loads.ids))
        assert empty.chat(str(folders["gpt2"]), max_tokens=3, ignore_eos=True).usage.completion_tokens == 3  # type: ignore[union-attr]
        assert not loading.done()
        loads.go_on.set()
        assert loading.result(60).status_code == 200


@pytest.mark.parametrize(
    ("savepoints", "code"),
    [
        (_save("resid_post["), "bad_selector"),
        (_save("q[0]", "resid_post[3]"), "bad_selector"),
        (_save("model.layers[0].nothing.output"), "bad_selector"),
        ([{"name": "a", "selector": "q[0]", "positions": "first"}], "bad_positions"),
        ([{"name": "../a", "selector": "q[0]"}], "invalid_request"),
        ([{"name": "a", "selector": "q[0]", "dtype": "int3"}], "invalid_request"),
    ],
    ids=str,
)
def test_a_bad_savepoint_at_load_is_refused_and_nothing_is_loaded(
    empty: Served, folders: dict[str, Path], savepoints, code: str
):
    answer = _load(empty, folders["qwen3"], savepoints=savepoints)
    assert (answer.status_code, error_of(answer)["code"]) == (400, code)
    assert _loaded(empty) == []
    assert _load(empty, folders["qwen3"]).status_code == 200


def test_a_bad_savepoint_for_a_loaded_model_changes_nothing(empty: Served, folders: dict[str, Path]):
    _load(empty, folders["qwen3"], savepoints=_save("q[0]"))
    assert _load(empty, folders["qwen3"], savepoints=_save("q[9]")).status_code == 400
    assert [one.selector for one in empty.loaded(str(folders["qwen3"])).savepoints] == ["q[0]"]
    assert empty.chat(str(folders["qwen3"]), max_tokens=1).activations_meta["a"]["selector"] == "q[0]"  # type: ignore[attr-defined]


@pytest.mark.parametrize("good_first", [False, True])
def test_a_bad_savepoint_does_not_take_the_model_from_another_who_loads_it(
    empty: Served, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, good_first: bool
):
    model, loads = str(folders["qwen3"]), _Loads(monkeypatch)
    calls = [_save("q[9]"), _save("q[1]")]
    if good_first:
        calls.reverse()
    with ThreadPoolExecutor(2) as pool:
        answers = []
        for savepoints in calls:
            answers.append(pool.submit(_load, empty, model, savepoints=savepoints))
            wait_until(lambda: bool(loads.ids))
            time.sleep(0.1)
        loads.go_on.set()
        statuses = [answer.result(60).status_code for answer in answers]
    assert statuses == ([200, 400] if good_first else [400, 200])
    assert _loaded(empty) == [model]
    meta = empty.chat(model, max_tokens=1).activations_meta  # type: ignore[attr-defined]
    assert [one["selector"] for one in meta.values()] == ["q[1]"]


def test_an_alias_stands_for_its_model_everywhere(
    empty: Served, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(hub.ALIASES, "little", str(folders["qwen3"]))
    assert _load(empty, "little").json()["model"] == str(folders["qwen3"])
    assert _loaded(empty) == [str(folders["qwen3"])]
    for name in ("little", str(folders["qwen3"])):
        assert empty.chat(name, max_tokens=1).model == str(folders["qwen3"])
        assert empty.openai.models.retrieve(name).id == str(folders["qwen3"])
    assert empty.post({"model_id": "little"}, "/models/unload").status_code == 200
    assert _loaded(empty) == []


def test_the_aliases_are_those_of_the_surface():
    assert hub.ALIASES == {
        "gpt2-small": "openai-community/gpt2",
        "gemma-2-2b": "google/gemma-2-2b",
        "gemma-2-2b-it": "google/gemma-2-2b-it",
        "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    }


# What cannot be loaded.


def _broken(folder: Path, kind: str) -> str:
    """A checkpoint with one thing wrong."""
    if kind == "missing":
        return str(folder / "nowhere")
    if kind == "not on this machine":
        return "nobody/nothing"
    if kind == "no hub id":
        return "a/b/c/d"
    save_tiny("qwen3", folder)
    if kind == "no config":
        (folder / "config.json").unlink()
    if kind == "no weights":
        (folder / "model.safetensors").unlink()
    if kind == "cut weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
    if kind == "config is no JSON":
        (folder / "config.json").write_text("{")
    if kind == "unknown family":
        (folder / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    return str(folder)


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "not on this machine",
        "no hub id",
        "no config",
        "no weights",
        "cut weights",
        "config is no JSON",
        "unknown family",
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_a_422_with_the_reason(empty: Served, tmp_path: Path, kind: str):
    model = _broken(tmp_path / "model", kind)
    answer = _load(empty, model)
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (422, "model_load_failed", "model_id")
    assert model in error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]
    assert _loaded(empty) == []
    if kind in ("no config", "no weights", "cut weights"):
        save_tiny("qwen3", tmp_path / "model")
        assert _load(empty, model).status_code == 200


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"dtype": "float8"}, 400, "invalid_request"),
        ({"attn_implementation": "nonsense"}, 422, "model_load_failed"),
        ({"device_map": "nonsense"}, 422, "model_load_failed"),
        ({"device_map": {"": "nonsense"}}, 422, "model_load_failed"),
        ({"dtype": 5}, 400, "invalid_request"),
        ({"savepoints": "logits"}, 400, "invalid_request"),
        ({"layers": 3}, 400, "invalid_request"),
        ({"trust_remote_code": True}, 400, "invalid_request"),
        ({"model_id": ""}, 400, "invalid_request"),
        ({"model_id": None}, 400, "invalid_request"),
    ],
    ids=str,
)
def test_a_wrong_option_of_a_load_is_refused(empty: Served, folders: dict[str, Path], options, status: int, code: str):
    answer = empty.post({"model_id": str(folders["qwen3"])} | options, "/models/load")
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (status, code)
    assert _loaded(empty) == []


def test_a_load_that_fails_for_a_reason_nobody_thought_of_is_a_500_and_can_be_tried_again(
    empty: Served, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    def fail(_: Any) -> None:
        raise ZeroDivisionError("nobody thought of this")

    with monkeypatch.context() as patch:
        patch.setattr(server.registry, "load", fail)
        answer = _load(empty, folders["qwen3"])
        assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
        assert "nobody thought" not in answer.text
    assert _load(empty, folders["qwen3"]).status_code == 200


def test_the_code_of_a_checkpoint_does_not_run(empty: Served, tmp_path: Path):
    folder, trace = tmp_path / "model", tmp_path / "it-ran"
    tiny_tokenizer().save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    answer = _load(empty, folder)
    assert (answer.status_code, error_of(answer)["code"]) == (422, "model_load_failed")
    assert not trace.exists()


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_checkpoint_is_trusted_as_the_server_was_told_at_its_start(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
):
    seen: list[bool] = []
    load = server.registry.load
    monkeypatch.setattr(server.registry, "load", lambda spec: (seen.append(spec.trust_remote_code), load(spec))[1])
    with serve(tmp_path, model=str(folders["qwen3"]), trust_remote_code=trusted) as served:
        assert _load(served, folders["gpt2"]).status_code == 200
    assert seen == [trusted, trusted]


def test_a_family_without_points_is_served_with_module_paths_and_says_so(empty: Served, tmp_path: Path):
    config = GPTNeoXConfig(
        vocab_size=281,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        intermediate_size=44,
        max_position_embeddings=256,
        eos_token_id=None,
        bos_token_id=None,
    )
    module = randomised(GPTNeoXForCausalLM(config), 0)
    module.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = str(tmp_path / "model")
    body = _load(empty, model).json()
    assert body["points"] is False
    assert "gpt_neox" in body["note"]
    answer = empty.chat(
        model, temperature=0, max_tokens=5, ignore_eos=True, savepoints=_save("gpt_neox.layers[*].output", "logits")
    )
    record = empty.run(answer)["choices"][0]
    with torch.no_grad():
        expected = module(torch.tensor([record["token_ids"][:-1]]), output_hidden_states=True)
    files = answer.choices[0].message.activation_files  # type: ignore[attr-defined]
    found = torch.load(files["a"], weights_only=True)
    assert torch.allclose(found[:2], torch.cat(expected.hidden_states[1:3]), atol=1e-4)
    logits = expected.logits[0, record["prompt_tokens"] - 1 :]
    assert torch.allclose(torch.load(files["b"], weights_only=True), logits, atol=1e-4)
    assert logits.argmax(-1).tolist() == empty.generated(answer)
    refused = empty.post({"model": model, "messages": HELLO, "savepoints": _save("resid_post[0]")})
    assert error_of(refused)["code"] == "bad_selector"
    assert "gpt_neox" in error_of(refused)["message"]


def test_a_model_can_be_loaded_in_another_dtype(empty: Served, folders: dict[str, Path]):
    model = str(folders["qwen3"])
    assert _load(empty, model, dtype="bfloat16").json()["dtype"] == "bfloat16"
    answer = empty.chat(model, max_tokens=2, savepoints=_save("resid_post[0]", "pattern[0]", "logits"))
    for meta in answer.activations_meta.values():  # type: ignore[attr-defined]
        assert meta["dtype"] == "bfloat16"
        assert torch.load(meta["file"], weights_only=True).dtype == torch.bfloat16
    assert empty.run(answer)["dtype"] == "bfloat16"


def test_the_attention_can_be_chosen(empty: Served, folders: dict[str, Path]):
    assert _load(empty, folders["qwen3"], attn_implementation="eager").json()["attn_implementation"] == "eager"


# Unloading.


def _threads() -> int:
    """How many threads own a model."""
    return sum(thread.name.startswith("model-") for thread in threading.enumerate())


def test_an_unloaded_model_is_gone_and_its_memory_is_free(empty: Served, folders: dict[str, Path]):
    model = str(folders["qwen3"])
    before = _threads()
    size = _load(empty, model).json()["memory_bytes"]
    assert _threads() == before + 1
    empty.chat(model, max_tokens=3, savepoints=_save("resid_post[*]"))
    module = weakref.ref(empty.loaded(model).model.module)
    assert module() is not None
    answer = empty.post({"model_id": model}, "/models/unload")
    assert answer.json() == {"ok": True, "model": model, "bytes_freed": size}
    gc.collect()
    assert module() is None
    assert _loaded(empty) == []
    refused = empty.post({"model": model, "messages": HELLO})
    assert (refused.status_code, error_of(refused)["code"]) == (404, "model_not_found")
    assert "none" in error_of(refused)["message"]
    assert _threads() == before
    assert _load(empty, model).status_code == 200
    assert empty.chat(model, max_tokens=1).usage is not None


def test_unloading_what_is_not_loaded_is_not_found(empty: Served):
    answer = empty.post({"model_id": "gpt2"}, "/models/unload")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")


def test_requests_under_way_and_in_the_queue_fail_with_their_reason_when_the_model_goes(empty: Served, tmp_path: Path):
    folder = save_tiny("qwen3", tmp_path / "long", max_position_embeddings=100_000)
    model = str(folder)
    _load(empty, model)
    endless = {"model": model, "messages": HELLO, "max_tokens": 50_000, "ignore_eos": True}
    worker = empty.loaded(model).worker
    with ThreadPoolExecutor(4) as pool:
        under_way = [
            pool.submit(empty.post, endless | {"savepoints": LAST_LOGITS}),
            pool.submit(empty.post, endless | {"stream": True}),
        ]
        metrics = empty.app.state.sightline.metrics
        wait_until(lambda: 'batch_size_bucket{le="2.0"' in metrics.render()[0].decode() and not worker.queue_length)
        waiting = pool.submit(empty.post, endless | {"n": 128})  # more than the batch takes
        wait_until(lambda: worker.queue_length > 100)
        assert empty.post({"model_id": model}, "/models/unload").status_code == 200
        for answer in (under_way[0].result(30), waiting.result(30)):
            assert (answer.status_code, error_of(answer)["code"]) == (503, "shutting_down")
        streamed = under_way[1].result(30).text.split("\n\n")[:-1]
    last = json.loads(streamed[-1].removeprefix("data: "))
    assert last["error"]["code"] == "shutting_down"
    assert model in last["error"]["message"]
    assert not empty.runs.exists() or list(empty.runs.iterdir()) == []


def test_two_models_serve_at_once_each_as_if_alone(empty: Served, folders: dict[str, Path]):
    names = [str(folders["qwen3"]), str(folders["gemma2"])]
    for name in names:
        _load(empty, name)
    savepoints = _save("resid_post[*]", "pattern[1]")

    def ask(name: str, seed: int) -> Any:
        return empty.chat(name, seed=seed, max_tokens=12, ignore_eos=True, savepoints=savepoints)

    alone = {(name, seed): ask(name, seed) for name in names for seed in range(3)}
    with ThreadPoolExecutor(6) as pool:
        both = {key: pool.submit(ask, *key) for key in alone}
    for key, answer in both.items():
        expected, found = alone[key], answer.result()
        assert found.model == key[0]
        assert empty.generated(found) == empty.generated(expected)
        for name in ("a", "b"):
            one, other = (torch.load(a.activations_meta[name]["file"], weights_only=True) for a in (found, expected))
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_unloading_one_model_leaves_the_other(empty: Served, folders: dict[str, Path]):
    for family in ("qwen3", "gpt2"):
        _load(empty, folders[family])
    empty.post({"model_id": str(folders["qwen3"])}, "/models/unload")
    assert _loaded(empty) == [str(folders["gpt2"])]
    assert empty.chat(str(folders["gpt2"]), max_tokens=2).usage is not None


def test_a_server_that_stops_lets_go_of_everything(folders: dict[str, Path], tmp_path: Path):
    before = _threads()
    with serve(tmp_path, model=str(folders["qwen3"])) as served:
        module = weakref.ref(served.loaded(str(folders["qwen3"])).model.module)
        served.chat(str(folders["qwen3"]), max_tokens=1)
    gc.collect()
    assert module() is None
    assert _threads() == before
