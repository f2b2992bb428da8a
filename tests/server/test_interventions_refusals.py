"""Interventions that are refused before anything is generated: which field, what was found, what to do."""

from typing import Any

import pytest

from attribution.features.sources import FeatureStore
from attribution.model.load import trace_model
from server.interventions import check_fields, check_interventions, declare_interventions
from server.schemas import ChatBody, InterventionBody
from tests.models import D_MODEL, VOCAB, tiny_model, tiny_tokenizer
from tests.server.support import HELLO, HELLO_TEXT, Served, error_of

ONES = [1.0] * D_MODEL
ADD = {"type": "add", "selector": "resid_post[1]", "vector": ONES}
SCALE = {"type": "scale", "selector": "resid_post[1]", "factor": 2}
ABLATE = {"type": "ablate", "selector": "z[1]"}
OUT = {"type": "project_out", "selector": "resid_post[1]", "vector": ONES}
CUT = {"type": "knockout", "layers": 1, "edges": [[-1, 0]]}


def without(intervention: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in intervention.items() if name not in names}


FIELDS: list[tuple[dict[str, Any], str, str]] = [
    ({"type": "steer", "selector": "resid_post[1]"}, "type", "'project_out', 'knockout' or 'feature'"),
    ({"selector": "resid_post[1]"}, "type", "Field required"),
    (ADD | {"colour": 1}, "colour", "unknown field"),
    (without(ADD, "selector"), "selector", "'add' needs 'selector'"),
    (without(ADD, "vector"), "vector", "'add' needs 'vector' or 'name'"),
    (ADD | {"name": "mood"}, "name", "'vector' or 'name', not both"),
    (ADD | {"factor": 2}, "factor", "'add' takes no 'factor'; it takes selector, positions, heads, vector, name"),
    (ADD | {"vector": ONES[1:]}, "vector", "47 numbers; the width of 'resid_post[1]' is 48"),
    (ADD | {"vector": []}, "vector", "0 numbers"),
    (ADD | {"vector": [*ONES[1:], "a"]}, "vector.47", "found 'a'"),
    (ADD | {"vector": [*ONES[1:], True]}, "vector.47", "found 'True'"),
    (ADD | {"vector": 1}, "vector", "list"),
    (ADD | {"strength": "strong"}, "strength", "strong"),
    (ADD | {"strength": True}, "strength", "True"),
    (ADD | {"normalise": "unit"}, "normalise", "'relative', 'preserve' or 'both'"),
    (ADD | {"normalise": "relative", "vector": [0] * D_MODEL}, "vector", "is 0 and has no direction"),
    (ADD | {"heads": [0]}, "heads", "'resid_post[1]' has no heads; the points with heads are q, k, v, z"),
    (ADD | {"selector": "z[1]", "heads": [0]}, "vector", "48 numbers; the width of one head of 'z[1]' is 10"),
    (ADD | {"selector": "z[1]"}, "vector", "the width of 'z[1]' is 60"),
    (ADD | {"selector": "logits"}, "vector", f"the width of 'logits' is {VOCAB}"),
    (without(SCALE, "factor"), "factor", "'scale' needs 'factor'"),
    (SCALE | {"vector": ONES}, "vector", "'scale' takes no 'vector'"),
    (SCALE | {"factor": None}, "factor", "'scale' needs 'factor'"),
    (ABLATE | {"mode": "median"}, "mode", "'zero' or 'mean'"),
    (ABLATE | {"mode": "mean"}, "mode", "needs 'dataset_id', whose stored samples are averaged, or 'value'"),
    (ABLATE | {"mode": "mean", "value": [1.0] * 60, "dataset_id": "x"}, "mode", "and not both"),
    (ABLATE | {"value": [1.0] * 60}, "value", "mode 'zero' takes no 'value'"),
    (ABLATE | {"mode": "mean", "value": [1.0] * 10}, "value", "10 numbers; the width of 'z[1]' is 60"),
    (ABLATE | {"mode": "mean", "value": 2.5}, "value", "a list of numbers, as many as the site is wide; found 2.5"),
    (ABLATE | {"mode": "mean", "value": [1.0] * 59 + ["a"]}, "value", "'a' is none; found '[1.0,"),
    (ABLATE | {"mode": "mean", "value": [True] * 60}, "value", "'True' is none; found '[True,"),
    (ABLATE | {"mode": "mean", "dataset_id": "../up"}, "dataset_id", "letters, digits"),
    (ABLATE | {"heads": [6]}, "heads", "the heads of 'z' are 0 to 5; found 6"),
    (ABLATE | {"heads": [-1]}, "heads", "0 to 5; found -1"),
    (ABLATE | {"selector": "v[1]", "heads": [2]}, "heads", "the key/value heads of 'v' are 0 to 1; found 2"),
    (ABLATE | {"heads": []}, "heads", "at least one head"),
    (ABLATE | {"heads": [1, 1]}, "heads", "none twice"),
    (ABLATE | {"heads": [1.5]}, "heads.0", "1.5"),
    (OUT | {"vector": [0.0] * D_MODEL}, "vector", "is 0 and has no direction"),
    (OUT | {"strength": 2}, "strength", "'project_out' takes no 'strength'"),
    (CUT | {"selector": "pattern[1]"}, "selector", "'knockout' takes no 'selector'"),
    (CUT | {"positions": "last"}, "positions", "the edges say which positions"),
    (without(CUT, "layers"), "layers", "'knockout' needs 'layers'"),
    (without(CUT, "edges"), "edges", "'knockout' needs 'edges'"),
    (CUT | {"edges": []}, "edges", "edges is empty"),
    (CUT | {"layers": []}, "layers", "layers is empty"),
    (CUT | {"edges": [[0]]}, "edges.0", "edges.0: an edge is [query, key]"),
    (CUT | {"heads": [6]}, "heads", "the heads are 0 to 5; found 6"),
]


