"""A client gives what a local session gives: the same tensors, values and errors, for every operation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attribution.envelope import has_tensor
from attribution.errors import SightlineError
from attribution.operation import Operation
from attribution.operations import OPERATIONS
from attribution.session import LocalSession
from clients import AsyncModelClient, ModelClient
from tests.clients.serving import over_socket
from tests.examples_of_operations import EXAMPLES, store_samples
from tests.models import save_tiny
from tests.server.support import serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def local(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalSession:
    return LocalSession(str(folder), store=tmp_path_factory.mktemp("local"), runs_dir=folder / "runs", dtype="bfloat16")


@pytest.fixture(scope="module")
def remote(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelClient]:
    home = tmp_path_factory.mktemp("remote")
    with serve(home, no_model=True, activations_dir=folder / "runs") as served:
        with ModelClient(http_client=served.http) as client:
            client.load_model(str(folder), dtype="bfloat16")
            yield client


@pytest.fixture
def both(local: LocalSession, remote: ModelClient) -> tuple[LocalSession, ModelClient]:
    """The two, with the same samples stored."""
    store_samples(local)
    store_samples(remote)
    return local, remote


def same(one: Any, other: Any, varies: tuple[str, ...] = ()) -> bool:
    """Whether two results are of one type and equal to the last bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(key in varies or same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def test_every_operation_has_an_example_and_is_a_method_on_both_sides_and_to_be_awaited():
    assert set(EXAMPLES) == set(OPERATIONS)
    for owner in (LocalSession, ModelClient, AsyncModelClient):
        assert {name: getattr(owner, name, None) for name in OPERATIONS} == OPERATIONS


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_client_gives_what_a_local_session_gives(name: str, both: tuple[LocalSession, ModelClient]):
    example = EXAMPLES[name]
    here, there = (getattr(session, name)(**example.arguments) for session in both)
    assert same(here, there, example.varies), (here, there)


def test_over_a_real_socket_it_is_the_same(local: LocalSession, folder: Path, tmp_path: Path):
    fresh = LocalSession(local.model, store=tmp_path / "local", runs_dir=folder / "runs")
    store_samples(fresh)
    with over_socket(tmp_path / "remote") as (url, _), ModelClient(url) as client:
        client.load_model(str(folder), dtype="bfloat16")
        store_samples(client)
        for name, example in EXAMPLES.items():
            if name in ("clear_cache", "clear_all_cache"):  # what follows reads what they delete
                continue
            here, there = (getattr(session, name)(**example.arguments) for session in (fresh, client))
            assert same(here, there, example.varies), name


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_client_raises_what_a_local_session_raises(name: str, both: tuple[LocalSession, ModelClient]):
    operation, example = OPERATIONS[name], EXAMPLES[name]
    for wrong in ({"nonsense": 1}, *example.bad):
        arguments = example.arguments | wrong
        here, there = (refusal(session, operation, arguments) for session in both)
        assert type(here) is type(there) is not SightlineError, wrong
        assert (here.message, here.param) == (there.message, there.param), wrong
        if not has_tensor(arguments):  # the server itself, without the checks of the client
            answer = both[1]._http.post(f"{both[1].url}/{operation.path}", json=arguments)
            assert (answer.status_code, answer.json()) == (here.status, here.body()), wrong


def refusal(session: LocalSession | ModelClient, operation: Operation, arguments: dict[str, Any]) -> SightlineError:
    try:
        session.run(operation, arguments)
    except SightlineError as error:
        return error
    raise AssertionError(f"{operation.name} took {arguments}")
