"""The gradient of a node: how an objective changes with the residual stream that the node reads.

1. The node reads α·x through norms that are frozen at x, its weights, and whatever is held fixed
   (`docs/attribution.md` has the table of node types).
2. Its objective is ⟨G, what it writes⟩, with G the gradient of something downstream; for `lm_head` it is the
   log-probability of the labels.
3. `attribution.integrate` averages the gradient over α.

Only rows that matter are computed: the queries for `lm_head`, MLPs and q; keys up to the last query for k and v.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from attribution import checks
from attribution.errors import InvalidArgument
from attribution.integrate import Integrated, Path, Rule, integrate, integrate_with_report
from attribution.model.block import Block
from attribution.model.head import OutputHead
from attribution.model.traced import TracedModel
from attribution.paths.attention import KeyPath, PatternPath, QueryPath, ValuePath
from attribution.paths.heads import HeadsAt
from attribution.paths.language_head import LanguageHeadPath
from attribution.paths.mlp import MLPPath
from attribution.store import StoredSample

NodeType = Literal["lm_head", "attn_q", "attn_k", "attn_v", "attn_a", "mlp_i", "mlp_g"]
NODE_TYPES: tuple[str, ...] = get_args(NodeType)
MOST_STEPS = 1024
_ATTENTION = {"attn_q": QueryPath, "attn_k": KeyPath, "attn_v": ValuePath, "attn_a": PatternPath}


@dataclass(frozen=True)
class NodeQuery:
    """What is asked about one node; fields as the arguments of `compute_node_gradient`.

    Attributes:
        grad_name: what the caller calls `output_grad`.
    """

    node_type: str
    layer: int
    head: int | None
    pos_ids: list[int] | None
    src_pos_ids: list[int] | None
    output_grad: Tensor | None
    labels: list[int] | None
    candidate_ids: list[int] | None
    steps: int | Literal["auto"] | None
    rule: Rule
    grad_name: str = "output_grad"


def node_gradient(model: TracedModel, sample: StoredSample, query: NodeQuery) -> Float[Tensor, "heads pos d_model"]:
    """The integrated gradient of a node at its result positions. Axis 0 is 1, or all heads when none is named.

    Raises:
        InvalidArgument, OutOfRange, ShapeMismatch: naming the argument and what is allowed.
        GradientsRefused, UnsupportedModel: the model gives no gradients.
    """
    path, rows = node_path(model, sample, query)
    return integrate(path, rows, _steps(query), query.rule)


def node_report(model: TracedModel, sample: StoredSample, query: NodeQuery) -> Integrated:
    """The same with its objective and completeness error."""
    path, rows = node_path(model, sample, query)
    return integrate_with_report(path, rows, _steps(query), query.rule)


def node_path(model: TracedModel, sample: StoredSample, query: NodeQuery) -> tuple[Path, list[int]]:
    """The path of a node, and which of its positions the result has."""
    _check_node(model, query)
    positions = checks.positions("pos_ids", query.pos_ids, sample.seq_len)
    if query.node_type == "lm_head":
        return _language_head(model, sample, query, positions), list(range(len(positions)))
    layers = model.dimensions.n_layers
    checks.in_range("layer", query.layer, layers, f"the layers of {model.id}")
    block = Block(model, query.layer)
    grad = _output_grad(block, query, len(positions))
    if query.node_type in _ATTENTION:
        return _attention(block, sample, query, positions, grad)
    if query.node_type == "mlp_g" and block.family.gate is None:
        raise InvalidArgument(
            f"the MLPs of {model.id} have no gate; they have the node type mlp_i only", param="node_type"
        )
    resid, z = sample.read("resid", query.layer, positions), sample.read("z", query.layer, positions)
    mid = resid.to(block.device) + block.attn_out(z)
    return MLPPath(block, mid, grad, query.node_type), list(range(len(positions)))


def _language_head(model: TracedModel, sample: StoredSample, query: NodeQuery, positions: list[int]) -> Path:
    layers = model.dimensions.n_layers
    if query.layer not in (layers - 1, layers):
        raise checks.out_of_range("layer", query.layer, f"lm_head reads the final stream: {layers - 1} or {layers}")
    labels = checks.answer(model.dimensions.d_vocab, query.labels, query.candidate_ids, len(positions))
    head = OutputHead(model, query.candidate_ids)
    return LanguageHeadPath(head, sample.read("resid", layers, positions), labels)


def _attention(
    block: Block, sample: StoredSample, query: NodeQuery, positions: list[int], grad: Tensor
) -> tuple[Path, list[int]]:
    name, count = query.node_type, block.dims.n_heads
    if query.head is not None:
        checks.in_range("head", query.head, count, f"the heads of {block.model.id}")
    heads = list(range(count)) if query.head is None else [query.head]
    given = query.src_pos_ids
    sources = positions if given is None else checks.positions("src_pos_ids", given, sample.seq_len)
    reach = max(positions if name == "attn_q" else positions + sources) + 1
    resid = sample.read("resid", query.layer, list(range(reach)))
    z = sample.read("z", query.layer, positions)
    at = HeadsAt.of(block, resid, positions, heads, _z_grad(block, z, heads, grad))
    path = _ATTENTION[name](at)
    if name == "attn_q":
        return path, list(range(len(positions)))
    return path, sources


def _z_grad(block: Block, z: Tensor, heads: list[int], grad: Tensor) -> Float[Tensor, "query heads d_head"]:
    """From the gradient at the stream to that at the heads' outputs, through a frozen post-norm where there is one."""
    scale = block.attn_write_scale(z)
    grad = grad if scale is None else grad * scale
    return torch.einsum("pe,hde->phd", grad, block.weight("o")[heads].to(grad.dtype))


def _output_grad(block: Block, query: NodeQuery, count: int) -> Float[Tensor, "pos d_model"]:
    grad, width = query.output_grad, block.dims.d_model
    if grad is None:
        expected = f"[1, {count}, {width}]"
        raise InvalidArgument(f"{query.node_type} needs {query.grad_name}: {expected}", param=query.grad_name)
    meaning = "1, len(pos_ids), hidden size"
    return checks.shape(query.grad_name, grad, (1, count, width), meaning)[0].to(block.device, block.dtype)


def _check_node(model: TracedModel, query: NodeQuery) -> None:
    if query.node_type not in NODE_TYPES:
        raise InvalidArgument(
            f"node_type is {query.node_type!r}; it is one of {', '.join(NODE_TYPES)}", param="node_type"
        )
    steps, head, count = query.steps, query.head, model.dimensions.n_heads
    if isinstance(steps, int) and not 0 <= steps <= MOST_STEPS:
        raise checks.out_of_range("steps", steps, f'steps are 0 to {MOST_STEPS}, "auto" or None')
    column = {"lm_head": 0, "mlp_i": count, "mlp_g": count}.get(query.node_type, head)
    if head is not None and head != column:
        raise checks.out_of_range("head", head, f"{query.node_type} has the column {column}, or leave head out")


def _steps(query: NodeQuery) -> int | Literal["auto"] | None:
    return 0 if query.node_type == "attn_a" else query.steps
