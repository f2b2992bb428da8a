"""A graph as JSON: what circuit-tracer's and Neuronpedia's viewers read, and beside it what Sightline says of it."""

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attribution.errors import InvalidArgument, StorageFailed
from attribution.model.traced import TracedModel
from attribution.prompts import token_text

REQUIRED = ("metadata", "qParams", "nodes", "links")
"""What viewers need of a graph."""
_SLUG = 60


def viewers_part(
    model: TracedModel,
    token_ids: list[int],
    sources: list[str],
    settings: Mapping[str, Any],
    nodes: list[dict[str, Any]],
    links: list[dict[str, Any]],
    slug: str | None,
) -> dict[str, Any]:
    """metadata, qParams, nodes and links.

    Args:
        settings: what the graph was made and pruned with: node_threshold and edge_threshold, and others.
        slug: a name for the graph; None makes one of the model's and the prompt's.
    """
    texts = [token_text(model, token) for token in token_ids]
    prompt = str(model.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
    pruning = {name: settings[name] for name in ("node_threshold", "edge_threshold")}
    return {
        "metadata": {
            "slug": slug or slug_of(model.id, prompt),
            "scan": model.id,
            "transcoder_list": sources,
            "prompt_tokens": texts,
            "prompt": prompt,
            "node_threshold": pruning["node_threshold"],
            "schema_version": 1,
            "info": {"generator": {"name": "sightline", "version": version("sightline")}},
            "generation_settings": {name: value for name, value in settings.items() if name not in pruning},
            "pruning_settings": pruning,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": links,
    }


def slug_of(model_id: str, prompt: str) -> str:
    """A name made of letters, digits and hyphens."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{Path(model_id).name} {prompt[:_SLUG]}".lower())
    return words.strip("-")[:_SLUG].strip("-") or "graph"


def save_circuit(graph: Mapping[str, Any], path: Path | str) -> Path:
    """Write a graph to a file that viewers take as it is.

    Raises:
        InvalidArgument: it is no graph.
        StorageFailed: the file cannot be written.
    """
    check_graph(graph)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(graph, ensure_ascii=False, indent=1) + "\n")
    except OSError as error:
        raise StorageFailed(f"{path} cannot be written: {error}") from error
    return path


def load_circuit(path: Path | str) -> dict[str, Any]:
    """Read a graph that `save_circuit`, circuit-tracer or Neuronpedia wrote.

    Raises:
        InvalidArgument: it is no graph.
        StorageFailed: the file cannot be read.
    """
    try:
        graph = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise StorageFailed(f"{path} cannot be read: {error}") from error
    check_graph(graph)
    return graph


def check_graph(graph: Any) -> None:
    """See that it has the parts of a graph.

    Raises:
        InvalidArgument: it has not; says which is missing.
    """
    has = set(graph) if isinstance(graph, Mapping) else set()
    if missing := [name for name in REQUIRED if name not in has]:
        raise InvalidArgument(f"this is no graph of a circuit: it has no {', '.join(missing)}", param="graph")
