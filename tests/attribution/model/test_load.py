"""Loading: what is read off a checkpoint, what is refused in one line, what families without points get."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from attribution.errors import BadSelector, InvalidRequest, ModelLoadFailed
from attribution.model.capture import forward
from attribution.model.load import LoadSpec, load, trace_model
from attribution.model.probe import probe_batch
from attribution.model.resolve import resolve
from tests.attribution.plain import distance, greedy, module_value, prompts_of
from tests.attribution.running import Watcher, reference
from tests.models import (
    CHAT_TEMPLATE,
    D_MLP,
    D_MODEL,
    FAMILIES,
    VOCAB,
    randomised,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_loads_with_the_weights_of_its_checkpoint_and_proved_points(family: str, tmp_path: Path) -> None:
    model = load(LoadSpec(str(save_tiny(family, tmp_path))))
    assert (model.id, model.source, model.note) == (str(tmp_path), str(tmp_path), None)
    assert model.model_type == family
    assert model.family is not None
    assert model.load_seconds > 0
    plain = tiny_model(family)
    assert model.memory_bytes == sum(t.numel() * 4 for t in plain.parameters()) + sum(
        t.numel() * t.element_size() for t in plain.buffers()
    )
    ids = probe_batch(model, 1).ids
    logits, _ = forward(model, probe_batch(model, 1), [])
    assert distance(logits, plain(ids).logits[:, -3:].detach()) < 1e-5


@pytest.mark.parametrize(
    ("family", "n_kv_heads", "d_head"),
    [("qwen2", 2, 8), ("qwen3", 2, 10), ("llama", 2, 10), ("gemma2", 2, 10), ("gpt2", 6, 8)],
)
def test_the_sizes_are_those_of_the_config(family: str, n_kv_heads: int, d_head: int, tmp_path: Path) -> None:
    sizes = load(LoadSpec(str(save_tiny(family, tmp_path)))).dimensions
    assert (sizes.n_layers, sizes.n_heads, sizes.n_kv_heads, sizes.d_head) == (3, 6, n_kv_heads, d_head)
    assert (sizes.d_model, sizes.d_vocab, sizes.window) == (48, VOCAB, 256)


def test_parameters_need_no_gradient_and_dropout_is_off(tmp_path: Path) -> None:
    model = load(LoadSpec(str(save_tiny("gpt2", tmp_path))))
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert not model.module.training


def test_dtype_auto_is_the_checkpoints_own(tmp_path: Path) -> None:
    folder = save_tiny("qwen3", tmp_path)
    tiny_model("qwen3").bfloat16().save_pretrained(folder)
    assert load(LoadSpec(str(folder))).dtype == torch.bfloat16
    assert load(LoadSpec(str(folder), dtype="float32")).dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_points_are_proved_in_every_dtype(family: str, dtype: str, tmp_path: Path) -> None:
    model = load(LoadSpec(str(save_tiny(family, tmp_path)), dtype=dtype))
    assert model.note is None
    assert model.dtype == getattr(torch, dtype)
    assert {resolve(model, name).dtype for name in ("resid_post[*]", "z[0]", "pattern[1]", "logits")} == {
        getattr(torch, dtype)
    }


def test_an_unknown_dtype_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match=r"dtype is one of auto, float32, .* found 'int3'") as refused:
        load(LoadSpec("anything", dtype="int3"))
    assert refused.value.param == "dtype"


def test_the_attention_asked_for_is_the_one_that_runs(tmp_path: Path) -> None:
    folder = str(save_tiny("qwen2", tmp_path))
    assert load(LoadSpec(folder, attn_implementation="sdpa")).attn_implementation == "sdpa"
    eager = load(LoadSpec(folder, attn_implementation="eager"))
    assert eager.attn_implementation == "eager"
    assert eager.note is None


@pytest.mark.parametrize(
    ("in_generation_config", "in_config", "ends"),
    [
        (None, None, {280}),
        (5, None, {5, 280}),
        ([5, 6], None, {5, 6, 280}),
        (None, 7, {7, 280}),
        ([5], [7, 8], {5, 7, 8, 280}),
        (280, 280, {280}),
    ],
)
def test_the_end_tokens_are_those_of_both_configs_and_of_the_tokenizer(
    in_generation_config: object, in_config: object, ends: set[int], tmp_path: Path
) -> None:
    folder = save_tiny("qwen2", tmp_path, eos_token_id=in_config)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": in_generation_config}))
    # the tokenizer's is <|im_end|>, its last token
    assert load(LoadSpec(str(folder))).end_token_ids == ends


def test_a_model_without_any_end_token_has_none(tmp_path: Path) -> None:
    folder = save_tiny("qwen2", tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert load(LoadSpec(str(folder))).end_token_ids == frozenset()


def test_the_template_hash_tells_templates_apart(tmp_path: Path) -> None:
    one, other, none = (tiny_tokenizer() for _ in range(3))
    other.chat_template = CHAT_TEMPLATE + " "
    none.chat_template = None
    hashes = [trace_model("m", tiny_model("qwen2"), t).template_hash for t in (one, other, none)]
    assert len({*hashes}) == 3
    assert hashes[2] is None


# what is refused


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def configured(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def short_of_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without("config.json"), "Unrecognized model"),
        (written("config.json", b"{"), "not a valid JSON file"),
        (written("config.json", b"[]"), "TypeError: .*must be a mapping"),
        (configured(model_type="nope"), "model type `nope`"),
        (configured(model_type="t5"), "Unrecognized configuration class"),
        (configured(hidden_size="wide"), "hidden_size"),
        (configured(intermediate_size=D_MLP + 1), "RuntimeError: "),
        (without("model.safetensors"), "no file named model.safetensors"),
        (truncated, "SafetensorError: .*incomplete metadata"),
        (written("model.safetensors", b""), "SafetensorError: "),
        (
            configured(num_hidden_layers=4, layer_types=["full_attention"] * 4),
            r"11 of its weights are missing, model\.layers\.3\.input_layernorm\.weight for one",
        ),
        (short_of_a_weight, r"1 of its weights are missing, model\.layers\.1\.mlp\.up_proj\.weight for one"),
        (without("tokenizer.json", "tokenizer_config.json"), "its tokenizer has no vocabulary"),
        (written("tokenizer.json", b"{"), "line 1 column 2"),
        (written("tokenizer.json", b"{}"), "KeyError: 'added_tokens'"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_folder_is_refused_with_a_reason_in_one_line(
    damage: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    damage(save_tiny("qwen3", tmp_path))
    with pytest.raises(ModelLoadFailed, match=says) as refused:
        load(LoadSpec(str(tmp_path)))
    assert refused.value.message.startswith(f"cannot load '{tmp_path}': ")
    assert "\n" not in refused.value.message
    assert refused.value.param == "model_id"
    assert (refused.value.status, refused.value.code) == (422, "model_load_failed")


@pytest.mark.parametrize(
    "name",
    ["/no/such/folder", "no-such-model", "no/such", "", "a b", "../x", "a\nb", "\0", "x" * 300, "a/b/c"],
)
def test_a_name_of_nothing_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ModelLoadFailed) as refused:
        load(LoadSpec(name))
    assert refused.value.message.startswith(f"cannot load {name!r} ({name!r} is not a folder here either): ")
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attn_implementation": "nope"}, "attn_implementation"),
        ({"device_map": "nope"}, "device_map"),
    ],
)
def test_options_that_cannot_be_had_are_refused(options: dict[str, str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=says):
        load(LoadSpec(str(save_tiny("qwen2", tmp_path)), **options))


@pytest.mark.parametrize("device", ["cuda", "cuda:1", {"": "cuda:0"}])
def test_a_gpu_that_is_not_there_is_refused(device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidRequest, match="torch sees none here"):
        load(LoadSpec(str(save_tiny("qwen2", tmp_path)), device_map=device))


def test_a_checkpoints_own_code_does_not_run_unless_it_was_allowed_to(tmp_path: Path) -> None:
    save_tiny("qwen2", tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "modeling_own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        "class OwnConfig(Qwen2Config):\n    model_type = 'own'\n"
        "class Own(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    configured(model_type="own", auto_map=auto_map)(tmp_path)
    with pytest.raises(ModelLoadFailed, match="trust_remote_code"):
        load(LoadSpec(str(tmp_path)))
    assert not ran.exists()


def test_a_checkpoint_of_which_more_is_there_than_is_needed_loads(tmp_path: Path) -> None:
    configured(num_hidden_layers=2, layer_types=["full_attention"] * 2)(save_tiny("qwen3", tmp_path))
    assert load(LoadSpec(str(tmp_path))).dimensions.n_layers == 2


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    folder = save_tiny("qwen3", tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load(LoadSpec(str(folder)))
    assert torch.equal(model.module.lm_head.weight, tiny_model("qwen3", tie_word_embeddings=True).lm_head.weight)


def test_a_model_loads_and_runs_on_a_thread_of_its_own(tmp_path: Path) -> None:
    found: list[object] = []

    def work() -> None:
        model = load(LoadSpec(str(save_tiny("llama", tmp_path))))
        stream = resolve(model, "resid_post[*]").streams[0]
        found.extend([model.note, forward(model, probe_batch(model, 1), [stream])[1][stream].shape])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None, (3, 1, 7, D_MODEL)]


# families without points

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
OTHERS = {
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=D_MLP)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES, intermediate_size=D_MLP)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=D_MLP, word_embed_proj_dim=D_MODEL)),
}
LAYERS = {"gpt_neox": "gpt_neox.layers", "phi": "model.layers", "opt": "model.decoder.layers"}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_family_without_points_is_served_by_module_paths_and_says_so(kind: str) -> None:
    model = trace_model(f"some-{kind}", randomised(OTHERS[kind](), 3), tiny_tokenizer())
    assert model.family is None
    assert model.note == (
        f"its family '{kind}' has no points here; those with points are llama, qwen2, qwen3, gemma2, gpt2"
    )
    with pytest.raises(BadSelector, match=f"some-{kind} has no points .*'{kind}'") as refused:
        resolve(model, "resid_post[0]")
    example = refused.value.message.rpartition("as in '")[2].removesuffix("'")
    assert resolve(model, example).text == example
    # the paths hold what a plain model computes, and it generates what a plain model generates
    plain, (prompt,) = randomised(OTHERS[kind](), 3), prompts_of([7])
    path = f"{LAYERS[kind]}[*].output"
    stream = resolve(model, path).streams[0]
    batch = probe_batch(model, 1)
    _, captured = forward(model, batch, [stream])
    for layer in range(2):
        expected = module_value(plain, batch.ids[0].tolist(), f"{LAYERS[kind]}.{layer}", "output")
        assert distance(captured[stream][layer, 0], expected) < 1e-5
    watcher = Watcher(prompt, 6)
    reference(model, [watcher])
    assert watcher.tokens == greedy(plain, prompt, 6)[0]


def test_a_model_that_is_no_transformer_is_refused_in_one_line(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=D_MODEL, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadFailed, match="num_attention_heads"):
        load(LoadSpec(str(tmp_path)))
