"""One script for a graph, with a `LocalSession` and with a `ModelClient`: the same numbers, the same errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attribution import (
    Graph,
    LocalSession,
    Node,
    attribute_attn_weights,
    attribute_residual,
    attribute_step,
    eliminate,
    faithfulness,
    faithfulness_curves,
    get_attn_weights,
    get_head_output,
    get_hidden_states,
    mr,
    topk_md,
)
from attribution.errors import SampleMismatch, SightlineError
from clients import ModelClient
from puzzles import Result, demo_model_path, gen_puzzle
from tests.server.support import serve

SEEDS = range(3)


@contextmanager
def remote(folder: Path) -> Iterator[ModelClient]:
    with serve(folder) as served, ModelClient("http://testserver", http_client=served.http) as client:
        client.load_model("demo")
        yield client


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalSession, ModelClient]]:
    with remote(tmp_path_factory.mktemp("remote")) as client:
        yield LocalSession("demo", store=tmp_path_factory.mktemp("local")), client


@pytest.fixture(scope="module")
def puzzles() -> list[Result]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    return [Result.from_puzzle(gen_puzzle(n=3, m=3, n_train=2, seed=seed), tokenizer, seed) for seed in SEEDS]


def script(model: Any, results: list[Result]) -> dict[str, Tensor]:
    """A user's script, which does not know where the model is."""
    model.forward_results("graphs", results, show_progress=False)
    status = model.status()
    layers, heads = status["n_layers"], status["n_heads"]
    graph = Graph(len(results), status["hidden_size"])
    top = graph.add_node(Node(layers, 0, "lm_head"))
    found = {"step": mr(attribute_step)(results, model, [top])}
    layer, head, score = topk_md(found["step"][:, :heads], 1, transpose=True)[0]
    paths = [Node(layer, head, name) for name in ("attn_q", "attn_k", "attn_v")]
    for path in paths:
        graph.add_node(path, [top], [score])
    mlp = graph.add_node(Node(layer - 1, heads, "mlp_i"), [top, *paths])
    found["paths"] = mr(attribute_step)(results, model, [mlp, *paths], steps=2)
    found["residual"] = mr(attribute_residual)(results, model, [mlp, top], from_layer=0, to_layer=layer - 1)
    found["aw"], found["aa"] = attribute_attn_weights(results[1], model, layer, head, [top])
    found["stream"] = get_hidden_states(model, results[0], layer=1, pos_ids=[3, 1])
    found["pattern"] = get_attn_weights(model, results[0], layer=layer, head=head)
    found["written"] = get_head_output(model, results[0], layer=layer, head=head)
    faithful = faithfulness(graph, results, model)
    found["kept"] = torch.tensor([faithful.kept, faithful.lost])
    curves = faithfulness_curves([(3, 1), (0, 2)], results, model, draws=2)
    found |= {"curves": curves.graph, "gradient": curves.gradient, "random": curves.random}
    order = eliminate(results, model, 1, among=[(0, 2), (1, 3), (3, 1)]).order
    found["order"] = torch.tensor(order, dtype=torch.float32)
    return found | {repr(node): node.grad for node in graph.nodes}


def test_the_same_script_gives_the_same_arrays(
    sessions: tuple[LocalSession, ModelClient], puzzles: list[Result]
) -> None:
    local, remotely = (script(session, puzzles) for session in sessions)
    assert local.keys() == remotely.keys()
    assert len(local) == 13 + 5
    for name, expected in local.items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(remotely[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_same_mistakes_are_refused_in_the_same_words(
    sessions: tuple[LocalSession, ModelClient], puzzles: list[Result]
) -> None:
    said = []
    for session in sessions:
        session.forward_results("graphs", puzzles, show_progress=False)
        Graph(3, session.status()["hidden_size"])
        head = Node(9, 0, "lm_head")
        calls = [
            lambda: head.backward(puzzles[0], session),  # noqa: B023
            lambda: get_attn_weights(session, puzzles[0], layer=99),  # noqa: B023
            lambda: mr(attribute_step)(puzzles, session, [head]),  # noqa: B023
        ]
        said.append([str(_raised(call)) for call in calls])
    assert said[0] == said[1]
    assert said[0][2].startswith("sample 0: layer of a node lm_head is 9")


def _raised(call: Any) -> SightlineError:
    with pytest.raises(SightlineError) as caught:
        call()
    return caught.value


def test_a_graph_of_the_server_goes_on_in_a_notebook(
    sessions: tuple[LocalSession, ModelClient], puzzles: list[Result], tmp_path: Path
) -> None:
    local, client = sessions
    script(client, puzzles)
    from attribution import graph_registry

    graph = graph_registry.current()
    script(local, puzzles)
    loaded = Graph.load(graph.save(tmp_path / "graph.json"), local)
    loaded.backward(puzzles[0], local, steps=2)
    assert [node.samples for node in loaded.nodes] == [[0]] * 5
    other = LocalSession("demo", store=tmp_path, dtype="bfloat16")
    with pytest.raises(SampleMismatch, match="bfloat16"):
        Graph.load(tmp_path / "graph.json", other)
