"""Interventions: what the next token would be if something inside the model were otherwise. `docs/knockout.md`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, TypeAdapter, WithJsonSchema, with_config
from typing_extensions import TypedDict

from attribution import checks
from attribution.arguments import Index, Positions
from attribution.divergence import kl_divergence, logit_difference, top_changed
from attribution.errors import InvalidArgument
from attribution.interventions.edges import EdgeArg, EdgeSpec, Selection, selected
from attribution.interventions.knockout import Knockout, Outcome, Rows, check_knockout, patterns, run_knockouts
from attribution.model.traced import TracedModel
from attribution.operation import Progress, Steps, operation
from attribution.operations.devices import on_device
from attribution.prompts import Message, given_tokens, token_id_of, token_text

if TYPE_CHECKING:
    from attribution.session import LocalSession

LAST_TO_FIRST: list[Any] = [-1, 0]
"""The edge that is removed when none is named: the last token's to the first."""
_CHECKED_AT_ONCE = 256


@with_config(ConfigDict(extra="forbid"))
class Specification(TypedDict, total=False):
    """One knockout of a sweep; what is left out is as in `knockout`."""

    layers: Selection
    heads: Positions
    edges: list[EdgeArg]


SpecificationArg = Annotated[Specification, WithJsonSchema(TypeAdapter(Specification).json_schema())]
"""Its schema is written out where it stands, since the OpenAPI page follows no references."""


@operation(path="interventions/knockout")
def knockout(
    session: "LocalSession",
    prompt: str | None = None,
    *,
    messages: list[Message] | None = None,
    token_ids: Positions | None = None,
    layers: Selection | None = None,
    heads: Positions | None = None,
    edges: list[EdgeArg] | None = None,
    tokens: list[Index | str] | None = None,
    top_k: Index = 10,
    position: Index = -1,
    include_patterns: bool = False,
    specifications: list[SpecificationArg] | None = None,
    show_progress: bool = False,
    device: str = "cpu",
) -> Steps[dict[str, Any]]:
    """What the next-token distribution is when edges of attention are removed before the softmax.

    Args:
        prompt: a text; this, `messages` (put through the chat template) and `token_ids` exclude each other.
        layers: one, a list, a range as "3:7" or {"start", "stop"}, or "all"; None is the middle one.
        heads: None is all.
        edges: [query, key] each; a side is a position, a range or "*", negative numbers count from the end; None is
            [[-1, 0]].
        tokens: whose logits are compared, by id or by a text of one token; None is the baseline's most likely one.
        top_k: how many of the tokens whose probability changed most are returned.
        position: whose next-token distribution is compared.
        include_patterns: also return the attention of the cut heads at the cut queries.
        specifications: run these instead, as `knockout_sweep` does, and return what it returns.

    Returns:
        model_id, n_layers, n_heads, hidden_size, layers, heads, knockout_edges (negative numbers resolved), position,
        token_ids and tokens (of the prompt);
        kl_divergence: Σ p ln(p/q) in nats, p before and q after;
        logit_diff: token, token_id, value (before − after: positive where the edges supported the token);
        top_changed: rank, token_id, token, baseline_prob, ablated_prob, abs_diff;
        patterns: for each layer, heads, queries, before and after `[heads, query, key]`; empty unless asked for.
    """
    if specifications is not None:
        _refuse_with_specifications(layers=layers, heads=heads, edges=edges)
        if include_patterns:
            reason = "include_patterns and specifications exclude each other: a sweep returns no patterns"
            raise InvalidArgument(reason, param="include_patterns")
        given = {"prompt": prompt, "messages": messages, "token_ids": token_ids, "tokens": tokens}
        return (yield from knockout_sweep.function(session, specifications, **given, position=position))
    model, ids = session.model, given_tokens(session.model, prompt, messages, token_ids)
    at = _position(position, len(ids))
    chosen = _knockout(model, {"layers": layers, "heads": heads, "edges": edges}, len(ids))
    asked = None if tokens is None else _asked(model, tokens)
    if top_k < 1:
        raise checks.out_of_range("top_k", top_k, "at least 1 is expected")
    (outcome,) = run_knockouts(model, ids, [chosen], at)
    yield Progress(1, 1)
    found = patterns(model, ids, chosen) if include_patterns else []
    return {
        **_setting(model, ids, at),
        **_described(model, chosen, len(ids)),
        **_compared(model, outcome, asked or _default_tokens(outcome), top_k),
        "patterns": [_on_device(rows, device) for rows in found],
    }


@operation(path="interventions/knockout_sweep")
def knockout_sweep(
    session: "LocalSession",
    specifications: list[SpecificationArg],
    prompt: str | None = None,
    *,
    messages: list[Message] | None = None,
    token_ids: Positions | None = None,
    tokens: list[Index | str] | None = None,
    position: Index = -1,
    show_progress: bool = False,
) -> Steps[dict[str, Any]]:
    """Many knockouts of one prompt, as rows of shared batches.

    Args:
        specifications: {"layers", "heads", "edges"} each; what is left out is as in `knockout`, as are the others.

    Returns:
        model_id, n_layers, n_heads, hidden_size, position, token_ids and tokens (of the prompt); logit_tokens: the
        tokens whose logits are compared, with their ids; rows: for each specification layers, heads, knockout_edges,
        kl_divergence, logit_diff (one value for each of logit_tokens) and top_change (the token that changed most).
    """
    model, ids = session.model, given_tokens(session.model, prompt, messages, token_ids)
    at = _position(position, len(ids))
    if not specifications:
        raise InvalidArgument("specifications is empty; name at least one knockout", param="specifications")
    chosen: list[Knockout] = []
    for number, one in enumerate(specifications):
        chosen.append(_specified(model, one, len(ids), number))
        if number % _CHECKED_AT_ONCE == _CHECKED_AT_ONCE - 1:
            yield Progress(0, len(specifications))  # thousands take seconds, in which others may use the model
    asked = None if tokens is None else _asked(model, tokens)
    rows: dict[int, dict[str, Any]] = {}
    for outcome in run_knockouts(model, ids, chosen, at):
        asked = _default_tokens(outcome) if asked is None else asked
        for index, row in zip(outcome.indices, _rows(model, outcome, asked), strict=True):
            rows[index] = _described(model, chosen[index], len(ids)) | row
        yield Progress(len(rows), len(chosen))
    return {
        **_setting(model, ids, at),
        "logit_tokens": [{"token": token_text(model, token), "token_id": token} for token in asked or []],
        "rows": [rows[index] for index in range(len(chosen))],
    }


