"""Savepoints over HTTP: what lies on disk when the reply arrives, against a plain transformers model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attribution.plain import POINTS, distance, module_value, watch
from tests.models import FAMILIES, WINDOW
from tests.server.support import (
    HELLO,
    HELLO_TEXT,
    Served,
    encode,
    error_of,
    plain,
    relative,
    serve,
    tokenizer,
)

PROMPT = encode(HELLO_TEXT)
TOLERANCE = 3e-5  # float32, of the largest value, against another attention and another order of sums
ROUNDING = 3e-6  # float32, of the norm: a few times what one sum of these random matrices leaves


def _load(file: str) -> Tensor:
    return torch.load(file, weights_only=True, mmap=True)


def _point(name: str, layers: str = "*") -> str:
    return "logits" if name == "logits" else f"{name}[{layers}]"


def _save(*selectors: str, **options: Any) -> list[dict[str, Any]]:
    """Savepoints named a, b, c, … in the order of the selectors."""
    return [{"name": chr(97 + i), "selector": text} | options for i, text in enumerate(selectors)]


def _oracle(family: str, ids: list[int]) -> dict[str, Tensor]:
    """Every point of one sequence, [layer, position, …]; logits without the layer."""
    points = watch(plain(family), ids)
    return {name: value[0] if name == "logits" else value[:, 0] for name, value in points.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_point_is_on_disk_when_the_reply_arrives_and_is_what_the_model_computed(house: Served, family: str):
    names = ["logits", *reversed(POINTS)]  # any order
    savepoints = [{"name": name, "selector": _point(name)} for name in names]
    answer = house.chat(house.names[family], temperature=0, max_tokens=7, ignore_eos=True, savepoints=savepoints)
    message = answer.choices[0].message
    folder = house.runs / message.run_id  # type: ignore[attr-defined]
    assert message.activation_files == {n: str(folder / "0" / f"{n}.pt") for n in names}  # type: ignore[attr-defined]
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "run.json",
        *(f"0/{name}.pt" for name in names),
    }
    fed = PROMPT + house.generated(answer)[:-1]
    expected = _oracle(family, fed)
    meta = answer.activations_meta  # type: ignore[attr-defined]
    assert list(meta) == names
    for name in names:
        value = _load(message.activation_files[name])  # type: ignore[attr-defined]
        wanted = expected[name][len(PROMPT) - 1 :] if name == "logits" else expected[name]
        assert value.shape == wanted.shape, name
        assert value.dtype == torch.float32
        assert distance(value, wanted) < TOLERANCE, name
        assert meta[name] == {
            "file": message.activation_files[name],  # type: ignore[attr-defined]
            "selector": _point(name),
            "shape": list(value.shape),
            "dtype": "float32",
            "positions": [len(PROMPT) - 1 if name == "logits" else 0, len(fed), 1],
            "axis": {"logits": 0, "pattern": 2}.get(name, 1),
            "bytes": value.numel() * 4,
        }


def test_a_file_holds_one_plain_tensor_and_nothing_that_is_shared(house: Served, qwen: str):
    answer = house.chat(qwen, max_tokens=2, savepoints=_save("resid_post[0]"))
    meta = answer.activations_meta["a"]  # type: ignore[attr-defined]
    value = torch.load(meta["file"], weights_only=True)
    assert type(value) is Tensor
    assert value.is_contiguous()
    assert value.untyped_storage().nbytes() == meta["bytes"]
    assert not value.requires_grad


WINDOWS: list[tuple[Any, range]] = [
    (None, range(28)),
    ("all", range(28)),
    ("prompt", range(22)),
    ("generated", range(22, 28)),
    ("last", range(21, 22)),
    ({"start": 2, "stop": 9, "step": 3}, range(2, 9, 3)),
    ({"start": 5}, range(5, 28)),
    ({"stop": 3}, range(3)),
    ({"step": 4}, range(0, 28, 4)),
    ({"start": 20, "stop": 25, "step": 2}, range(20, 25, 2)),
    ({"start": 24, "stop": None, "step": 1}, range(24, 28)),
]


@pytest.mark.parametrize(("window", "kept"), WINDOWS, ids=str)
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_window_keeps_the_positions_that_it_names(house: Served, family: str, window, kept: range):
    assert len(PROMPT) == 22
    selectors = ["resid_post[*]", "pattern[1]", "pattern[0:3:2]", "logits", "k[-1]", "z[1]"]
    answer = house.chat(
        house.names[family],
        temperature=0,
        max_tokens=7,
        ignore_eos=True,
        savepoints=_save(*selectors, positions=window),
    )
    expected = _oracle(family, PROMPT + house.generated(answer)[:-1])
    whole = {
        "a": expected["resid_post"],
        "b": expected["pattern"][1],
        "c": expected["pattern"][[0, 2]],
        "d": expected["logits"],
        "e": expected["k"][2],
        "f": expected["z"][1],
    }
    meta = answer.activations_meta  # type: ignore[attr-defined]
    for name, value in whole.items():
        # `all` of the logits starts where the first token is drawn
        rows = range(21, 28) if name == "d" and window in (None, "all") else kept
        assert meta[name]["positions"] == [rows.start, rows.stop, rows.step]
        index = torch.tensor(list(rows))
        assert distance(_load(meta[name]["file"]), value.index_select(meta[name]["axis"], index)) < TOLERANCE


@pytest.mark.parametrize(
    ("selector", "path", "side", "last_only"),
    [
        ("lm_head.output", "lm_head", "output", True),
        ("lm_head.input", "lm_head", "input", True),
        ("model.embed_tokens.output", "model.embed_tokens", "output", False),
        ("model.norm.output", "model.norm", "output", False),
        ("model.layers[1].output", "model.layers.1", "output", False),
        ("model.layers.1.input", "model.layers.1", "input", False),
        ("model.layers[-1].self_attn.o_proj.input", "model.layers.2.self_attn.o_proj", "input", False),
        ("model.layers[0].self_attn.output", "model.layers.0.self_attn", "output", False),
        ("model.layers[2].mlp.down_proj.input", "model.layers.2.mlp.down_proj", "input", False),
    ],
)
def test_a_module_path_names_one_side_of_a_module(house: Served, qwen: str, selector, path, side, last_only):
    answer = house.chat(qwen, temperature=0, max_tokens=4, ignore_eos=True, savepoints=_save(selector))
    expected = module_value(plain("qwen3"), PROMPT + house.generated(answer)[:-1], path, side)
    value = _load(answer.activations_meta["a"]["file"])  # type: ignore[attr-defined]
    assert distance(value, expected[len(PROMPT) - 1 :] if last_only else expected) < TOLERANCE


@pytest.mark.parametrize(("layers", "kept"), [("*", [0, 1, 2]), ("0:3:2", [0, 2]), ("1:", [1, 2]), ("2:3", [2])])
def test_a_slice_of_layers_is_the_first_axis(house: Served, qwen: str, layers: str, kept: list[int]):
    selectors = (f"model.layers[{layers}].mlp.output", f"mlp_out[{layers}]")
    answer = house.chat(qwen, temperature=0, max_tokens=3, ignore_eos=True, savepoints=_save(*selectors))
    expected = _oracle("qwen3", PROMPT + house.generated(answer)[:-1])["mlp_out"][kept]
    for name in ("a", "b"):
        file = answer.activations_meta[name]["file"]  # type: ignore[attr-defined]
        assert distance(_load(file), expected) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_a_savepoint_is_written_in_the_dtype_it_names(house: Served, qwen: str, dtype: str):
    savepoints = [
        *_save("resid_post[1]", "pattern[1]"),
        {"name": "cast", "selector": "resid_post[1]", "dtype": dtype},
        {"name": "cast pattern".replace(" ", "_"), "selector": "pattern[1]", "dtype": dtype},
    ]
    answer = house.chat(qwen, temperature=0, max_tokens=3, savepoints=savepoints)
    meta = answer.activations_meta  # type: ignore[attr-defined]
    for cast, full in (("cast", "a"), ("cast_pattern", "b")):
        assert meta[cast]["dtype"] == dtype
        assert torch.equal(_load(meta[cast]["file"]), _load(meta[full]["file"]).to(getattr(torch, dtype)))
        assert meta[cast]["bytes"] == meta[full]["bytes"] * (8 if dtype == "float64" else 2) // 4


def test_row_k_of_the_logits_is_what_token_k_was_drawn_from(house: Served, qwen: str):
    answer = house.chat(qwen, temperature=0, max_tokens=9, ignore_eos=True, savepoints=_save("logits"))
    value = _load(answer.activations_meta["a"]["file"])  # type: ignore[attr-defined]
    assert value.argmax(-1).tolist() == house.generated(answer)


def test_the_logits_are_raw_whatever_is_drawn_from_them(house: Served, qwen: str):
    answer = house.chat(
        qwen,
        temperature=0.3,
        seed=1,
        logit_bias={"5": 50},
        presence_penalty=2,
        top_k=5,
        max_tokens=6,
        ignore_eos=True,
        savepoints=_save("logits"),
    )
    expected = _oracle("qwen3", PROMPT + house.generated(answer)[:-1])["logits"][len(PROMPT) - 1 :]
    assert distance(_load(answer.activations_meta["a"]["file"]), expected) < TOLERANCE  # type: ignore[attr-defined]


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_n_generated_tokens_mean_prompt_plus_n_minus_one_rows(house: Served, qwen: str, tokens: int):
    savepoints = _save("resid_pre[0]", "logits")
    answer = house.chat(qwen, max_tokens=tokens, ignore_eos=True, savepoints=savepoints)
    meta = answer.activations_meta  # type: ignore[attr-defined]
    assert meta["a"]["shape"] == [len(PROMPT) + tokens - 1, 48]
    assert meta["b"]["shape"] == [tokens, 281]


def test_an_end_or_a_stop_string_ends_the_rows_too(house: Served, qwen: str):
    end = house.chat(qwen, logit_bias={"280": 100}, savepoints=_save("resid_pre[0]", "logits"))
    assert end.activations_meta["a"]["shape"] == [22, 48]  # type: ignore[attr-defined]
    assert end.activations_meta["b"]["shape"] == [1, 281]  # type: ignore[attr-defined]
    stop = house.chat(qwen, logit_bias={"34": 100}, stop="CCC", savepoints=_save("resid_pre[0]", "logits"))
    assert stop.activations_meta["a"]["shape"] == [24, 48]  # type: ignore[attr-defined]
    assert stop.activations_meta["b"]["shape"] == [3, 281]  # type: ignore[attr-defined]


def test_a_window_that_the_answer_did_not_reach_has_no_rows_and_is_in_the_map(house: Served, qwen: str):
    savepoints = _save("resid_post[*]", "pattern[*]", "q[0]", "logits", positions="generated")
    answer = house.chat(qwen, logit_bias={"280": 100}, max_tokens=5, savepoints=savepoints)
    meta = answer.activations_meta  # type: ignore[attr-defined]
    shapes = {name: _load(one["file"]).shape for name, one in meta.items()}
    assert shapes == {"a": (3, 0, 48), "b": (3, 6, 0, 22), "c": (0, 6, 10), "d": (0, 281)}
    assert all(one["positions"][0] == one["positions"][1] for one in meta.values())


def test_every_choice_has_its_own_files(house: Served, qwen: str):
    answer = house.chat(qwen, n=3, seed=1, max_tokens=5, ignore_eos=True, savepoints=_save("resid_post[2]"))
    first = answer.choices[0].message
    for choice in answer.choices:
        message = choice.message
        assert message.run_id == first.run_id  # type: ignore[attr-defined]
        file = house.runs / message.run_id / str(choice.index) / "a.pt"  # type: ignore[attr-defined]
        assert message.activation_files == {"a": str(file)}  # type: ignore[attr-defined]
        assert message.activations_meta["a"]["file"] == str(file)  # type: ignore[attr-defined]
        fed = PROMPT + house.generated(answer, choice.index)[:-1]
        assert distance(_load(str(file)), _oracle("qwen3", fed)["resid_post"][2]) < TOLERANCE
    assert answer.activations_meta == first.activations_meta  # type: ignore[attr-defined]


def test_completions_keep_activations_too_one_choice_per_prompt(house: Served, qwen: str):
    prompts = [encode("the others"), encode("in a")]
    answer = house.openai.completions.create(
        model=qwen,
        prompt=prompts,
        max_tokens=0,
        echo=True,
        logprobs=0,
        extra_body={"savepoints": _save("resid_post[1]", "logits")},
    )
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        files = choice.activation_files  # type: ignore[attr-defined]
        expected = _oracle("qwen3", prompt)
        assert distance(_load(files["a"]), expected["resid_post"][1]) < TOLERANCE
        assert distance(_load(files["b"]), expected["logits"][-1:]) < TOLERANCE


# What is kept when nothing is named.


def test_store_activations_alone_keeps_the_logits(house: Served, qwen: str):
    for body in ({"store_activations": True}, {"store_activations": True, "savepoints": []}):
        answer = house.chat(qwen, max_tokens=3, ignore_eos=True, **body)
        meta = answer.activations_meta  # type: ignore[attr-defined]
        assert list(meta) == ["logits"]
        assert _load(meta["logits"]["file"]).shape == (3, 281)


@pytest.mark.parametrize("body", [{}, {"store_activations": False}, {"savepoints": []}], ids=str)
def test_nothing_is_written_when_nothing_is_asked_for(house: Served, qwen: str, body):
    before = set(house.runs.iterdir())
    answer = house.chat(qwen, max_tokens=2, **body)
    assert answer.choices[0].message.activation_files == {}  # type: ignore[attr-defined]
    assert answer.activations_meta == {}  # type: ignore[attr-defined]
    assert set(house.runs.iterdir()) == before


def test_savepoints_given_at_load_are_kept_by_default_and_give_way_to_a_requests_own(
    folders: dict[str, Path], tmp_path: Path
):
    model = str(folders["gpt2"])
    at_load = _save("resid_pre[1]", "mlp_out[*]", positions="last")
    with serve(tmp_path, no_model=True) as served:
        body = {"model_id": model, "savepoints": at_load}
        loaded = served.post(body, "/models/load").json()
        assert [point["name"] for point in loaded["savepoints"]] == ["a", "b"]
        for asked in ({}, {"store_activations": True}):
            answer = served.chat(model, max_tokens=2, **asked)
            meta = answer.activations_meta  # type: ignore[attr-defined]
            assert {name: one["shape"] for name, one in meta.items()} == {"a": [1, 48], "b": [3, 1, 48]}
        own = served.chat(model, max_tokens=2, savepoints=_save("q[0]"))
        assert [one["selector"] for one in own.activations_meta.values()] == ["q[0]"]  # type: ignore[attr-defined]
        off = served.chat(model, max_tokens=2, store_activations=False)
        assert off.activations_meta == {}  # type: ignore[attr-defined]


def test_run_json_says_what_the_tensors_hold(house: Served, qwen: str):
    messages = [{"role": "user", "content": "Grüße"}]
    savepoints = [{"name": "x", "selector": "resid_post[1]", "positions": {"start": 2, "stop": 6, "step": 2}}]
    answer = house.chat(
        qwen, messages, n=2, seed=7, max_tokens=3, ignore_eos=True, metadata={"a": "b"}, savepoints=savepoints
    )
    record = house.run(answer)
    run_id = answer.choices[0].message.run_id  # type: ignore[attr-defined]
    prompt = encode("<|im_start|>user\nGrüße<|im_end|>\n<|im_start|>assistant\n")
    assert record["run_id"] == run_id
    assert record["session_id"] == run_id[:8]
    assert record["created"] == answer.created
    assert (record["model"], record["source"], record["revision"]) == (qwen, qwen, None)
    assert (record["model_type"], record["dtype"]) == ("qwen3", "float32")
    assert record["attn_implementation"] == "sdpa_grouped"
    assert record["seed"] == 7
    assert set(record["versions"]) == {"sightline", "nnsight", "transformers", "torch", "tokenizers"}
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["chat_template_sha256"]) == 64
    assert record["request"] == {
        "model": qwen,
        "messages": messages,
        "n": 2,
        "seed": 7,
        "max_tokens": 3,
        "ignore_eos": True,
        "metadata": {"a": "b"},
        "savepoints": savepoints,
    }
    for index, choice in enumerate(record["choices"]):
        assert choice["index"] == index
        assert choice["token_ids"][: choice["prompt_tokens"]] == prompt
        assert choice["prompt_tokens"] == len(prompt)
        assert choice["completion_tokens"] == 3
        assert choice["finish_reason"] == "length"
        assert choice["text"] == answer.choices[index].message.content
        assert choice["tokens"] == [tokenizer().decode([token]) for token in choice["token_ids"]]
        assert choice["largest_batch"] == 2
        assert choice["activations"] == answer.choices[index].message.activations_meta  # type: ignore[attr-defined]


# What is refused, before anything is generated.


@pytest.mark.parametrize(
    ("selector", "said"),
    [
        ("resid_post[3]", "0 to 2"),
        ("resid_post[-4]", "0 to 2"),
        ("resid_post[3:]", "0 to 2"),
        ("resid_post", "resid_post[3]"),
        ("resid_post[1", "resid_post"),
        ("resid_post[a]", "integer"),
        ("resid_post[0:3:0]", "step"),
        ("logits[0]", "no index"),
        ("resid[0]", "resid_post"),
        ("lm_head", ".output"),
        ("lm_head.weight", ".output"),
        ("model.layers[0].nothing.output", "self_attn"),
        ("model.layers[9].output", "0 to 2"),
        ("model.embed_tokens[0].output", "not a list"),
        ("model.layers[*].self_attn[*].output", "several"),
        ("__class__.output", "__class__"),
        ("model.layers[0].output; import os", "expected"),
        ("model.layers[__import__('os')].output", "integer"),
        ("", "1 to 300"),
        ("x" * 301 + ".output", "1 to 300"),
        ("model.output", "no tensor"),
    ],
)
def test_a_selector_that_names_nothing_is_refused_with_what_there_is(
    house: Served, qwen: str, selector: str, said: str
):
    before = set(house.runs.iterdir())
    answer = house.post({"model": qwen, "messages": HELLO, "savepoints": _save("logits", selector)})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "bad_selector")
    assert said in error["message"], error["message"]
    assert set(house.runs.iterdir()) == before


@pytest.mark.parametrize(
    "positions",
    [
        "first",
        5,
        [],
        {},
        {"from": 1},
        {"start": -1},
        {"start": 3, "stop": 3},
        {"start": 5, "stop": 3},
        {"step": 0},
        {"stop": "x"},
        {"start": True},
        {"start": 1.5},
        {"stop": 27},  # 22 + 5 − 1 positions
        {"start": 26},
        {"start": 26, "stop": 99},
    ],
    ids=str,
)
def test_a_window_that_no_token_falls_in_is_refused(house: Served, qwen: str, positions):
    body = {"model": qwen, "messages": HELLO, "max_tokens": 5}
    answer = house.post(body | {"savepoints": _save("resid_post[0]", positions=positions)})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "bad_positions"), error_of(answer)


def test_generated_positions_of_one_token_are_refused_as_it_is_never_fed(house: Served, qwen: str):
    body = {"model": qwen, "messages": HELLO, "max_tokens": 1}
    answer = house.post(body | {"savepoints": _save("logits", positions="generated")})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "bad_positions")
    assert "never fed" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/x", ".hidden", "a\x00b", "a b", "ä", "x" * 101, "a\\b", "a\n", "%2e"]
)
def test_a_name_that_is_no_file_name_is_refused(house: Served, qwen: str, name: str):
    savepoints = [{"name": name, "selector": "logits"}]
    answer = house.post({"model": qwen, "messages": HELLO, "savepoints": savepoints})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", "savepoints")
    assert repr(name)[1:10] in error["message"]


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "-", "0", "run.json", "x" * 100, "a..b"])
def test_a_name_that_is_a_file_name_is_taken(house: Served, qwen: str, name: str):
    answer = house.chat(qwen, max_tokens=1, savepoints=[{"name": name, "selector": "logits"}])
    file = Path(answer.choices[0].message.activation_files[name])  # type: ignore[attr-defined]
    assert file.name == f"{name}.pt"
    assert file.parent.parent.parent == house.runs
    assert file.is_file()


@pytest.mark.parametrize(
    ("savepoints", "said"),
    [
        ([{"name": "a", "selector": "logits"}, {"name": "a", "selector": "q[0]"}], "'a'"),
        ([{"name": "a", "selector": "logits", "dtype": "int8"}], "int8"),
        ([{"name": "a", "selector": "logits", "dtype": "Tensor"}], "Tensor"),
        ([{"name": "a"}], "selector"),
        ([{"selector": "logits"}], "name"),
        ([{"name": "a", "selector": "logits", "layer": 1}], "layer"),
        ([{"name": "a", "selector": 5}], "5"),
        (_save(*["logits"] * 65), "64"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_savepoints_that_do_not_fit_together_are_refused(house: Served, qwen: str, savepoints, said: str):
    answer = house.post({"model": qwen, "messages": HELLO, "savepoints": savepoints})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "invalid_request")
    assert error["param"].startswith("savepoints")
    assert said in error["message"]


# In company.

SETS = [
    _save("logits"),
    _save("resid_post[*]", "q[1]"),
    [],
    _save("pattern[*]"),
    _save("z[0:3:2]", "mlp_out[1]", positions="generated"),
    _save("lm_head.output", "resid_pre[0]", positions="prompt"),
    _save("lm_head.input", "v[2]", positions={"start": 1, "step": 3}),
    _save("attn_out[*]", "resid_mid[*]", "k[*]", "pattern[0]", positions="last"),
]
WORDS = ["a", "the other one", "in an answer " * 4, "re", "x y z", "who? " * 9, "", "no"]


def _ask(served: Served, model: str, index: int):
    messages = [{"role": "user", "content": WORDS[index]}]
    return served.chat(model, messages, temperature=0, max_tokens=4 + index, ignore_eos=True, savepoints=SETS[index])


def _same(one: Any, other: Any) -> None:
    first, second = one.activations_meta, other.activations_meta
    assert set(first) == set(second)
    for name in first:
        assert {k: v for k, v in first[name].items() if k != "file"} == {
            k: v for k, v in second[name].items() if k != "file"
        }
        assert relative(_load(first[name]["file"]), _load(second[name]["file"])) < ROUNDING, name


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
def test_eight_requests_at_once_each_get_their_own_savepoints_as_if_alone(house: Served, family: str):
    model = house.names[family]
    alone = [_ask(house, model, index) for index in range(8)]
    batch = house.together(model, [lambda i=i: _ask(house, model, i) for i in range(8)])
    for index in range(8):
        assert list(batch[index].activations_meta) == [point["name"] for point in SETS[index]]
        assert batch[index].choices[0].message.content == alone[index].choices[0].message.content
        _same(batch[index], alone[index])
    assert max(house.run(batch[i])["choices"][0]["largest_batch"] for i in (0, 1, 7)) >= 5


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_reference_path_gives_the_same_tensors(
    house: Served, folders: dict[str, Path], tmp_path: Path, family: str
):
    model = house.names[family]
    with serve(tmp_path, model=model, max_batch=1) as reference:
        answers = reference.together(model, [lambda i=i: _ask(reference, model, i) for i in range(8)])
        for index in range(8):
            expected = _ask(house, model, index)
            assert answers[index].choices[0].message.content == expected.choices[0].message.content
            _same(answers[index], expected)
            if SETS[index]:
                assert reference.run(answers[index])["choices"][0]["largest_batch"] == 1
        scored = {"model": model, "prompt": "the others", "max_tokens": 0, "echo": True, "logprobs": 1}
        path = "/v1/completions"
        first, second = (s.post(scored, path).json()["choices"][0]["logprobs"] for s in (reference, house))
        assert first["tokens"] == second["tokens"]
        assert first["token_logprobs"][1:] == pytest.approx(second["token_logprobs"][1:], abs=1e-4)


# Bounds in memory.


@pytest.fixture(scope="module")
def small(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """A server that keeps at most 20,000 bytes of a request: 104 rows of 48 float32."""
    model = str(folders["qwen3"])
    with serve(tmp_path_factory.mktemp("small"), model=model, max_capture_bytes=20_000) as served:
        yield served, model


def test_a_capture_that_its_prompt_alone_exceeds_is_refused_with_the_numbers(small):
    served, model = small
    body = {"model": model, "messages": HELLO, "max_tokens": 1}
    answer = served.post(body | {"savepoints": _save("resid_post[*]", "resid_pre[*]")})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (400, "capture_too_large", "savepoints")
    assert f"{2 * 3 * 22 * 48 * 4:,}" in error["message"]
    assert "20,000" in error["message"]


def test_the_choices_of_a_request_share_what_it_may_keep(small):
    served, model = small
    body = {"model": model, "messages": HELLO, "max_tokens": 1, "savepoints": _save("resid_post[*]")}
    assert served.post(body).status_code == 200  # 22 × 3 × 48 × 4 = 12,672 bytes
    answer = served.post(body | {"n": 2})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "capture_too_large")


@pytest.mark.parametrize("selector", ["resid_post[*]", "pattern[0]"])
def test_a_capture_that_grows_too_large_ends_the_request_alone_and_leaves_nothing(small, selector: str):
    served, model = small
    before = set(served.runs.iterdir()) if served.runs.exists() else set()
    grown = {"model": model, "messages": HELLO, "max_tokens": 60, "ignore_eos": True}
    quiet = grown | {"temperature": 0, "max_tokens": 40}
    answers = served.together(
        model,
        [lambda: served.post(grown | {"savepoints": _save(selector)}), lambda: served.post(quiet)],
    )
    error = error_of(answers[0])
    assert (answers[0].status_code, error["code"]) == (400, "capture_too_large")
    assert "--max-capture-bytes" in error["message"]
    assert answers[1].json()["usage"]["completion_tokens"] == 40
    assert (set(served.runs.iterdir()) if served.runs.exists() else set()) == before


def test_a_capture_that_grows_too_large_in_a_stream_is_an_error_event(small):
    served, model = small
    body = {"model": model, "messages": HELLO, "max_tokens": 60, "ignore_eos": True, "stream": True}
    events = served.post(body | {"savepoints": _save("resid_post[*]")}).text.split("\n\n")[:-1]
    last = json.loads(events[-1].removeprefix("data: "))
    assert last["error"]["code"] == "capture_too_large"
    assert 2 < len(events) < 60
    assert not any('"finish_reason":"' in event for event in events)


def test_windows_make_room(small):
    served, model = small
    wide = {"name": "z", "selector": "resid_pre[*]", "positions": {"start": 1, "step": 20}}
    savepoints = [*_save("resid_post[*]", positions="last"), wide]
    body = {"model": model, "messages": HELLO, "max_tokens": WINDOW - 22, "logit_bias": {"280": 100}}
    assert served.post(body | {"savepoints": savepoints}).status_code == 200
