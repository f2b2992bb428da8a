"""The client to be awaited: the same answers, errors and attempts as the other one, against a real server."""

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from attribution.errors import InvalidArgument, QueueFull, SampleNotFound, ServerUnreachable
from attribution.operations import OPERATIONS
from attribution.results import SampleRef
from clients import AsyncModelClient, ModelClient
from tests.attribution.test_results import Row
from tests.clients.serving import over_socket
from tests.examples_of_operations import AT, HEAD, PROMPTS, grads
from tests.models import save_tiny


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The URL of a server with nothing loaded, and a model for it."""
    folder = tmp_path_factory.mktemp("async")
    with over_socket(folder, api_key="sesame") as (url, _):
        yield url, save_tiny("llama", folder / "model")


def run(url: str, work: Callable[[AsyncModelClient], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncModelClient(url, api_key="sesame", **options) as client:
            return await work(client)

    return asyncio.run(main())


def test_it_has_the_methods_of_the_other_client_and_all_are_awaited():
    public = {name for name in vars(ModelClient) if not name.startswith("_")}
    assert public == {name for name in vars(AsyncModelClient) if not name.startswith("_")}
    own = public - set(OPERATIONS)
    assert all(inspect.iscoroutinefunction(getattr(AsyncModelClient, name)) for name in own)
    for name in own - {"forward_results"}:
        one, other = (inspect.signature(getattr(owner, name)) for owner in (ModelClient, AsyncModelClient))
        assert list(one.parameters.values()) == list(other.parameters.values())


def test_it_loads_runs_and_unloads(server: tuple[str, Path]):
    url, model = server

    async def work(client: AsyncModelClient) -> None:
        assert (await client.status())["model_loaded"] is False
        assert (await client.load_model(str(model)))["n_layers"] == 3
        assert client.model == str(model)
        assert (await client.batch_forward("set", [PROMPTS[0], PROMPTS[1]]))["stored"] == 2
        states, pattern = await asyncio.gather(client.get_hidden_states(**AT), client.get_attn_weights(**HEAD))
        aw, _ = await client.attribute_attn_weights(**HEAD, downstream_grads=[grads(1, 3)])
        with ModelClient(url, api_key="sesame", model=str(model)) as other:
            assert torch.equal(states, other.get_hidden_states(**AT))
            assert torch.equal(pattern[0], aw)
        with pytest.raises(SampleNotFound, match="99"):
            await client.get_hidden_states(**AT | {"sample_id": 99})
        with pytest.raises(InvalidArgument, match="layer"):
            await client.get_hidden_states(**AT | {"layer": "x"})
        assert (await client.health())["loaded_models"] == [str(model)]
        assert [row["model"] for row in (await client.models())["loaded"]] == [str(model)]
        await client.unload_model()
        assert (await client.status())["model_loaded"] is False

    run(url, work)


def test_results_are_run_and_told_where_they_are(server: tuple[str, Path]):
    url, model = server
    rows = [Row(4, "hello"), Row(2, "there")]

    async def work(client: AsyncModelClient) -> None:
        await client.load_model(str(model))
        assert (await client.forward_results("rows", rows))["sample_ids"] == [4, 2]
        await client.unload_model()

    run(url, work)
    assert [row.outputs for row in rows] == [SampleRef("rows", 4), SampleRef("rows", 2)]


def test_where_nothing_listens_it_says_so_after_a_few_attempts(monkeypatch: pytest.MonkeyPatch):
    pauses, here, sleep = [], threading.get_ident(), asyncio.sleep

    async def pause(seconds: float) -> None:
        if threading.get_ident() == here:
            pauses.append(seconds)
        else:  # a server in another thread sleeps as it did
            await sleep(seconds)

    monkeypatch.setattr("clients.async_client.asyncio.sleep", pause)
    with pytest.raises(ServerUnreachable, match=r"no server answers at http://127\.0\.0\.1:9"):
        run("http://127.0.0.1:9", lambda client: client.health())
    assert len(pauses) == 3


def test_it_comes_back_when_the_server_asks_it_to():
    replies = [
        httpx.Response(429, json=QueueFull("full").body(), headers={"retry-after": "0"}),
        httpx.Response(200, json={"status": "ok"}),
    ]
    http = httpx.AsyncClient(transport=httpx.MockTransport(lambda _: replies.pop(0)))
    assert run("http://x", lambda client: client.health(), http_client=http) == {"status": "ok"}
    assert not replies


def test_the_wrong_key_is_refused(server: tuple[str, Path]):
    with ModelClient(server[0], api_key="x") as client:
        with pytest.raises(Exception, match="asks for its key") as error:
            client.status()
    assert type(error.value).__name__ == "Unauthorized"
