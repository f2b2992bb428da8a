"""What a recorded run holds of a place, piece by piece: from one savepoint, from several, or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attribution.errors import OutOfRange, RunNotFound, SampleMismatch, StorageFailed
from attribution.features.places import Place, place_stream
from attribution.recorded import RecordedAnswer, read_answer, recorded_rows
from tests.models import D_HEAD, D_MODEL, N_HEADS, traced

RUN = "a" * 32
TOKENS = [5, 6, 7, 8, 9, 10, 11]
FED = len(TOKENS) - 1


def written(root: Path, saved: dict[str, tuple[str, Tensor, list[int], int]], **more: Any) -> Path:
    """A run of one choice with these savepoints: selector, tensor, positions and axis."""
    folder = root / RUN / "0"
    folder.mkdir(parents=True, exist_ok=True)
    meta = {}
    for name, (selector, tensor, positions, axis) in saved.items():
        torch.save(tensor, folder / f"{name}.pt")
        dtype = str(tensor.dtype).removeprefix("torch.")
        meta[name] = {"selector": selector, "dtype": dtype, "positions": positions, "axis": axis}
    choice = {"index": 0, "token_ids": TOKENS, "prompt_tokens": 4, "activations": meta} | more
    record = {"model": "tiny-qwen3", "revision": None, "dtype": "float32", "choices": [choice]}
    (folder.parent / "run.json").write_text(json.dumps(record))
    return root


def answer(root: Path, saved: dict[str, Any], **more: Any) -> RecordedAnswer:
    return read_answer(traced("qwen3"), written(root, saved, **more), RUN, 0)


def rows_of(found: RecordedAnswer, point: str, layer: int, positions: list[int]) -> Tensor | None:
    model = traced("qwen3")
    return recorded_rows(model, found, place_stream(model, Place(point, layer)), positions)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_choice_is_read_with_what_was_fed(tmp_path: Path):
    found = answer(tmp_path, {})
    assert (found.token_ids, found.prompt, found.fed, found.intervened) == (TOKENS, 4, FED, False)
    assert answer(tmp_path, {}, interventions=[{"type": "add"}]).intervened


def test_positions_may_come_from_several_savepoints_in_any_order(tmp_path: Path):
    x = numbers(FED, D_MODEL)
    saved = {
        "even": ("resid_post[1]", x[::2], [0, FED, 2], 0),
        "odd": ("resid_post[0:2]", torch.stack([numbers(3, D_MODEL, seed=1), x[1::2]]), [1, FED, 2], 1),
    }
    found = answer(tmp_path, saved)
    for positions in ([0, 1, 2, 3, 4, 5], [5, 0], [3]):
        rows = rows_of(found, "resid_post", 1, positions)
        assert rows is not None
        assert torch.equal(rows, x[positions])
    half = answer(tmp_path, {"even": saved["even"]})
    assert rows_of(half, "resid_post", 1, [0, 1]) is None
    assert rows_of(half, "resid_post", 0, [0]) is None


@pytest.mark.parametrize(
    ("selector", "shape"),
    [("z[1]", (N_HEADS, D_HEAD)), ("model.layers.1.self_attn.o_proj.input", (N_HEADS * D_HEAD,))],
)
def test_heads_are_cut_as_the_place_has_them_whatever_was_saved(tmp_path: Path, selector: str, shape: tuple[int, ...]):
    z = numbers(FED, *shape)
    rows = rows_of(answer(tmp_path, {"z": (selector, z, [0, FED, 1], 0)}), "z", 1, [2, 0])
    assert rows is not None
    assert torch.equal(rows, z.reshape(FED, N_HEADS, D_HEAD)[[2, 0]])


def test_the_stream_between_two_layers_is_the_same_unless_something_was_changed_there(tmp_path: Path):
    x = numbers(FED, D_MODEL)
    saved = {"x": ("resid_pre[2]", x, [0, FED, 1], 0)}
    rows = rows_of(answer(tmp_path, saved), "resid_post", 1, [1])
    assert rows is not None
    assert torch.equal(rows, x[[1]])
    changed = answer(tmp_path, saved, interventions=[{"type": "add"}])
    assert rows_of(changed, "resid_post", 1, [1]) is None
    assert rows_of(changed, "resid_pre", 2, [1]) is not None
    assert rows_of(answer(tmp_path, saved), "resid_post", 2, [1]) is None


def test_what_was_rounded_is_not_taken_and_what_was_widened_is(tmp_path: Path):
    x = numbers(FED, D_MODEL)
    for dtype, taken in ((torch.bfloat16, False), (torch.float16, False), (torch.float64, True)):
        found = answer(tmp_path, {"x": ("resid_post[1]", x.to(dtype), [0, FED, 1], 0)})
        assert (rows_of(found, "resid_post", 1, [0]) is not None) == taken


def test_other_savepoints_are_passed_over(tmp_path: Path):
    saved = {
        "pattern": ("pattern[1]", numbers(N_HEADS, FED, FED), [0, FED, 1], 1),
        "gone": ("model.layers.9.output", numbers(FED, D_MODEL), [0, FED, 1], 0),
        "q": ("q[1]", numbers(FED, N_HEADS, D_HEAD), [0, FED, 1], 0),
    }
    assert rows_of(answer(tmp_path, saved), "resid_post", 1, [0]) is None


def test_what_cannot_be_read_is_an_error(tmp_path: Path):
    model = traced("qwen3")
    found = answer(tmp_path, {"x": ("resid_post[1]", numbers(FED, D_MODEL), [0, FED, 1], 0)})
    for content in (b"broken", None):
        path = tmp_path / RUN / "0" / "x.pt"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(StorageFailed, match=r"x\.pt cannot be read"):
            rows_of(found, "resid_post", 1, [0])
    with pytest.raises(OutOfRange):
        read_answer(model, tmp_path, RUN, 1)
    for run_id in ("../x", "b" * 32):
        with pytest.raises(RunNotFound):
            read_answer(model, tmp_path, run_id, 0)
    with pytest.raises(SampleMismatch, match="of the model 'tiny-qwen3'"):
        read_answer(traced("llama"), tmp_path, RUN, 0)
    (tmp_path / RUN / "run.json").write_text("[]")
    with pytest.raises(StorageFailed, match=r"run\.json cannot be read"):
        read_answer(model, tmp_path, RUN, 0)
