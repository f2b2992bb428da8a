"""Folders of SAELens and eai-sparsify: what they say, what they compute, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from attribution.errors import InvalidArgument, StorageFailed
from attribution.features.autoencoder import Autoencoder
from attribution.features.places import Place
from attribution.features.reading import read_autoencoder, read_sizes
from tests.attribution.features.folders import (
    METADATA,
    saelens_config,
    saelens_tensors,
    sparsify_config,
    sparsify_tensors,
    write_folder,
)
from tests.attribution.features.plain_autoencoder import D_IN, D_OUT, N_FEATURES, by_loops, random_autoencoder

MLP_OUT = "blocks.1.hook_mlp_out"
ROWS = torch.randn(4, D_IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "standard": {},
    "topk": {"activation": "topk"},
    "jumprelu": {"activation": "jumprelu"},
    "gated": {"activation": "gated"},
    "transcoder": {"d_out": D_OUT, "restores": False},
    "skip_transcoder": {"d_out": D_OUT, "restores": False, "skip": True},
    "jumprelu_transcoder": {"d_out": D_OUT, "restores": False, "activation": "jumprelu"},
    "jumprelu_skip_transcoder": {"d_out": D_OUT, "restores": False, "activation": "jumprelu", "skip": True},
    "topk_transcoder": {"d_out": D_OUT, "restores": False, "activation": "topk"},
    "topk_skip_transcoder": {"d_out": D_OUT, "restores": False, "activation": "topk", "skip": True},
}


def assert_computes(found: Autoencoder, expected: Autoencoder) -> None:
    for row in ROWS:
        _, features, written = by_loops(expected, row.tolist())
        assert found.encode(row).tolist() == pytest.approx(features, abs=1e-12)
        assert found.reconstruct(row).tolist() == pytest.approx(written, abs=1e-12)


def config_of(one: Autoencoder, architecture: str, **changes: Any) -> dict[str, Any]:
    sizes = ({"d_out": D_OUT} if "transcoder" in architecture else {}) | ({"k": one.k} if one.k else {})
    return saelens_config(one, architecture, **(sizes | changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_read(architecture: str, tmp_path: Path) -> None:
    one = random_autoencoder(**ARCHITECTURES[architecture])
    found = read_autoencoder(write_folder(tmp_path, config_of(one, architecture), saelens_tensors(one)))
    assert_computes(found.autoencoder, one)
    transcoder = "transcoder" in architecture
    assert (found.architecture, found.is_transcoder) == (architecture, transcoder)
    assert found.reads == Place("resid_post", 1)
    assert found.writes == (None if transcoder else found.reads)
    assert (found.model_name, found.prepend_bos, found.dtype) == ("gpt2-small", True, torch.float64)


@pytest.mark.parametrize(
    ("said", "normalisation"),
    [("none", "none"), (None, "none"), ("layer_norm", "layer_norm"), ("constant_norm_rescale", "constant_norm")],
)
@pytest.mark.parametrize("subtracts", [False, True])
def test_what_is_done_before_and_after_is_read(
    said: str | None, normalisation: Any, subtracts: bool, tmp_path: Path
) -> None:
    one = random_autoencoder(normalisation=normalisation, subtracts_b_dec=subtracts)
    config = saelens_config(one, normalize_activations=said)
    assert_computes(read_autoencoder(write_folder(tmp_path, config, saelens_tensors(one))).autoencoder, one)


def test_without_a_word_b_dec_is_taken_off_of_an_autoencoder_and_not_of_a_transcoder(tmp_path: Path) -> None:
    one, other = random_autoencoder(subtracts_b_dec=True), random_autoencoder(**ARCHITECTURES["transcoder"])
    folder = write_folder(tmp_path / "a", saelens_config(one, apply_b_dec_to_input=None), saelens_tensors(one))
    assert_computes(read_autoencoder(folder).autoencoder, one)
    config = config_of(other, "transcoder", apply_b_dec_to_input=None)
    assert_computes(read_autoencoder(write_folder(tmp_path / "b", config, saelens_tensors(other))).autoencoder, other)


def test_activations_rescaled_by_the_norm_of_their_decoder_are_read(tmp_path: Path) -> None:
    one = random_autoencoder(activation="topk", rescaled=True)
    config = config_of(one, "topk", rescale_acts_by_decoder_norm=True)
    assert_computes(read_autoencoder(write_folder(tmp_path, config, saelens_tensors(one))).autoencoder, one)


def test_a_config_from_before_version_6_is_read(tmp_path: Path) -> None:
    one = random_autoencoder(activation="topk", k=3, subtracts_b_dec=True)
    config = {
        "d_in": one.d_in,
        "d_sae": one.n_features,
        "hook_point": "blocks.2.attn.hook_z",
        "hook_point_layer": 2,
        "hook_point_head_index": None,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 3},
        "model_name": "gpt2-small",
        "normalize_activations": False,
        "prepend_bos": False,
        "finetuning_scaling_factor": False,
    }
    tensors = saelens_tensors(one) | {"scaling_factor": torch.ones(N_FEATURES)}
    found = read_autoencoder(write_folder(tmp_path, config, tensors))
    assert_computes(found.autoencoder, one)
    assert (found.reads, found.prepend_bos, found.hook) == (Place("z", 2), False, "blocks.2.attn.hook_z")


def test_a_model_whose_writes_were_centred_is_read_centred_where_that_matters(tmp_path: Path) -> None:
    one = random_autoencoder(centred=True)
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    folder = write_folder(tmp_path, saelens_config(one, metadata=METADATA | kwargs), saelens_tensors(one))
    assert_computes(read_autoencoder(folder).autoencoder, one)
    at_z = METADATA | kwargs | {"hook_name": "blocks.1.attn.hook_z"}
    assert not read_sizes(write_folder(tmp_path, saelens_config(one, metadata=at_z), saelens_tensors(one))).centred
    flat = {k: v for k, v in saelens_config(one).items() if k != "metadata"} | METADATA | kwargs
    assert read_sizes(write_folder(tmp_path, flat, saelens_tensors(one))).centred


def test_an_old_config_for_gpt2_that_does_not_say_whether_writes_were_centred_is_refused(tmp_path: Path) -> None:
    one = random_autoencoder()
    flat = {k: v for k, v in saelens_config(one).items() if k != "metadata"} | METADATA | {"model_name": "gpt2-small"}
    with pytest.raises(InvalidArgument, match="whether what GPT-2 writes was centred"):
        read_sizes(write_folder(tmp_path, flat, saelens_tensors(one)))
    told = flat | {"model_from_pretrained_kwargs": {"center_writing_weights": False}}
    assert not read_sizes(write_folder(tmp_path, told, saelens_tensors(one))).centred
    at_z = flat | {"hook_name": "blocks.1.attn.hook_z"}
    assert not read_sizes(write_folder(tmp_path, at_z, saelens_tensors(one))).centred


@pytest.mark.parametrize(
    ("names", "reads", "writes"),
    [
        ({"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": MLP_OUT}, "mlp_normalised", "mlp_out"),
        ({"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": MLP_OUT}, "mlp_in", "mlp_out"),
        # the hook of TransformerLens is the stream, what was meant is what the MLP is given
        (
            {
                "hook_name": "blocks.1.hook_resid_mid",
                "hf_hook_name": "model.layers.1.pre_feedforward_layernorm.output",
                "hook_name_out": MLP_OUT,
                "hf_hook_name_out": "model.layers.1.post_feedforward_layernorm.output",
            },
            "mlp_in",
            "mlp_out",
        ),
        ({"hook_name": "custom.thing", "hf_hook_name_out": "model.layers.1.mlp"}, None, "mlp_out"),
    ],
)
def test_a_transcoder_says_where_it_reads_and_writes(
    names: dict[str, str], reads: str | None, writes: str, tmp_path: Path
) -> None:
    one = random_autoencoder(**ARCHITECTURES["transcoder"])
    config = config_of(one, "transcoder", metadata=names)
    sizes = read_sizes(write_folder(tmp_path, config, saelens_tensors(one)))
    assert (sizes.reads, sizes.writes) == (None if reads is None else Place(reads, 1), Place(writes, 1))
    assert sizes.hook == names["hook_name"]
    assert (sizes.n_features, sizes.d_in, sizes.d_out) == (N_FEATURES, D_IN, D_OUT)


def test_sizes_are_read_without_the_weights(tmp_path: Path) -> None:
    one = random_autoencoder(dtype=torch.bfloat16)
    folder = write_folder(tmp_path, saelens_config(one), saelens_tensors(one))
    data = (folder / "sae_weights.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    (folder / "sae_weights.safetensors").write_bytes(data[:header] + b"\xff" * (len(data) - header))  # all NaN
    sizes = read_sizes(folder)
    assert (sizes.n_features, sizes.d_in, sizes.d_out, sizes.dtype) == (N_FEATURES, D_IN, D_IN, torch.bfloat16)
    with pytest.raises(InvalidArgument, match="not finite"):
        read_autoencoder(folder)


def test_weights_of_several_dtypes_are_read_in_the_widest(tmp_path: Path) -> None:
    one = random_autoencoder()
    tensors = saelens_tensors(one) | {"W_enc": one.W_enc.bfloat16(), "b_enc": one.b_enc.half()}
    found = read_autoencoder(write_folder(tmp_path, saelens_config(one), tensors))
    assert found.dtype == found.autoencoder.dtype == found.autoencoder.b_enc.dtype == torch.float64


# --- eai-sparsify


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    ("name", "transcode", "reads", "writes"),
    [
        ("layers.3", False, Place("resid_post", 3), Place("resid_post", 3)),
        ("h.2.attn", False, Place("attn_out", 2), Place("attn_out", 2)),
        ("layers.3.mlp", True, Place("mlp_in", 3), Place("mlp_out", 3)),
        ("h.2.mlp", True, Place("mlp_in", 2), Place("mlp_out", 2)),
        ("embed_tokens", False, None, None),
    ],
)
def test_a_folder_of_sparsify_is_read(
    name: str, transcode: bool, reads: Place | None, writes: Place | None, skip: bool, tmp_path: Path
) -> None:
    one = random_autoencoder(activation="topk", skip=skip, subtracts_b_dec=not transcode)
    config = sparsify_config(one, transcode=transcode)
    found = read_autoencoder(write_folder(tmp_path / name, config, sparsify_tensors(one), "sae"))
    assert_computes(found.autoencoder, one)
    assert (found.reads, found.writes, found.is_transcoder) == (reads, writes, transcode)
    assert (found.origin, found.hook, found.prepend_bos) == ("sparsify", name, None)


def test_sparsify_may_say_its_size_as_a_multiple(tmp_path: Path) -> None:
    one = random_autoencoder(activation="topk", n=3 * D_IN)
    config = sparsify_config(one, num_latents=0, expansion_factor=3)
    assert read_sizes(write_folder(tmp_path / "layers.0", config, sparsify_tensors(one), "sae")).n_features == 18


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "groupmax"},
        {"signed": True},
        {"embed_skip": True},
        {"gram_lookup": True},
        {"k": 0},
        {"k": N_FEATURES + 1},
        {"d_in": "6"},
    ],
)
def test_what_sparsify_does_and_we_do_not_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    one = random_autoencoder(activation="topk")
    folder = write_folder(tmp_path / "layers.0", sparsify_config(one, **changes), sparsify_tensors(one), "sae")
    with pytest.raises(InvalidArgument, match=next(iter(changes))):
        read_sizes(folder)


# --- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "abstopk"}, "the architecture 'abstopk' is not done; standard, topk"),
        ({"architecture": None}, "the architecture None is not done"),
        ({"architecture": "batchtopk"}, "save_inference_model"),
        ({"architecture": "matryoshka_batchtopk"}, "save_inference_model"),
        ({"architecture": 3}, "architecture is 3; expected str"),
        ({"normalize_activations": "expected_average_only_in"}, "sae convert"),
        ({"normalize_activations": True}, "sae convert"),
        ({"normalize_activations": "covariance_whitening"}, "sae convert"),
        ({"normalize_activations": "tanh"}, "none, layer_norm, constant_norm_rescale are done"),
        ({"activation_fn": "tanh-relu"}, "'tanh-relu' is not done"),
        ({"finetuning_scaling_factor": True}, "not folded"),
        ({"reshape_activations": "hook_z"}, "'hook_z' at 'blocks.1.hook_resid_post'"),
        ({"reshape_activations": "other"}, "reshape_activations"),
        ({"d_in": 0}, "d_in is 0; expected a whole number above 0"),
        ({"d_in": True}, "d_in is True"),
        ({"d_in": D_IN + 1}, r"W_dec has the shape \[13, 6\]; its cfg.json says \[13, 7\]|W_enc has the shape"),
        ({"d_sae": None}, "d_sae is None"),
        ({"metadata": 4}, "metadata is 4; expected an object"),
        ({"metadata": {"hook_head_index": 3}}, "one head alone"),
        ({"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}}, "a place that is not known"),
        (
            {"metadata": {"hook_name": "blocks.0.mlp.hook_in", "model_from_pretrained_kwargs": {"fold_ln": True}}},
            r"mlp_in\[0\] of a model with other weights",
        ),
    ],
)
def test_what_a_config_asks_for_and_is_not_done_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    one = random_autoencoder()
    config = {name: value for name, value in (saelens_config(one) | changes).items() if value is not None}
    folder = write_folder(tmp_path, config, saelens_tensors(one))
    for read in (read_sizes, read_autoencoder):
        with pytest.raises(InvalidArgument, match=message) as caught:
            read(folder)
        assert caught.value.param == "folder"


def test_a_transcoder_that_takes_b_dec_off_is_refused(tmp_path: Path) -> None:
    one = random_autoencoder(**ARCHITECTURES["transcoder"])
    config = config_of(one, "transcoder", apply_b_dec_to_input=True)
    with pytest.raises(InvalidArgument, match="no transcoder can do"):
        read_sizes(write_folder(tmp_path, config, saelens_tensors(one)))


@pytest.mark.parametrize("k", [None, 0, 2.5, N_FEATURES + 1])
def test_a_k_that_cannot_be_is_refused(k: Any, tmp_path: Path) -> None:
    one = random_autoencoder(activation="topk")
    config = {name: value for name, value in config_of(one, "topk", k=k).items() if value is not None}
    with pytest.raises(InvalidArgument, match="k is"):
        read_sizes(write_folder(tmp_path, config, saelens_tensors(one)))


def test_missing_and_surplus_tensors_are_refused_by_name(tmp_path: Path) -> None:
    one = random_autoencoder()
    tensors = saelens_tensors(one)
    tensors["log_threshold"] = tensors.pop("b_enc")
    folder = write_folder(tmp_path, saelens_config(one), tensors)
    with pytest.raises(
        InvalidArgument, match="has no b_enc and has log_threshold too; as 'standard' it holds W_dec, W"
    ):
        read_sizes(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_dec", "b_enc"])
def test_weights_that_are_not_finite_are_refused_by_name(name: str, value: float, tmp_path: Path) -> None:
    one = random_autoencoder()
    tensors = saelens_tensors(one)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[3] = value
    with pytest.raises(InvalidArgument, match=f"{name} holds a value that is not finite"):
        read_autoencoder(write_folder(tmp_path, saelens_config(one), tensors))


def test_a_factor_that_is_not_folded_is_refused(tmp_path: Path) -> None:
    one = random_autoencoder()
    tensors = saelens_tensors(one) | {"scaling_factor": torch.full((N_FEATURES,), 1.5)}
    with pytest.raises(InvalidArgument, match="scaling_factor is not 1 everywhere"):
        read_autoencoder(write_folder(tmp_path, saelens_config(one), tensors))


def test_integers_are_no_weights(tmp_path: Path) -> None:
    one = random_autoencoder()
    tensors = saelens_tensors(one) | {"W_enc": torch.ones(D_IN, N_FEATURES, dtype=torch.int8)}
    with pytest.raises(InvalidArgument, match="W_enc is of I8; F64, F32, F16, BF16 are read"):
        read_sizes(write_folder(tmp_path, saelens_config(one), tensors))


@pytest.mark.parametrize(("text", "message"), [("{", "is no JSON"), ("[1]", "holds list; expected an object")])
def test_a_config_that_is_none_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=message):
        read_sizes(write_folder(tmp_path, text, saelens_tensors(random_autoencoder())))


def test_a_folder_without_files_says_which_there_would_be(tmp_path: Path) -> None:
    for none in (tmp_path / "nothing", Path(__file__)):
        with pytest.raises(InvalidArgument, match=r"cfg.json, sae_weights.safetensors\) or of eai-sparsify") as raised:
            read_sizes(none)
        assert raised.value.param == "folder"
    (tmp_path / "unread" / "cfg.json").mkdir(parents=True)
    with pytest.raises(StorageFailed, match=r"cfg\.json cannot be read: Is a directory"):
        read_sizes(tmp_path / "unread")
    folder = write_folder(tmp_path, saelens_config(random_autoencoder()), {})
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(StorageFailed, match=r"sae_weights\.safetensors cannot be read"):
        read_autoencoder(folder)


@pytest.mark.parametrize("size", [0, 5, 300, -20])
def test_a_damaged_file_of_weights_is_refused(size: int, tmp_path: Path) -> None:
    one = random_autoencoder()
    path = write_folder(tmp_path, saelens_config(one), saelens_tensors(one)) / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    for read in (read_sizes, read_autoencoder):
        with pytest.raises(StorageFailed, match="cannot be read"):
            read(tmp_path)


def test_weights_are_mapped_and_outlive_their_file(tmp_path: Path) -> None:
    one = random_autoencoder()
    folder = write_folder(tmp_path, saelens_config(one), saelens_tensors(one))
    found = read_autoencoder(folder).autoencoder
    save_file({"a": torch.zeros(3)}, tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").replace(folder / "sae_weights.safetensors")
    assert_computes(found, one)
