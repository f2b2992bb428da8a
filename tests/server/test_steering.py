"""Steering vectors over HTTP: one store for all models, whatever of them is loaded."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from attribution.envelope import MEDIA_TYPE, unpack
from attribution.session import LocalSession
from tests.models import D_MODEL
from tests.server.support import Served, error_of, serve

BODY: dict[str, Any] = {"name": "calm", "positive": ["the rest", "in a while"], "negative": ["or"]}
BODY |= {"selector": "resid_post[1]", "overwrite": True}
PATH = "/steering/vectors"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def one(home: Path, folders: dict[str, Path]) -> Iterator[Served]:
    """A server with one model."""
    with serve(home, model=str(folders["qwen3"])) as served:
        yield served


def test_a_vector_is_computed_listed_fetched_and_deleted(one: Served, home: Path):
    made = one.post(BODY, PATH)
    assert made.status_code == 200, made.text
    assert (home / "store_vectors" / "calm.safetensors").is_file()
    assert one.http.get(PATH).json() == {"vectors": [made.json()], "count": 1}
    found = one.http.get(f"{PATH}/calm").json()
    vector = found.pop("vector")
    assert found == made.json()
    assert (vector["dtype"], vector["shape"]) == ("F32", [D_MODEL])
    assert torch.tensor(vector["data"]).norm() == pytest.approx(found["norms"][0], rel=1e-6)
    deleted = one.http.delete(f"{PATH}/calm").json()
    assert (deleted["deleted"], deleted["name"]) == (True, "calm")
    assert deleted["bytes_freed"] > 4 * D_MODEL
    assert one.http.get(PATH).json() == {"vectors": [], "count": 0}
    assert not (home / "store_vectors" / "calm.safetensors").exists()


def test_a_vector_comes_as_safetensors_when_that_is_asked_for(one: Served):
    one.post(BODY, PATH)
    answer = one.http.get(f"{PATH}/calm", headers={"Accept": MEDIA_TYPE})
    assert answer.headers["content-type"] == MEDIA_TYPE
    expected = one.http.get(f"{PATH}/calm").json()["vector"]["data"]
    assert torch.equal(unpack(answer.content)["vector"], torch.tensor(expected))


def test_the_vector_is_that_of_a_local_session(one: Served, folders: dict[str, Path], tmp_path: Path):
    one.post(BODY, PATH)
    local = LocalSession(str(folders["qwen3"]), store=tmp_path / "store")
    local.create_steering_vector(**BODY)
    theirs = one.http.get(f"{PATH}/calm").json()["vector"]["data"]
    assert torch.equal(local.get_steering_vector("calm")["vector"], torch.tensor(theirs))


@pytest.mark.parametrize("method", ["get", "delete"])
@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("absent", 404, "vector_not_found"), (".hidden", 422, "invalid_argument"), ("a b", 422, "invalid_argument")],
)
def test_what_is_not_there_or_no_name_is_refused(one: Served, method: str, name: str, status: int, code: str):
    answer = getattr(one.http, method)(f"{PATH}/{name}")
    assert answer.status_code == status
    assert error_of(answer)["code"] == code
    assert error_of(answer)["param"] == "name"


@pytest.mark.parametrize("name", ["..%2Fx", "..", "%2e%2e"])
def test_a_path_leads_nowhere_else(one: Served, home: Path, name: str):
    outside = home / "x.safetensors"
    outside.write_bytes(b"kept")
    assert one.http.delete(f"{PATH}/{name}").status_code >= 400
    assert outside.read_bytes() == b"kept"


def test_without_a_model_the_vectors_of_others_are_there(one: Served, home: Path, folders: dict[str, Path]):
    one.post(BODY, PATH)
    with serve(home / "other", no_model=True, vectors_dir=home / "store_vectors") as empty:
        assert [row["name"] for row in empty.http.get(PATH).json()["vectors"]] == ["calm"]
        assert empty.http.get(f"{PATH}/calm").json()["provenance"]["model"]["id"] == str(folders["qwen3"])
        refused = empty.post({"name": "calm"}, "/steering/get")
        assert error_of(refused)["code"] == "model_not_found"  # an operation runs on a model
        empty.http.post("/models/load", json={"model_id": str(folders["llama"])})
        mismatch = empty.post({"name": "calm"}, "/steering/get")
        assert mismatch.status_code == 409
        assert error_of(mismatch)["code"] == "vector_mismatch"


def test_a_server_with_a_key_asks_for_it(home: Path):
    with serve(home / "locked", no_model=True, api_key="secret") as locked:
        assert locked.http.get(PATH).status_code == 401
        assert locked.http.get(PATH, headers={"X-Api-Key": "secret"}).status_code == 200
