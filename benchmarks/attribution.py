"""Attribution: what a score costs against a forward pass, against one head, against a plain gradient; what is stored.

All on one sample of 256 tokens in float32. A sample that was just stored is read from memory; where a row says disk,
the store keeps nothing in memory.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from attribution.sample_file import read_layout
from attribution.stored import StoredSample, stored_sample
from benchmarks.subject import DATASET, TOKENS, Subject, gradient
from benchmarks.table import Row
from benchmarks.timing import Prepared, Work, in_turn, milliseconds, ratio

LAYER, HEAD = 4, 3
TWO = [100, 254]
EVERYWHERE = list(range(TOKENS))
PLACES = (("2 positions", TWO), ("256 positions", EVERYWHERE))
_NOTE = (
    "256 tokens, float32, torch's own number of threads ({threads}). The garbage collector is off while the clock "
    "runs. A forward is that of plain transformers, without a key/value cache; cold reads follow "
    "`posix_fadvise(DONTNEED)` on the file, reads from the page cache do not. In a cell: the base first, then ours."
)


def note() -> str:
    """What a reader of the table must know."""
    return _NOTE.format(threads=torch.get_num_threads())


def run(subject: Subject, rounds: int) -> list[Row]:
    """All rows but those against other libraries and those against the number of tokens."""
    sample = subject.forward()
    return [
        *_residual(subject, sample, rounds),
        *_all_heads(subject, sample, rounds),
        *_integrated(subject, sample, rounds),
        *_disk(subject, sample, rounds),
    ]


# --- residual attribution


def _residual(subject: Subject, sample: int, rounds: int) -> list[Row]:
    grad = gradient(len(TWO))
    stored = subject.session.sample(DATASET, sample)
    z, mlp_out = stored.read("z", range(8)), stored.read("mlp_out", range(8))
    weights = [layer.self_attn.o_proj.weight for layer in subject.plain.model.layers]
    works: dict[str, Work] = {
        "forward": subject.run_plain,
        "ours": lambda: _attribute(subject.session, sample, grad),
        "disk": lambda: _attribute(subject.from_disk, sample, grad),
        "torch": lambda: plain_residual(z[:, TWO], mlp_out[:, TWO], weights, grad[0]),
    }
    torch.testing.assert_close(works["ours"]()[..., 0], works["torch"](), rtol=1e-4, atol=1e-4)
    times = in_turn(works, rounds)
    what = "residual attribution of one gradient, 2 positions, all layers and heads, against one forward"
    return [
        Row(name, aim, ratio(times, which, "forward"), milliseconds(times["forward"], times[which]))
        for name, aim, which in (
            (what, "≤ 0.08", "ours"),
            ("the same from disk", "", "disk"),
            ("the floor: the same by plain torch, activations at hand", "", "torch"),
        )
    ]


def _attribute(session: Any, sample: int, grad: Tensor) -> Tensor:
    return session.attribute_residual(DATASET, sample, TWO, [grad], [8.0])


@torch.no_grad()
def plain_residual(z: Tensor, mlp_out: Tensor, weights: list[Tensor], grad: Tensor) -> Tensor:
    """⟨W_O^h z, G⟩ and ⟨mlp, G⟩ summed over positions, [layers, heads + 1]; nothing is checked or masked.

    Args:
        z: [layer, pos, head, d_head].
        mlp_out: [layer, pos, d_model].
        weights: of the output projections, [d_model, head · d_head].
        grad: [pos, d_model].
    """
    heads = torch.stack(
        [((grad @ weight).view(rows.shape) * rows).sum((0, 2)) for weight, rows in zip(weights, z, strict=True)]
    )
    return torch.cat([heads, torch.einsum("lpe,pe->l", mlp_out, grad)[:, None]], dim=1)


# --- node gradients


def _all_heads(subject: Subject, sample: int, rounds: int) -> list[Row]:
    rows = []
    for where, positions in PLACES:
        for node_type in ("attn_q", "attn_k", "attn_v"):
            compute = partial(_gradient, subject, sample, node_type, positions, None)
            times = in_turn({"one": partial(compute, head=HEAD), "all": compute}, rounds)
            rows.append(
                Row(
                    f"{node_type}, {where}: all 8 heads of a layer against one",
                    "≤ 1.5",
                    ratio(times, "all", "one"),
                    milliseconds(times["one"], times["all"]),
                )
            )
    return rows


def _integrated(subject: Subject, sample: int, rounds: int) -> list[Row]:
    rows = []
    for (where, positions), aim in zip(PLACES, ("≤ 2.5", "≤ 3.8"), strict=True):
        for node_type in ("lm_head", "mlp_i", "attn_q", "attn_k"):
            head = HEAD if node_type.startswith("attn") else None
            compute = partial(_gradient, subject, sample, node_type, positions, head=head)
            times = in_turn({"plain": partial(compute, 0), "four": partial(compute, 4)}, rounds)
            rows.append(
                Row(
                    f"{node_type}, {where}: 4 interpolation points against the plain gradient",
                    aim,
                    ratio(times, "four", "plain"),
                    milliseconds(times["plain"], times["four"]),
                )
            )
    return rows


def _gradient(
    subject: Subject, sample: int, node_type: str, positions: list[int], steps: int | None, head: int | None = None
) -> Tensor:
    layer = 8 if node_type == "lm_head" else LAYER
    given: dict[str, Any] = {"labels": [7] * len(positions)}
    if node_type != "lm_head":
        given = {"output_grad": gradient(len(positions))}
    return subject.session.compute_node_gradient(
        DATASET, sample, node_type, layer, head=head, pos_ids=positions, steps=steps, **given
    )


# --- the store


def _disk(subject: Subject, sample: int, rounds: int) -> list[Row]:
    path = subject.from_disk.sample(DATASET, sample).layout.path
    positions = list(range(100, 110))

    def fresh() -> StoredSample:
        return stored_sample(DATASET, sample, read_layout(path))

    def whole() -> list[Tensor]:
        found = fresh()
        return [found.read(name, range(slot.shape[0])) for name, slot in found.layout.slots.items()]

    def mapped() -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_slice("resid")[LAYER, 100:110].clone()

    def part() -> Tensor:
        return fresh().read("resid", LAYER, positions)

    assert torch.equal(part(), mapped())
    works: dict[str, Work] = {"part": part, "whole": whole, "mapped": mapped}
    cold = {f"cold {name}": Prepared(partial(_cool, path), lambda _, do=do: do()) for name, do in works.items()}
    times = in_turn({**works, **cold}, rounds)
    rows = []
    for temperature, prefix in (("page cache", ""), ("cold", "cold ")):
        for name, base in (("the whole sample", "whole"), ("safetensors' mapped slice", "mapped")):
            rows.append(
                Row(
                    f"read one layer and 10 positions of a sample, header included ({temperature}), against {name}",
                    "",
                    ratio(times, f"{prefix}part", f"{prefix}{base}"),
                    milliseconds(times[f"{prefix}{base}"], times[f"{prefix}part"]),
                )
            )
    return rows


def _cool(path: Path) -> None:
    """Let the kernel forget the file's pages."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(file)  # pages that are not written yet would stay
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
