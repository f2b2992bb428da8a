"""What a quantised checkpoint says of itself, and what is refused before and after loading."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from attribution.errors import GradientsRefused, InvalidRequest, ModelLoadFailed
from attribution.model import quantised
from attribution.model.load import LoadSpec, load
from attribution.model.quantised import Scheme, Snapshot, check_label, find_scheme, load_options
from tests.gptq import save_gptq
from tests.models import save_tiny

CPU = torch.device("cpu")
PLACE = "model.layers.1.self_attn.k_proj"


@pytest.fixture
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "installed", lambda library: False)


def declare(folder: Path, **fields: Any) -> str:
    """Write a quantization_config into config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    declared = config.get("quantization_config", {}) | fields
    path.write_text(json.dumps(config | {"quantization_config": declared}))
    return str(folder)


def test_an_unknown_quantisation_is_refused_by_name() -> None:
    with pytest.raises(InvalidRequest, match="quantization is one of gptq, nf4, int8, or null; found 'awq'") as refused:
        load(LoadSpec("anything", quantization="awq"))
    assert refused.value.param == "quantization"


@pytest.mark.parametrize("asked", [None, "gptq"])
def test_a_gptq_checkpoint_without_its_library_says_what_to_install(
    asked: str | None, tmp_path: Path, without_libraries: None
) -> None:
    save_gptq(tmp_path)
    with pytest.raises(ModelLoadFailed, match=r"gptq needs the library gptqmodel: pip install 'sightline\[gptq\]'"):
        load(LoadSpec(str(tmp_path), quantization=asked))


@pytest.mark.parametrize("asked", ["nf4", "int8"])
def test_quantising_without_bitsandbytes_says_what_to_install(
    asked: str, tmp_path: Path, without_libraries: None
) -> None:
    with pytest.raises(ModelLoadFailed, match=r"needs the library bitsandbytes: pip install 'sightline\[bnb\]'"):
        load(LoadSpec(str(save_tiny("qwen2", tmp_path)), quantization=asked))


def test_a_dense_checkpoint_is_not_gptq(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="it is not quantised; GPTQ needs calibration") as refused:
        load(LoadSpec(str(save_tiny("qwen2", tmp_path)), quantization="gptq"))
    assert refused.value.param == "quantization"


@pytest.mark.parametrize("asked", ["nf4", "int8"])
def test_a_wish_that_contradicts_the_checkpoint_is_refused(asked: str, tmp_path: Path) -> None:
    save_gptq(tmp_path)
    with pytest.raises(ModelLoadFailed, match=f"quantization is '{asked}', but the checkpoint is 'gptq'"):
        load(LoadSpec(str(tmp_path), quantization=asked))


@pytest.mark.parametrize(
    ("declared", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4"),
        ({"quant_method": "awq"}, "awq"),
        ({"bits": 4}, "unknown"),
    ],
)
def test_a_scheme_has_the_name_that_the_config_gives_it(
    declared: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "installed", lambda library: True)
    source = declare(save_tiny("qwen2", tmp_path), **declared)
    assert find_scheme(source, None) == Scheme(name, declared)


def test_a_dense_checkpoint_has_no_scheme_unless_one_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "installed", lambda library: True)
    source = str(save_tiny("qwen2", tmp_path))
    assert find_scheme(source, None) is None
    assert load_options(None, source, "auto", True) == {}
    nf4, int8 = find_scheme(source, "nf4"), find_scheme(source, "int8")
    assert load_options(int8, source, "auto", True)["quantization_config"].load_in_8bit
    config = load_options(nf4, source, "bfloat16", True)["quantization_config"]
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert load_options(nf4, source, "auto", True)["quantization_config"].bnb_4bit_compute_dtype == torch.float32
    with pytest.raises(ModelLoadFailed, match="nf4 of float32, float16 and bfloat16; name one of them as dtype"):
        load_options(nf4, source, "float64", True)


@pytest.mark.parametrize(
    ("dtype", "on_cpu", "chosen"),
    [("float32", True, True), ("float64", True, True), ("auto", True, False), ("float32", False, False)],
)
def test_float32_on_a_cpu_gets_a_kernel_that_computes_in_float32(
    dtype: str, on_cpu: bool, chosen: bool, tmp_path: Path
) -> None:
    save_gptq(tmp_path)
    declared = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    options = load_options(Scheme("gptq", declared), str(tmp_path), dtype, on_cpu)
    assert bool(options) == chosen
    if chosen:
        assert options["config"].quantization_config == declared | {"backend": "gptq_torch"}


# labels


