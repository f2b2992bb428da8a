"""Interventions by feature as a request has them, each with what it does to a plain model: loops over its rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attribution.features.autoencoder import Autoencoder
from attribution.features.places import Place
from attribution.features.writing import write_autoencoder
from tests.attribution.features.plain_autoencoder import by_loops, random_autoencoder
from tests.models import D_MLP, D_MODEL, N_HEADS
from tests.server.steering_cases import ALL, PROMPT_TOKENS, d_head
from tests.server.steering_oracle import Edit, Function

FEATURE = 7
GENERATED = range(PROMPT_TOKENS, 10**6)
SOURCES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "resid": ("resid_post[1]", "resid_post[1]", {"activation": "jumprelu", "subtracts_b_dec": True}),
    "normed": ("resid_post[0]", "resid_post[0]", {"normalisation": "layer_norm", "activation": "relu"}),
    "constant": ("resid_pre[2]", "resid_pre[2]", {"normalisation": "constant_norm", "activation": "gated"}),
    "mid": ("resid_mid[1]", "resid_mid[1]", {"activation": "topk", "rescaled": True, "k": 9}),
    "heads": ("z[1]", "z[1]", {}),
    "centred": ("attn_out[2]", "attn_out[2]", {"centred": True}),
    "hidden": ("mlp_hidden[1]", "mlp_hidden[1]", {}),
    "given": ("mlp_in[1]", "mlp_in[1]", {}),
    "transcoder": ("mlp_in[1]", "mlp_out[1]", {"restores": False, "skip": True}),
    "norm_transcoder": ("mlp_normalised[2]", "mlp_out[2]", {"restores": False, "activation": "jumprelu"}),
    "mid_transcoder": ("resid_mid[0]", "mlp_out[0]", {"restores": False, "normalisation": "layer_norm"}),
    "topk_transcoder": ("mlp_in[2]", "mlp_out[2]", {"restores": False, "activation": "topk", "k": 9}),
}
"""By name: where it reads, where it writes, and what it is."""


def source(family: str, name: str) -> Autoencoder:
    """The autoencoder of this name, in float32."""
    reads, writes, options = SOURCES[name]
    widths = {"z": N_HEADS * d_head(family), "mlp_hidden": D_MLP}
    d_in = widths.get(reads.partition("[")[0], D_MODEL)
    d_out = {} if reads == writes else {"d_out": D_MODEL}
    return random_autoencoder(seed=len(name), dtype=torch.float32, d_in=d_in, n=23, **d_out, **options)


def write_source(family: str, name: str, folder: Path) -> Path:
    """The folder of a source."""
    reads, writes, _ = SOURCES[name]
    places = [Place(one.partition("[")[0], int(one[-2])) for one in (reads, writes)]
    return write_autoencoder(folder, source(family, name), reads=places[0], writes=places[1])


@dataclass
class Steered:
    """One request, and the same for the oracle.

    Attributes:
        reads: what the model has read at the places that are read, by module path and side, [position, width].
        hooks: further changes, at one side of a module.
    """

    interventions: list[dict[str, Any]]
    edits: list[Edit]
    reads: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    hooks: list[tuple[str, Edit]] = field(default_factory=list)

    @contextmanager
    def open(self, model: Any) -> Iterator[None]:
        """While this is open, the model keeps what is read and computes with the further changes."""
        handles = [
            model.get_submodule(path).register_forward_hook(
                lambda module, args, output, at=(path, side): self._keep(at, args[0] if at[1] == "input" else output)
            )
            for path, side in self.reads
        ]
        for path, edit in self.hooks:
            handles.append(
                model.get_submodule(path).register_forward_pre_hook(
                    lambda module, args, edit=edit: (_changed(edit, args[0]), *args[1:])
                )
            )
        yield
        for handle in handles:
            handle.remove()

    def _keep(self, at: tuple[str, str], value: Tensor) -> None:
        self.reads[at] = value[0].clone()


def _changed(edit: Edit, value: Tensor) -> Tensor:
    value = value.clone()
    chosen = [position for position in range(value.shape[1]) if position in edit.positions]
    if chosen:
        value[0, chosen] = edit.function(value[0, chosen])
    return value


def steps(one: Autoencoder, x: Tensor, change: Any) -> Tensor:
    """For each row: the direction of the feature, as much of it as `change` says of its activation."""
    found = []
    for row in x.double():
        activation = by_loops(one, row.tolist())[1][FEATURE]
        direction = one.W_dec[FEATURE].double()
        if one.rescaled:
            direction = direction / direction.norm()
        given = row - row.mean() if one.centred else row
        scale = 1.0
        if one.restores and one.normalisation == "layer_norm":
            scale = float(given.std())
        if one.restores and one.normalisation == "constant_norm":
            scale = float(given.norm()) / len(given) ** 0.5
        found.append(change(activation) * scale * direction)
    return torch.stack(found)


def adds(one: Autoencoder, strength: float) -> Function:
    """x + strength · d."""
    return lambda x: (x + steps(one, x, lambda _: strength)).to(x.dtype)


def clamps(one: Autoencoder, value: float) -> Function:
    """x + (value − f) · d, where it reads what it changes."""
    return lambda x: (x + steps(one, x, lambda found: value - found)).to(x.dtype)


def shares(one: Autoencoder, strength: float, *, kept: bool) -> Function:
    """x + strength · ‖x‖ · d / ‖d‖, and where it is to be kept of the norm of x."""
    u = one.W_dec[FEATURE].double() / one.W_dec[FEATURE].double().norm()

    def add(x: Tensor) -> Tensor:
        norm = x.double().norm(dim=-1, keepdim=True)
        y = x + strength * norm * u
        return (y * norm / y.norm(dim=-1, keepdim=True) if kept else y).to(x.dtype)

    return add


def cases(family: str) -> dict[str, Steered]:
    """By name: every kind of source, both operations, the normalisations, windows, and several at one site."""
    at = f"{'transformer.h' if family == 'gpt2' else 'model.layers'}."
    mlp_norm = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm"}.get(family, "post_attention_layernorm")
    down = "mlp.c_proj" if family == "gpt2" else "mlp.down_proj"
    made = {name: source(family, name) for name in SOURCES}

    def asks(name: str, **more: Any) -> dict[str, Any]:
        return {"type": "feature", "source": name, "index": FEATURE} | more

    def clamp(name: str, value: float, **more: Any) -> dict[str, Any]:
        return asks(name, operation="clamp", value=value, **more)

    def across(name: str, path: str, value: float, layer: int, positions: range = ALL, before: Any = None) -> Steered:
        """A transcoder's feature is clamped: the step is that of the rows which the module at the path was given."""
        one = Steered([], [], {(path, "input"): torch.empty(0)})

        def step(y: Tensor) -> Tensor:
            x = one.reads[path, "input"]
            x = x[[position for position in range(len(x)) if position in positions]]
            x = x if before is None else before(x)
            return (y + steps(made[name], x, lambda found: value - found)).to(y.dtype)

        one.edits.append(Edit("mlp_out", (layer,), step, positions))
        return one

    def normalised(x: Tensor) -> Tensor:
        x = x.double() - (x.double().mean(-1, keepdim=True) if family == "gpt2" else 0)
        return x / (x.square().mean(-1, keepdim=True) + (1e-5 if family == "gpt2" else 1e-6)).sqrt()

    found = {
        "add": Steered([asks("resid", strength=3)], [Edit("resid_post", (1,), adds(made["resid"], 3))]),
        "add one": Steered([asks("transcoder")], [Edit("mlp_out", (1,), adds(made["transcoder"], 1))]),
        "add, scaled": Steered(
            [asks("normed", strength=-2, operation="add")], [Edit("resid_post", (0,), adds(made["normed"], -2))]
        ),
        "add, scaled, generated": Steered(
            [asks("constant", strength=2, positions="generated")],
            [Edit("resid_pre", (2,), adds(made["constant"], 2), GENERATED)],
        ),
        "add a share": Steered(
            [asks("normed", strength=0.5, normalise="relative")],
            [Edit("resid_post", (0,), shares(made["normed"], 0.5, kept=False))],
        ),
        "add a share, norm kept": Steered(
            [asks("resid", strength=-0.7, normalise="both")],
            [Edit("resid_post", (1,), shares(made["resid"], -0.7, kept=True))],
        ),
        "clamp": Steered([clamp("resid", 8)], [Edit("resid_post", (1,), clamps(made["resid"], 8))]),
        "clamp to 0": Steered([clamp("normed", 0)], [Edit("resid_post", (0,), clamps(made["normed"], 0))]),
        "clamp, scaled": Steered([clamp("constant", 5)], [Edit("resid_pre", (2,), clamps(made["constant"], 5))]),
        "clamp the stream": Steered([clamp("mid", 12)], [Edit("resid_mid", (1,), clamps(made["mid"], 12))]),
        "clamp heads": Steered(
            [clamp("heads", 6, positions="prompt")],
            [Edit("z", (1,), clamps(made["heads"], 6), range(PROMPT_TOKENS))],
        ),
        "clamp, centred": Steered([clamp("centred", 7)], [Edit("attn_out", (2,), clamps(made["centred"], 7))]),
        "clamp a transcoder": across("transcoder", f"{at}1.mlp", 9, 1),
        "clamp a transcoder of k": across("topk_transcoder", f"{at}2.mlp", 9, 2),
        "clamp before the norm's weight": across(
            "norm_transcoder", f"{at}2.{mlp_norm}", 4, 2, range(3, 10**6, 2), before=normalised
        ),
        "clamp by the stream": across("mid_transcoder", f"{at}0.{mlp_norm}", 6, 0, GENERATED),
    }
    found["clamp a transcoder"].interventions.append(clamp("transcoder", 9))
    found["clamp a transcoder of k"].interventions.append(clamp("topk_transcoder", 9))
    found["clamp before the norm's weight"].interventions.append(
        clamp("norm_transcoder", 4, positions={"start": 3, "step": 2})
    )
    found["clamp by the stream"].interventions.append(clamp("mid_transcoder", 6, positions="generated"))
    for name, path, value in (("hidden", f"{at}1.{down}", 3), ("given", f"{at}1.mlp", 5)):
        edit = Edit(name, (1,), clamps(made[name], value))
        found[f"clamp {name}"] = Steered([clamp(name, value)], [], hooks=[(path, edit)])
    many = across("transcoder", f"{at}1.mlp", 9, 1)
    many.interventions += [
        {"type": "scale", "selector": "mlp_out[1]", "factor": 0.5},
        clamp("transcoder", 9),
        {"type": "scale", "selector": "mlp_out[1]", "factor": 1.5},
        clamp("mid", 12),  # what the transcoder reads is changed by it
        asks("resid", strength=-1),
        clamp("normed", 4),
        clamp("given", 5),  # the very place that the transcoder reads
    ]
    many.hooks.append((f"{at}1.mlp", Edit("given", (1,), clamps(made["given"], 5))))
    many.edits[:] = [
        Edit("mlp_out", (1,), lambda x: x * 0.5),
        *many.edits,
        Edit("mlp_out", (1,), lambda x: x * 1.5),
        Edit("resid_mid", (1,), clamps(made["mid"], 12)),
        Edit("resid_post", (1,), adds(made["resid"], -1)),
        Edit("resid_post", (0,), clamps(made["normed"], 4)),
    ]
    return found | {"many": many}
