"""The whole of a circuit: from tokens and sources to a graph that says how far it can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attribution import checks
from attribution.errors import NotFinite
from attribution.features.circuits.check import check
from attribution.features.circuits.influence import Pruned, prune, scores
from attribution.features.circuits.live_check import live_check
from attribution.features.circuits.nodes import links, nodes
from attribution.features.circuits.replacement import replace_mlps
from attribution.features.circuits.sources import read_transcoders
from attribution.features.circuits.stream import check_stream, explained, trace_stream
from attribution.features.circuits.targets import MOST_TARGETS, Choose, choose_logits
from attribution.features.circuits.trace import Circuit, Room, trace
from attribution.features.circuits.written import viewers_part
from attribution.features.source import Source
from attribution.model.traced import TracedModel
from attribution.operation import Steps
from attribution.prompts import token_text

LEAST_BYTES = 1 << 16


@dataclass(frozen=True)
class Limits:
    """What is kept of a graph, and what it may take; the fields are arguments of `trace_circuit`."""

    max_logits: int
    logit_probability: float
    node_threshold: float
    edge_threshold: float
    max_feature_nodes: int
    max_bytes: int

    def check(self) -> None:
        """See that each can be meant.

        Raises:
            OutOfRange: naming the one that cannot.
        """
        for name, value in (("node", self.node_threshold), ("edge", self.edge_threshold)):
            if not 0 <= value <= 1:
                raise checks.out_of_range(f"thresholds.{name}", value, "a share from 0 to 1 is expected")
        if not 1 <= self.max_logits <= MOST_TARGETS:
            raise checks.out_of_range(
                "max_logits", self.max_logits, f"1 to {MOST_TARGETS} logits are explained at once"
            )
        if not 0 < self.logit_probability <= 1:
            raise checks.out_of_range(
                "logit_probability", self.logit_probability, "a share above 0, up to 1, is expected"
            )
        if self.max_feature_nodes < 1:
            raise checks.out_of_range("max_feature_nodes", self.max_feature_nodes, "at least 1 is expected")
        if self.max_bytes < LEAST_BYTES:
            raise checks.out_of_range("max_bytes", self.max_bytes, f"at least {LEAST_BYTES} are expected")

    def most_encoded(self, model: TracedModel) -> int:
        """How many activations may be computed at once: a sixth of the ceiling, with two copies."""
        return max(1, self.max_bytes // 6 // (3 * model.work_dtype.itemsize))


@dataclass(frozen=True)
class Asked:
    """What a caller asks for; the fields are arguments of `trace_circuit`, or made of them."""

    token_ids: list[int]
    targets: list[int | str] | None
    limits: Limits
    ignore_first: bool
    checks: int
    slug: str | None

    def choose(self, model: TracedModel) -> Choose:
        """Chooses the logits that are explained."""
        limits = self.limits
        return lambda logits: choose_logits(model, logits, self.targets, limits.max_logits, limits.logit_probability)

    @property
    def settings(self) -> dict[str, Any]:
        """What the graph was made with, in circuit-tracer's words where it has some."""
        return {
            "max_n_logits": self.limits.max_logits,
            "desired_logit_prob": self.limits.logit_probability,
            "max_feature_nodes": self.limits.max_feature_nodes,
            "ignore_first": self.ignore_first,
            "node_threshold": self.limits.node_threshold,
            "edge_threshold": self.limits.edge_threshold,
        }


def trace_through_transcoders(model: TracedModel, sources: Sequence[Source], asked: Asked) -> Steps[dict[str, Any]]:
    """The graph of transcoder features, one step per batch of targets.

    Raises:
        GradientsRefused, UnsupportedModel, OutOfRange, InvalidArgument: naming what cannot be traced.
        NotFinite: the model computed NaN or infinity.
    """
    limits = asked.limits
    transcoders = read_transcoders(model, sources)
    replacement = replace_mlps(
        model, asked.token_ids, transcoders, skip_first=asked.ignore_first, most_encoded=limits.most_encoded(model)
    )
    logits = asked.choose(model)(replacement.linear.logits)
    circuit, room = yield from trace(replacement, logits, limits.max_feature_nodes, limits.max_bytes)
    pruned = _pruned(circuit, limits)
    found = scores(circuit.effects)
    return {
        **_graph(sources, asked, circuit, pruned, "transcoders"),
        "scores": {"replacement": found.replacement, "completeness": found.completeness, "missed": circuit.missed},
        "layers_without_transcoder": _bare(circuit),
        "self_check": check(circuit, pruned, asked.checks) if asked.checks else None,
        "live_check": live_check(circuit, pruned, asked.checks) if asked.checks else None,
        "notes": _notes(circuit, asked, room),
    }