def labelled(folder: Path, **how: Any) -> tuple[str, Scheme, Snapshot]:
    save_gptq(folder, **how)
    scheme = Scheme("gptq", json.loads((folder / "config.json").read_text())["quantization_config"])
    return str(folder), scheme, Snapshot(str(folder), None)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("stored", "label"), [(1, "gptq"), (2, "gptq_v2")])
def test_a_right_label_passes(bits: int, stored: int, label: str, tmp_path: Path) -> None:
    check_label(*labelled(tmp_path, bits=bits, stored=stored, label=label))


@pytest.mark.parametrize(
    ("bits", "stored", "label", "zeros", "right"),
    [
        (4, 1, "gptq_v2", "0x77777777", "gptq"),
        (4, 2, "gptq", "0x88888888", "gptq_v2"),
        (2, 1, "gptq_v2", "0x55555555", "gptq"),
        (8, 2, "gptq", "0x80808080", "gptq_v2"),
    ],
)
def test_a_wrong_label_is_refused_with_what_to_write_instead(
    bits: int, stored: int, label: str, zeros: str, right: str, tmp_path: Path
) -> None:
    expected = f"calls the format '{label}', but .*qzeros holds the zeros {zeros} of '{right}'.*format to '{right}'"
    with pytest.raises(ModelLoadFailed, match=expected):
        check_label(*labelled(tmp_path, bits=bits, stored=stored, label=label))


def test_of_asymmetric_zeros_no_label_can_be_judged(tmp_path: Path) -> None:
    check_label(*labelled(tmp_path, symmetric=False, label="gptq_v2"))


def test_without_safetensors_files_no_label_can_be_judged(tmp_path: Path) -> None:
    source, scheme, snapshot = labelled(tmp_path, label="gptq_v2")
    (tmp_path / "model.safetensors").unlink()
    check_label(source, scheme, snapshot)


# files


def test_weights_are_read_from_one_file_or_from_shards_with_or_without_the_prefix(tmp_path: Path) -> None:
    dense = save_gptq(tmp_path, act_order=True)
    expected = dense.get_submodule(PLACE).weight
    scheme = Scheme("gptq", {"bits": 4})
    assert torch.equal(Snapshot(str(tmp_path), None).gptq_weight(PLACE, scheme, CPU).float(), expected)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(state):  # without "model.", over two shards
        weight_map[name.removeprefix("model.")] = f"{number % 2}.safetensors"
    for shard in ("0.safetensors", "1.safetensors"):
        part = {
            name: state[f"model.{name}"]
            for name, file in weight_map.items()
            if file == shard and name != "lm_head.weight"
        }
        save_file(part, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(Snapshot(str(tmp_path), None, "model.").gptq_weight(PLACE, scheme, CPU).float(), expected)


@pytest.mark.parametrize("size", [32, -1])
def test_a_checkpoint_without_g_idx_has_groups_in_order(size: int, tmp_path: Path) -> None:
    dense = save_gptq(tmp_path, group=32 if size == 32 else 96)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "g_idx" not in name}, file)
    scheme = Scheme("gptq", {"bits": 4, "group_size": size})
    found = Snapshot(str(tmp_path), None).gptq_weight(PLACE, scheme, CPU)
    assert torch.equal(found.float(), dense.get_submodule(PLACE).weight)


def test_what_is_not_in_the_files_is_refused_by_name(tmp_path: Path) -> None:
    save_gptq(tmp_path)
    with pytest.raises(GradientsRefused, match=r"model\.layers\.9\.mlp has no qweight, qzeros, scales"):
        Snapshot(str(tmp_path), None).gptq_weight("model.layers.9.mlp", Scheme("gptq", {"bits": 4}), CPU)
    with pytest.raises(GradientsRefused, match="its format is 'marlin'"):
        Snapshot(str(tmp_path), None).gptq_weight(PLACE, Scheme("gptq", {"checkpoint_format": "marlin"}), CPU)


def test_files_that_are_not_here_are_a_reason() -> None:
    with pytest.raises(GradientsRefused, match="files of the checkpoint cannot be read"):
        Snapshot("nobody/nothing", None).names()


def test_a_hub_id_is_found_in_the_cache_without_a_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    folder = tmp_path / "models--some--model" / "snapshots" / commit
    folder.mkdir(parents=True)
    dense = save_gptq(folder)
    found = Snapshot("some/model", commit).gptq_weight(PLACE, Scheme("gptq", {"bits": 4}), CPU)
    assert torch.equal(found.float(), dense.get_submodule(PLACE).weight)
