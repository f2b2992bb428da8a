"""Attribution of a model's answers: sessions, nodes and graphs. Names are imported when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attribution.faithful import eliminate, faithfulness, faithfulness_curves
    from attribution.features.circuits.written import load_circuit, save_circuit
    from attribution.graph import Graph
    from attribution.heads import cluster_heads, compute_js_matrix
    from attribution.nodes import Node
    from attribution.reduce import einsum, mr, topk_md
    from attribution.result_files import load_results, save_results
    from attribution.results import SampleRef, forward_results
    from attribution.search import find_graph
    from attribution.session import LocalSession
    from attribution.sweeps import sweep_table
    from attribution.unified import (
        attribute_attn_weights,
        attribute_residual,
        attribute_step,
        get_attn_weights,
        get_head_output,
        get_hidden_states,
    )

__all__ = [
    "Graph",
    "LocalSession",
    "Node",
    "SampleRef",
    "attribute_attn_weights",
    "attribute_residual",
    "attribute_step",
    "cluster_heads",
    "compute_js_matrix",
    "einsum",
    "eliminate",
    "faithfulness",
    "faithfulness_curves",
    "find_graph",
    "forward_results",
    "get_attn_weights",
    "get_head_output",
    "get_hidden_states",
    "load_circuit",
    "load_results",
    "mr",
    "save_circuit",
    "save_results",
    "sweep_table",
    "topk_md",
]

_NAMES = {
    "faithful": "eliminate faithfulness faithfulness_curves",
    "features.circuits.written": "load_circuit save_circuit",
    "graph": "Graph",
    "heads": "cluster_heads compute_js_matrix",
    "nodes": "Node",
    "reduce": "einsum mr topk_md",
    "result_files": "load_results save_results",
    "results": "SampleRef forward_results",
    "search": "find_graph",
    "session": "LocalSession",
    "sweeps": "sweep_table",
    "unified": "attribute_attn_weights attribute_residual attribute_step get_attn_weights get_head_output "
    "get_hidden_states",
}
_MODULE_OF = {name: f"attribution.{module}" for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """A public name, from the module that has it: the errors alone must not bring torch and transformers along."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'attribution' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
