"""sae-lens itself: what it writes we read, what we write it reads, and both compute the same.

They need the extra sae, which `make test-all` installs.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from attribution.errors import InvalidArgument
from attribution.features.places import Place
from attribution.features.reading import read_autoencoder
from attribution.features.writing import write_autoencoder
from tests.attribution.features.plain_autoencoder import D_IN, D_OUT, N_FEATURES, every_autoencoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
]  # sae-lens warns of much, beginning with its import

NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
HOOKS = ("blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.hook_mlp_out")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
EVERY = {
    name: one
    for name, one in every_autoencoder()
    if not ("topk" in name and "transcoder" in name)  # it has none that keep the k largest
}


def configurations() -> Iterator[dict[str, Any]]:
    """Every configuration for inference that sae-lens takes."""
    for architecture, norm, hook in product(("standard", "topk", "jumprelu", "gated"), NORMALISATIONS, HOOKS):
        for subtracts, rescaled in product((False, True), (False, True) if architecture == "topk" else (None,)):
            extra = {} if rescaled is None else {"k": 4, "rescale_acts_by_decoder_norm": rescaled}
            reshape = "hook_z" if hook.endswith("hook_z") else "none"
            yield {
                "architecture": architecture,
                "normalize_activations": norm,
                "apply_b_dec_to_input": subtracts,
                "reshape_activations": reshape,
                "metadata": {"hook_name": hook},
                **extra,
            }
    for architecture, norm in product(TRANSCODERS, NORMALISATIONS):
        metadata = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": HOOKS[2]}
        common = {"architecture": architecture, "normalize_activations": norm, "metadata": metadata}
        yield common | {"apply_b_dec_to_input": False, "d_out": D_OUT}


CONFIGURATIONS = list(configurations())


def randomised(sae: Any) -> Any:
    """Weights that are not the usual zeros."""
    draw = torch.Generator().manual_seed(1)
    for name, weight in sae.named_parameters():
        weight.data = 0.6 * torch.randn(weight.shape, generator=draw, dtype=torch.float64)
        if name == "threshold":
            weight.data.abs_()
    return sae


def build(config: dict[str, Any]) -> Any:
    from sae_lens import SAE

    return randomised(SAE.from_dict(config | {"d_in": D_IN, "d_sae": N_FEATURES, "dtype": "float64"}))


def assert_same(sae: Any, folder: Path, by_heads: bool = False) -> None:
    one = read_autoencoder(folder).autoencoder
    x = 2 * torch.randn(9, D_IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.4
    given = x.view(9, 3, -1) if by_heads else x  # at hook_z sae-lens takes heads apart
    with torch.no_grad():
        torch.testing.assert_close(one.encode(x), sae.encode(given), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(one.reconstruct(x), sae(given).flatten(1), atol=1e-9, rtol=1e-9)
        strongest = sae.encode(given).topk(5, dim=-1).values
    torch.testing.assert_close(one.topk(x, 5)[0], strongest, atol=1e-9, rtol=1e-9)


def test_there_are_at_least_a_hundred_configurations() -> None:
    assert len(CONFIGURATIONS) >= 100


@pytest.mark.parametrize("number", range(len(CONFIGURATIONS)))
def test_what_sae_lens_writes_computes_the_same_here(number: int, tmp_path: Path) -> None:
    config = CONFIGURATIONS[number]
    sae = build(config)
    sae.save_model(tmp_path)
    assert_same(sae, tmp_path, by_heads=config.get("reshape_activations") == "hook_z")


@pytest.mark.parametrize("number", range(0, len(CONFIGURATIONS), 5))
def test_float32_agrees_as_well_as_float32_can(number: int, tmp_path: Path) -> None:
    from sae_lens import SAE

    config = CONFIGURATIONS[number]
    build(config).to(dtype=torch.float32).save_model(tmp_path)
    sae, one = SAE.load_from_disk(str(tmp_path)), read_autoencoder(tmp_path).autoencoder
    x = torch.randn(9, D_IN)
    given = x.view(9, 3, -1) if config.get("reshape_activations") == "hook_z" else x
    with torch.no_grad():
        torch.testing.assert_close(one.encode(x), sae.encode(given), atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(one.reconstruct(x), sae(given).flatten(1), atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize("name", EVERY)
def test_what_we_write_computes_the_same_in_sae_lens(name: str, tmp_path: Path) -> None:
    from sae_lens import SAE

    one, reads = EVERY[name], Place("resid_mid", 1)
    write_autoencoder(tmp_path, one, reads=reads, writes=Place("mlp_out", 1) if "transcoder" in name else None)
    sae = SAE.load_from_disk(str(tmp_path))
    x = torch.randn(9, D_IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if one.centred:  # which sae-lens leaves to the weights of the model
        assert sae.cfg.metadata.model_from_pretrained_kwargs == {"center_writing_weights": True}
    given = x - x.mean(-1, keepdim=True) if one.centred else x
    with torch.no_grad():
        torch.testing.assert_close(one.encode(x), sae.encode(given), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(one.reconstruct(x), sae(given), atol=1e-9, rtol=1e-9)
    assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_mid"


@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale"])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk", "topk", "jumprelu", "gated", "standard"])
def test_what_was_trained_is_read_as_it_is_saved_for_inference(
    architecture: str, rescaled: bool, norm: str, tmp_path: Path
) -> None:
    from sae_lens import SAE, TrainingSAE

    config: dict[str, Any] = {"architecture": architecture, "d_in": D_IN, "d_sae": N_FEATURES, "dtype": "float64"}
    config |= {"normalize_activations": norm, "metadata": {"hook_name": HOOKS[0]}}
    if "topk" in architecture:
        config |= {"k": 4, "rescale_acts_by_decoder_norm": rescaled}
    if architecture.startswith("matryoshka"):
        config["matryoshka_widths"] = [5, N_FEATURES]
    sae = randomised(TrainingSAE.from_dict(config))
    if "batchtopk" in architecture:
        sae.topk_threshold.fill_(0.7)
        sae.save_model(tmp_path / "raw")
        with pytest.raises(InvalidArgument, match="save_inference_model"):
            read_autoencoder(tmp_path / "raw")
    sae.save_inference_model(tmp_path / "inference")
    assert_same(SAE.load_from_disk(str(tmp_path / "inference")), tmp_path / "inference")


@pytest.mark.parametrize("architecture", ["abstopk", "temporal", "matching_pursuit"])
def test_what_sae_lens_has_and_we_do_not_is_refused(architecture: str, tmp_path: Path) -> None:
    sae = build(CONFIGURATIONS[0])
    sae.save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text()) | {"architecture": architecture}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(InvalidArgument, match=f"the architecture '{architecture}' is not done"):
        read_autoencoder(tmp_path)


def test_no_architecture_of_sae_lens_is_forgotten() -> None:
    import sae_lens  # noqa: F401
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    read = {"standard", "topk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk", *TRANSCODERS}
    refused = {"abstopk", "temporal", "matching_pursuit"}
    assert set(SAE_CLASS_REGISTRY) | set(SAE_TRAINING_CLASS_REGISTRY) == read | refused


def test_four_threads_get_what_one_gets_from_sae_lens(tmp_path: Path) -> None:
    sae = build(CONFIGURATIONS[0] | {"normalize_activations": "layer_norm"})
    sae.save_model(tmp_path)
    one = read_autoencoder(tmp_path).autoencoder
    many = [torch.randn(30, D_IN, dtype=torch.float64) for _ in range(200)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: one.decode(one.encode(x), x), many))
    with torch.no_grad():
        for x, y in zip(many, found, strict=True):
            torch.testing.assert_close(y, sae(x), atol=1e-9, rtol=1e-9)