# --- arguments


def _refuse_with_specifications(**others: object) -> None:
    for name, value in others.items():
        if value is not None:
            raise InvalidArgument(f"{name} and specifications exclude each other; put it into each of them", param=name)


def _position(position: int, length: int) -> int:
    if not -length <= position < length:
        allowed = f"the positions of this prompt are 0 to {length - 1}, and -1 to -{length} from its end"
        raise checks.out_of_range("position", position, allowed)
    return position % length


def _specified(model: TracedModel, one: Specification, length: int, number: int) -> Knockout:
    try:
        return _knockout(model, dict(one), length)
    except InvalidArgument as error:
        where = f"specifications.{number}"
        raise type(error)(f"{where}: {error.message}", param=f"{where}.{error.param}") from error


def _knockout(model: TracedModel, given: dict[str, Any], length: int) -> Knockout:
    """The knockout that is meant, checked against the model and the prompt."""
    dims = model.dimensions
    layers, heads, edges = (given.get(name) for name in ("layers", "heads", "edges"))
    given_layers = dims.n_layers // 2 if layers is None else layers
    chosen = sorted(set(selected(given_layers, dims.n_layers, "a layer", param="layers")))
    for head in heads or []:
        checks.in_range("heads", head, dims.n_heads, f"the heads of {model.id}")
    for name, value in (("layers", chosen), ("heads", heads), ("edges", edges)):
        if value is not None and not value:
            raise InvalidArgument(f"{name} is empty; it names at least one", param=name)
    parsed = tuple(EdgeSpec.parse(edge) for edge in ([LAST_TO_FIRST] if edges is None else edges))
    found = Knockout(tuple(chosen), None if heads is None else tuple(dict.fromkeys(heads)), parsed)
    check_knockout(model, found, length)
    return found


def _asked(model: TracedModel, tokens: Sequence[int | str]) -> list[int]:
    """The ids of tokens given by id or by text."""
    if not tokens:
        raise InvalidArgument("tokens is empty; name at least one, or leave it out", param="tokens")
    return [token_id_of(model, token, "tokens") for token in tokens]


# --- results


def _setting(model: TracedModel, ids: list[int], position: int) -> dict[str, Any]:
    dims = model.dimensions
    sizes = {"n_layers": dims.n_layers, "n_heads": dims.n_heads, "hidden_size": dims.d_model}
    texts = [token_text(model, token) for token in ids]
    return {"model_id": model.id, **sizes, "position": position, "token_ids": ids, "tokens": texts}


def _described(model: TracedModel, one: Knockout, length: int) -> dict[str, Any]:
    heads = list(range(model.dimensions.n_heads) if one.heads is None else one.heads)
    return {"layers": list(one.layers), "heads": heads, "knockout_edges": [edge.shown(length) for edge in one.edges]}


def _default_tokens(outcome: Outcome) -> list[int]:
    return [int(outcome.baseline.argmax())]


def _compared(model: TracedModel, outcome: Outcome, asked: list[int], count: int) -> dict[str, Any]:
    """What one knockout changed."""
    baseline, ablated = outcome.baseline, outcome.ablated[0]
    values = zip(asked, logit_difference(baseline, ablated, asked).tolist(), strict=True)
    return {
        "kl_divergence": float(kl_divergence(baseline, ablated)),
        "logit_diff": [
            {"token": token_text(model, token), "token_id": token, "value": value} for token, value in values
        ],
        "top_changed": [
            {"rank": one.rank, "token_id": one.token_id, "token": token_text(model, one.token_id)} | vars(one)
            for one in top_changed(baseline, ablated, count)
        ],
    }


def _on_device(rows: Rows, device: str) -> dict[str, Any]:
    return vars(rows) | {"before": on_device(rows.before, device), "after": on_device(rows.after, device)}


def _rows(model: TracedModel, outcome: Outcome, asked: list[int]) -> list[dict[str, Any]]:
    """What a batch says of each of its knockouts."""
    baseline = outcome.baseline.expand_as(outcome.ablated)
    p, q = (logits.double().softmax(-1) for logits in (baseline, outcome.ablated))
    changed = (p - q).abs().argmax(-1, keepdim=True)
    columns = {
        "kl_divergence": kl_divergence(baseline, outcome.ablated),
        "logit_diff": logit_difference(baseline, outcome.ablated, asked),
        "token_id": changed[:, 0],
        "baseline_prob": p.gather(-1, changed)[:, 0],
        "ablated_prob": q.gather(-1, changed)[:, 0],
    }
    names = list(columns)
    rows = []
    for values in zip(*(column.tolist() for column in columns.values()), strict=True):
        row = dict(zip(names, values, strict=True))
        change = {name: row.pop(name) for name in names[2:]}
        change |= {"token": token_text(model, change["token_id"])}
        rows.append(row | {"top_change": change | {"abs_diff": abs(change["baseline_prob"] - change["ablated_prob"])}})
    return rows