@pytest.mark.parametrize(("intervention", "field", "said"), FIELDS, ids=lambda value: str(value)[:60])
def test_a_field_that_is_wrong_is_named(house: Served, qwen: str, intervention: dict[str, Any], field: str, said: str):
    steps = house.steps(qwen)
    answer = house.post(body(qwen, SCALE, intervention))
    error = error_of(answer)
    assert (answer.status_code, error["param"], error["type"]) == (
        400,
        f"interventions.1.{field}",
        "invalid_request_error",
    )
    assert said in error["message"]
    assert house.steps(qwen) == steps, "nothing was generated"


def body(model: str, *interventions: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": HELLO, "max_tokens": 7, "interventions": list(interventions)} | more


OTHERS: list[tuple[dict[str, Any], int, str, str, str]] = [
    (SCALE | {"selector": "pattern[1]"}, 400, "bad_selector", "selector", "an intervention of type 'knockout'"),
    (SCALE | {"selector": "resid_post[3]"}, 400, "bad_selector", "selector", "0 to 2"),
    (SCALE | {"selector": "resid_lost[1]"}, 400, "bad_selector", "selector", "resid_lost"),
    (SCALE | {"selector": "model.output"}, 400, "bad_selector", "selector", "has no tensor at its output"),
    (SCALE | {"positions": "first"}, 400, "bad_positions", "positions", "all, prompt, generated, last"),
    (SCALE | {"positions": {"start": 28}}, 400, "bad_positions", "positions", "select no token of this request"),
    (SCALE | {"positions": {"stop": 29}}, 400, "bad_positions", "positions", "has at most 28 positions"),
    (CUT | {"layers": 3}, 422, "out_of_range", "layers", "0 to 2"),
    (CUT | {"edges": [[28, 0]]}, 422, "out_of_range", "edges", "0 to 27"),
    (CUT | {"edges": [[-23, 0]]}, 422, "out_of_range", "edges", "-22"),
    (CUT | {"edges": [[3, 4]]}, 422, "invalid_argument", "edges", "lies in the future"),
    (CUT | {"edges": [["*", 0]]}, 422, "no_key_left", "edges", "query 0 would have no key left"),
    (CUT | {"edges": [[25, "0:26"]]}, 422, "no_key_left", "edges", "query 25 would have no key left"),
    (CUT | {"edges": [["-1:", "*"]]}, 422, "no_key_left", "edges", "query 21"),
]


@pytest.mark.parametrize(("intervention", "status", "code", "field", "said"), OTHERS, ids=lambda value: str(value)[:60])
def test_a_place_a_window_or_an_edge_that_cannot_be_is_refused(
    house: Served, qwen: str, intervention: dict[str, Any], status: int, code: str, field: str, said: str
):
    answer = house.post(body(qwen, intervention, stream=True))
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (status, code, f"interventions.0.{field}")
    assert said in error["message"]


def test_two_knockouts_that_together_leave_a_query_no_key_are_refused(house: Served, qwen: str):
    first, second = CUT | {"edges": [[9, "0:5"]]}, CUT | {"edges": [[9, "5:10"]], "heads": [2], "layers": "0:2"}
    assert house.post(body(qwen, first, second | {"layers": [0, 2]})).status_code == 200, "in other layers"
    error = error_of(house.post(body(qwen, first, second)))
    assert (error["code"], error["param"]) == ("no_key_left", "interventions.1.edges")


def test_a_sliding_layer_counts_the_keys_that_it_sees(house: Served):
    gemma = house.names["gemma2"]  # layers 0 and 2 see five positions
    far = CUT | {"edges": [[24, "20:25"]]}
    assert house.post(body(gemma, far | {"layers": 1})).status_code == 200
    error = error_of(house.post(body(gemma, far | {"layers": [1, 2]})))
    assert error["code"] == "no_key_left"
    assert "layer 2, which sees the last 5 positions" in error["message"]


def test_an_endless_chat_is_checked_as_quickly_as_a_short_one():
    model = trace_model("long", tiny_model("qwen3", max_position_embeddings=10**6), tiny_tokenizer())
    request = ChatBody(model="long", messages=HELLO, interventions=[CUT | {"edges": [["1:", 0], ["-1:", "1:4"]]}])
    check_interventions(model, declare_interventions(model, request, FeatureStore()), 22, 10**6 - 22)
    empty = ChatBody(model="long", messages=HELLO, interventions=[CUT | {"edges": [["40:", "0:"]]}])
    with pytest.raises(Exception, match="query 40 would have no key left"):
        check_interventions(model, declare_interventions(model, empty, FeatureStore()), 22, 10**6 - 22)


def test_the_stream_before_the_mlp_and_what_its_norm_reads_are_not_changed_together(house: Served, qwen: str):
    norm = SCALE | {"selector": "model.layers[1].post_attention_layernorm.input"}
    error = error_of(house.post(body(qwen, norm, SCALE | {"selector": "resid_mid[1]"})))
    assert (error["code"], error["param"]) == ("invalid_request", "interventions.1.selector")
    assert "use the point resid_mid" in error["message"]


def test_a_module_that_runs_several_times_is_not_changed():
    plain = tiny_model("qwen3")
    plain.model.layers[2].mlp.act_fn = plain.model.layers[0].mlp.act_fn
    model = trace_model("shared", plain, tiny_tokenizer())
    change = SCALE | {"selector": "model.layers[0].mlp.act_fn.output"}
    with pytest.raises(Exception, match="runs 2 times in one forward pass") as refused:
        declare_interventions(model, ChatBody(model="shared", messages=HELLO, interventions=[change]), FeatureStore())
    assert (refused.value.code, refused.value.param) == ("bad_selector", "interventions.0.selector")


def test_a_baseline_needs_interventions_and_tokens(house: Served, qwen: str):
    error = error_of(house.post(body(qwen, baseline=True) | {"interventions": []}))
    assert (error["code"], error["param"]) == ("invalid_request", "baseline")
    scoring = {"model": qwen, "prompt": HELLO_TEXT, "max_tokens": 0, "interventions": [SCALE], "baseline": True}
    error = error_of(house.post(scoring, "/v1/completions"))
    assert error["param"] == "baseline"
    assert "max_tokens is 0" in error["message"]


def test_too_many_interventions_are_refused(house: Served, qwen: str):
    error = error_of(house.post(body(qwen, *([SCALE] * 65))))
    assert error["param"] == "interventions"


def test_null_is_a_field_that_was_left_out():
    one = InterventionBody(type="scale", selector="logits", factor=0.0, heads=None, vector=None)
    assert one.given == ("selector", "factor")
    check_fields(one)


def test_a_model_without_points_is_edited_by_module_paths_alone():
    model = trace_model("bare", tiny_model("qwen3"), tiny_tokenizer())
    object.__setattr__(model, "family", None)
    object.__setattr__(model, "note", "nobody knows it")
    path = SCALE | {"selector": "model.layers[1].output"}
    (declared,) = declare_interventions(
        model, ChatBody(model="bare", messages=HELLO, interventions=[path]), FeatureStore()
    )
    assert declared.layers == [None]
    for change, code in ((SCALE, "bad_selector"), (CUT, "unsupported_model")):
        with pytest.raises(Exception, match="nobody knows it") as refused:
            declare_interventions(model, ChatBody(model="bare", messages=HELLO, interventions=[change]), FeatureStore())
        assert refused.value.code == code
