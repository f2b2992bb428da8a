"""Servers that many tests share; tests that change a server make their own."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import FAMILIES, save_tiny
from tests.server.support import Served, serve


@pytest.fixture(scope="session", autouse=True)
def _quick_collections() -> None:
    """Every unload collects garbage: what the libraries have made by now need not be looked at each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny model of each family."""
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


@pytest.fixture(scope="session")
def house(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with a model of each family; `names` are their ids."""
    with serve(tmp_path_factory.mktemp("house"), no_model=True) as served:
        for family, folder in folders.items():
            answer = served.http.post("/models/load", json={"model_id": str(folder)})
            assert answer.status_code == 200, answer.text
            served.names[family] = str(folder)
        yield served


@pytest.fixture(scope="session")
def qwen(house: Served) -> str:
    """The id of the shared Qwen3 model."""
    return house.names["qwen3"]
