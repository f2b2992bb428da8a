"""Circuits: the graph of features, errors and tokens that an answer comes from. `docs/circuits.md`."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, TypeAdapter, WithJsonSchema, with_config
from typing_extensions import TypedDict

from attribution import checks as check_argument
from attribution.arguments import DatasetId, Index, Positions
from attribution.features.asked import beginning, begun
from attribution.features.circuits.graph import Asked, Limits, trace_through_stream, trace_through_transcoders
from attribution.features.circuits.sources import choose_sources, stands_for_mlp
from attribution.features.source import Source
from attribution.operation import Steps, operation
from attribution.prompts import Message, check_tokens, given_tokens

if TYPE_CHECKING:
    from attribution.session import LocalSession

NODE_THRESHOLD, EDGE_THRESHOLD = 0.8, 0.98
MAX_FEATURE_NODES = 2048
MAX_BYTES = 1 << 30
MOST_CHECKS = 64


@with_config(ConfigDict(extra="forbid"))
class Thresholds(TypedDict, total=False):
    """The shares of influence that the kept nodes, and of these the kept edges, hold."""

    node: float
    edge: float


ThresholdsArg = Annotated[Thresholds, WithJsonSchema(TypeAdapter(Thresholds).json_schema())]


@operation(path="circuits/trace")
def trace_circuit(
    session: "LocalSession",
    prompt: str | None = None,
    *,
    messages: list[Message] | None = None,
    token_ids: Positions | None = None,
    targets: list[Index | str] | None = None,
    max_logits: Index = 10,
    logit_probability: float = 0.95,
    position: Index = -1,
    sources: list[str] | None = None,
    thresholds: ThresholdsArg | None = None,
    max_feature_nodes: Index = MAX_FEATURE_NODES,
    ignore_first: bool = False,
    checks: Index = 8,
    slug: DatasetId | None = None,
    max_bytes: Index = MAX_BYTES,
    add_special_tokens: bool = True,
    show_progress: bool = True,
) -> Steps[dict[str, Any]]:
    """The graph of exact linear effects between features, errors, tokens and the logits of the next token.

    Args:
        prompt: a text; this, `messages` (put through the chat template) and `token_ids` exclude each other.
        targets: the logits that are explained, by id or by a text of one token; None is the most likely ones, at most
            `max_logits` of them and no more than hold `logit_probability`.
        position: the token after which the next one is explained; what follows it is left out.
        sources: the names of transcoders, one for each layer, or of one autoencoder of the stream. None is the model's
            transcoders, or where it has none, its autoencoder of the stream. A layer without one is all error.
        thresholds: {"node": 0.8, "edge": 0.98}: the share of influence that the kept nodes hold, and of these the kept
            edges; 1 keeps all.
        max_feature_nodes: how many features are traced at most, the most influential ones.
        ignore_first: leave what the MLPs add at the first position a constant, as circuit-tracer does.
        checks: how many edges are verified by an intervention.
        slug: a name for the graph.
        max_bytes: what the graph may take while it is made, the model's own forward pass not counted.
        add_special_tokens: whether a text gets the tokenizer's own special tokens, or, where the sources say that they
            were trained with or without the first of them, that one or none; False for templated texts.

    Returns:
        metadata, qParams, nodes and links, as viewers of such graphs read them, and model_id, method ("transcoders", or
        "gradient_x_activation" with an autoencoder of the stream), scores (replacement and completeness, before
        pruning; missed: the share of what reaches the nodes that features have which were not traced), counts,
        layers_without_transcoder, self_check, live_check (features really taken out) and notes.
    """
    model = session.model
    limits = Limits(max_logits, logit_probability, *_thresholds(thresholds or {}), max_feature_nodes, max_bytes)
    limits.check()
    if not 0 <= checks <= MOST_CHECKS:
        raise check_argument.out_of_range("checks", checks, f"0 to {MOST_CHECKS} edges are verified")
    chosen = choose_sources(session.features, model, sources)
    special, bos = beginning(model, [], _begins(chosen), add_special_tokens=add_special_tokens)
    ids = given_tokens(model, prompt, messages, token_ids, special=special)
    if prompt is not None and add_special_tokens:
        check_tokens(model, ids := begun(ids, bos), "prompt")
    asked = Asked(ids[: _position(position, len(ids)) + 1], targets, limits, ignore_first, checks, slug)
    if not stands_for_mlp(chosen[0]):
        return trace_through_stream(model, chosen[0], asked)
    return (yield from trace_through_transcoders(model, chosen, asked))


def _thresholds(given: Thresholds) -> tuple[float, float]:
    return given.get("node", NODE_THRESHOLD), given.get("edge", EDGE_THRESHOLD)


def _position(position: int, count: int) -> int:
    if not -count <= position < count:
        allowed = f"the prompt has the positions 0 to {count - 1}, and -1 to -{count} from its end"
        raise check_argument.out_of_range("position", position, allowed)
    return position % count


def _begins(sources: list[Source]) -> bool | None:
    """Whether one of the sources was trained on texts that begin with the special token; None where none says it."""
    said = [one.prepend_bos for one in sources if one.prepend_bos is not None]
    return any(said) if said else None
