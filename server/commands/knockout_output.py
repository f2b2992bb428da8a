"""How `sightline knockout` shows a result, and the file that it writes."""

import json
from pathlib import Path
from typing import Any

import typer

from server.commands.output import show, size


def tell(found: dict[str, Any]) -> None:
    """Print a result: what was removed of what, what it took, and what changed."""
    lines = {
        "model": f"{found['model_id']}: {found['n_layers']} layers, {found['n_heads']} heads, "
        f"hidden size {found['hidden_size']}, {found['dtype']} on {found['device']}",
        "prompt": f"{_short(found['prompt'])} ({len(found['token_ids'])} tokens)",
        "removed": f"{_numbers('layer', found['layers'])}, {_heads(found)}, {_edges(found)}",
        "memory": _memory_line(found),
        "time": f"loaded in {found['load_seconds']:.2f} s, ran in {found['forward_seconds']:.2f} s",
        "KL": f"{found['kl_divergence']:.6g} nats",
    }
    for one in found["logit_diff"]:
        value = one["value"]
        meaning = "supported" if value > 0 else "opposed" if value < 0 else "do not touch"
        lines[f"logit diff {one['token']!r}"] = f"{value:+.6g} (id {one['token_id']}; the edges {meaning} it)"
    width = max(map(len, lines)) + 2
    for name, value in lines.items():
        typer.echo(f"{name:<{width}}{value}")
    typer.echo()
    rows = [
        (
            one["rank"],
            repr(one["token"]),
            one["token_id"],
            f"{one['baseline_prob']:.6g}",
            f"{one['ablated_prob']:.6g}",
            f"{one['ablated_prob'] - one['baseline_prob']:+.4g}",
        )
        for one in found["top_changed"]
    ]
    headers = ("rank", "token", "id", "before", "after", "change")
    show(headers, rows, right=("rank", "id", "before", "after", "change"))


def _short(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:25]!r} … {text[-25:]!r}"


def _numbers(name: str, numbers: list[int]) -> str:
    return f"{name} {numbers[0]}" if len(numbers) == 1 else f"{name}s {', '.join(map(str, numbers))}"


def _heads(found: dict[str, Any]) -> str:
    heads = found["heads"]
    return f"all {len(heads)} heads" if len(heads) == found["n_heads"] else _numbers("head", heads)


def _edges(found: dict[str, Any]) -> str:
    """The edges; one between two tokens with what they are."""
    edges = found["knockout_edges"]
    shown = ", ".join(" → ".join(_side(side) for side in edge) for edge in edges)
    if len(edges) > 1 or not all(isinstance(side, int) for side in edges[0]):
        return f"edges {shown} (query → key)"
    query, key = (repr(found["tokens"][side]) for side in edges[0])
    return f"edge {shown} ({query} no longer reads {key})"


def _side(side: Any) -> str:
    return f"{side['start']}:{side['stop']}" if isinstance(side, dict) else str(side)


def _memory_line(found: dict[str, Any]) -> str:
    parts = [f"{size(found['rss_before_bytes'])} before loading, {size(found['rss_after_bytes'])} after"]
    if found["gpu_after_bytes"] is not None:
        parts.append(f"GPU {size(found['gpu_before_bytes'])} before, {size(found['gpu_after_bytes'])} after")
    return "; ".join(parts)


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a result as JSON; `target_layer` and `knockout_edge` are null when there are several."""
    layers, edges = found["layers"], found["knockout_edges"]
    record = {
        "model_id": found["model_id"],
        "prompt": found["prompt"],
        "n_layers": found["n_layers"],
        "n_heads": found["n_heads"],
        "hidden_size": found["hidden_size"],
        "target_layer": layers[0] if len(layers) == 1 else None,
        "knockout_edge": edges[0] if len(edges) == 1 else None,
        "kl_divergence": found["kl_divergence"],
        "logit_diff": found["logit_diff"][0],
        "top_changed": found["top_changed"],
    }
    rest = {name: value for name, value in found.items() if name not in (*record, "patterns", "logit_diff")}
    rest["logit_diffs"] = found["logit_diff"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | rest, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    typer.echo(f"\nwritten to {path}")
