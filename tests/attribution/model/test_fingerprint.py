"""The fingerprint of a model: the same for the same weights, another for others."""

import pytest
import torch

from attribution.model.fingerprint import fingerprint
from tests.models import FAMILIES, tiny_model, traced


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_weights_have_one_fingerprint_and_others_another(family: str):
    found = fingerprint(tiny_model(family))
    assert found == fingerprint(tiny_model(family)) == traced(family).fingerprint
    assert len({found, fingerprint(tiny_model(family, seed=1)), fingerprint(tiny_model(family).bfloat16())}) == 3


@pytest.mark.parametrize("width", [640, 768, 1024])
def test_a_head_or_a_row_that_is_changed_in_one_matrix_is_seen(width: int):
    linear = torch.nn.Linear(width, width)
    before = fingerprint(linear)
    seen = []
    for start in range(0, width, 64):
        for part in (linear.weight.data[:, start : start + 64], linear.weight.data[start : start + 64]):
            kept = part.clone()
            part.zero_()
            seen.append(fingerprint(linear))
            part.copy_(kept)
    assert before not in seen
    assert len(set(seen)) == len(seen)
    assert fingerprint(linear) == before


def test_names_shapes_and_buffers_count():
    module = torch.nn.BatchNorm1d(6)
    before = fingerprint(module)
    module.running_mean[3] = 1.0  # type: ignore[index]
    assert fingerprint(module) != before
    tensor, other = torch.zeros(4), torch.nn.Module()
    named = {name: torch.nn.Module() for name in ("a", "b", "square")}
    for name, one in named.items():
        one.register_buffer("b" if name == "b" else "a", tensor.view(2, 2) if name == "square" else tensor)
    assert len({fingerprint(one) for one in (*named.values(), other)}) == 4


def test_tensors_of_any_kind_are_taken():
    module = torch.nn.Module()
    kinds = (torch.bool, torch.int32, torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.complex64)
    for dtype in kinds:
        module.register_buffer(f"of_{dtype}".replace(".", "_"), torch.zeros(50, 40).to(dtype).T)
    module.register_buffer("one", torch.tensor(3.0))
    module.register_buffer("nowhere", torch.empty(3, device="meta"))
    assert fingerprint(module) == fingerprint(module)