def trace_through_stream(model: TracedModel, source: Source, asked: Asked) -> dict[str, Any]:
    """The graph of one autoencoder of the stream.

    Raises:
        GradientsRefused, UnsupportedModel, OutOfRange, InvalidArgument: naming what cannot be traced.
        NotFinite: the model computed NaN or infinity.
    """
    circuit = trace_stream(
        model,
        source,
        asked.token_ids,
        asked.choose(model),
        asked.limits.max_feature_nodes,
        skip_first=asked.ignore_first,
        most_encoded=asked.limits.most_encoded(model),
    )
    pruned = _pruned(circuit, asked.limits)
    return {
        **_graph([source], asked, circuit, pruned, "gradient_x_activation"),
        "scores": {"replacement": None, "completeness": explained(circuit), "missed": circuit.missed},
        "layers_without_transcoder": list(range(model.dimensions.n_layers)),
        "self_check": check_stream(circuit, pruned, source, asked.checks) if asked.checks else None,
        "live_check": None,
        "notes": [
            f"no transcoders: gradient times activation at {source.reads}, the first-order effect of each feature on "
            "the logits through the model's own later layers; there are no edges between features",
            *_notes(circuit, asked, None),
        ],
    }


def _pruned(circuit: Circuit, limits: Limits) -> Pruned:
    if not bool(torch.isfinite(circuit.values).all() and torch.isfinite(circuit.constants).all()):
        raise NotFinite("the effects in this prompt are not all finite numbers (NaN or infinity)")
    return prune(circuit.effects, limits.node_threshold, limits.edge_threshold)


def _graph(sources: Sequence[Source], asked: Asked, circuit: Circuit, pruned: Pruned, method: str) -> dict[str, Any]:
    """What the replies of both methods begin with."""
    model, names = circuit.replacement.model, [one.name for one in sources]
    described = {one.layer: one.descriptions for one in sources}
    shown = nodes(circuit, pruned, lambda layer, index: described[layer].of(index))
    edges = links(circuit, pruned)
    return {
        **viewers_part(model, asked.token_ids, names, asked.settings, shown, edges, asked.slug),
        "model_id": model.id,
        "method": method,
        "position": len(asked.token_ids) - 1,
        "targets": _targets(circuit),
        "counts": _counts(circuit, pruned, len(shown)),
    }


def _bare(circuit: Circuit) -> list[int]:
    """The layers without a transcoder."""
    return [layer for layer in range(circuit.replacement.n_layers) if layer not in circuit.replacement.transcoders]


def _targets(circuit: Circuit) -> list[dict[str, Any]]:
    """The logits, each less the mean logit and before a softcap; `constant` is the part that no node has."""
    logits = circuit.logits
    return [
        {
            "token": token_text(circuit.replacement.model, token),
            "token_id": token,
            "probability": logits.probabilities[row],
            "value": float(circuit.values[row]),
            "constant": float(circuit.constants[row]),
        }
        for row, token in enumerate(logits.token_ids)
    ]


def _counts(circuit: Circuit, pruned: Pruned, n_nodes: int) -> dict[str, int]:
    return {
        "active_features": len(circuit.replacement.features),
        "traced_features": len(circuit.chosen),
        "features": int(pruned.sources[: len(circuit.chosen)].sum()),
        "errors": int(pruned.sources[circuit.effects.errors].sum()),
        "nodes": n_nodes,
        "links": len(pruned.edges),
    }


def _notes(circuit: Circuit, asked: Asked, room: Room | None) -> list[str]:
    """What a reader of the graph has to know; `room` of a graph through transcoders."""
    notes, model, n_active = [], circuit.replacement.model, len(circuit.replacement.features)
    if room is not None and (missing := _bare(circuit)):
        notes.append(f"layers {missing} have no transcoder: their MLPs are all error")
    if room is not None and room.reduced:
        wanted = min(asked.limits.max_feature_nodes, n_active)
        notes.append(
            f"max_bytes ({asked.limits.max_bytes}) has room for {room.n_features} features; {wanted} were to be traced"
        )
    elif len(circuit.chosen) < n_active:
        notes.append(f"{len(circuit.chosen)} of {n_active} active features were traced")
    if circuit.replacement.skips_first:
        notes.append("what is added at the first position is a constant, and no node")
    if getattr(model.module.config.get_text_config(), "final_logit_softcapping", None) is not None:
        notes.append("the logits are explained before the model's softcap")
    return notes
