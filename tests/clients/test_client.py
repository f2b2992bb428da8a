"""What a client sends, and how it reads answers and errors; the transport is a fake."""

import gzip

import httpx
import pytest
import torch

from attribution.envelope import MEDIA_TYPE, PROGRESS_TYPE, pack
from attribution.errors import (
    BadEnvelope,
    InvalidArgument,
    ModelAmbiguous,
    ModelNotFound,
    OutOfMemory,
    SightlineError,
)
from clients import ModelClient
from clients.options import http_options
from clients.wire import classes_by_code, error_of
from tests.clients.fakes import OK, refused, stream, tensors


def test_only_what_was_given_is_sent_and_the_callers_own_is_not(ask):
    client, server = ask(tensors(torch.zeros(1)))
    client.get_hidden_states("set", 7, layer=2, device="cpu")
    assert server.sent() == {"dataset_id": "set", "sample_id": 7, "layer": 2}
    request = server.requests[0]
    assert (request.method, request.url.path) == ("POST", "/attribution/get_hidden_states")
    assert (request.headers["content-type"], request.headers["accept"]) == ("application/json", MEDIA_TYPE)
    assert "authorization" not in request.headers


def test_tensors_go_in_an_envelope_whose_length_is_announced(ask):
    client, server = ask(tensors(torch.zeros(1)))
    grad = torch.randn(1, 1, 4).bfloat16()
    client.attribute_attn_weights("set", 0, 1, 2, [grad], pos_ids=[3])
    assert server.requests[0].headers["content-length"] == str(len(server.requests[0].content))
    assert "transfer-encoding" not in server.requests[0].headers
    assert torch.equal(server.sent()["downstream_grads"][0], grad)


def test_the_key_and_the_model_are_sent(ask):
    client, server = ask(OK, api_key="sesame", model="m")
    client.list_cached_samples("set")
    assert server.requests[0].headers["authorization"] == "Bearer sesame"
    assert server.sent()["model"] == "m"
    client.status()
    assert str(server.requests[1].url).endswith("/attribution/status?model=m")


def test_the_model_is_the_one_loaded_last_until_it_is_unloaded(ask):
    client, server = ask(httpx.Response(200, json={"ok": True, "model": "org/new"}))
    client.load_model("new", quantization="nf4", dtype="bfloat16")
    assert server.sent() == {"model_id": "new", "device_map": "auto", "quantization": "nf4", "dtype": "bfloat16"}
    assert client.model == "org/new"
    client.unload_model()
    assert server.sent() == {"model_id": "org/new"}
    assert client.model is None


@pytest.mark.parametrize(("loaded", "error"), [([], ModelNotFound), (["a", "b"], ModelAmbiguous)])
def test_what_to_unload_is_not_guessed(ask, loaded: list[str], error: type[SightlineError]):
    client, server = ask(httpx.Response(200, json={"loaded_models": loaded}))
    with pytest.raises(error):
        client.unload_model()
    assert len(server.requests) == 1


def test_a_wrong_argument_and_a_device_that_is_not_there_fail_without_a_request(ask):
    client, server = ask(OK)
    with pytest.raises(InvalidArgument, match="layer: an integer is expected"):
        client.get_hidden_states("set", 0, layer=1.5)
    with pytest.raises(InvalidArgument, match="device 'cuda:99' cannot be used"):
        client.get_hidden_states("set", 0, layer=1, device="cuda:99")
    assert not server.requests


@pytest.mark.parametrize("code", classes_by_code())
def test_every_error_of_the_tree_crosses_with_class_text_and_argument(ask, code: str):
    raised = classes_by_code()[code]("what was wrong", param="layer")
    client, _ = ask(refused(raised))
    with pytest.raises(SightlineError) as error:
        client.list_cached_samples("set")
    assert type(error.value) is type(raised)
    assert (error.value.message, error.value.param) == ("what was wrong", "layer")


def test_the_tree_has_one_class_for_each_code():
    def tree(root: type[SightlineError]) -> list[type[SightlineError]]:
        return [root, *(one for child in root.__subclasses__() for one in tree(child))]

    assert len(set(tree(SightlineError))) == len(classes_by_code())


def test_a_code_that_is_not_known_is_still_an_error_of_ours():
    error = error_of({"error": {"message": "later", "type": "x", "param": None, "code": "of_the_future"}})
    assert type(error) is SightlineError
    assert error.message == "later (code 'of_the_future')"


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(502, text="<html><h1>Bad Gateway</h1></html>"),
        httpx.Response(200, text="<html><h1>Bad Gateway</h1></html>"),
        httpx.Response(500, json={"detail": "<h1>Bad Gateway</h1>"}),
        httpx.Response(502, json=["<h1>Bad Gateway</h1>"]),
        httpx.Response(302, headers={"location": "/login"}, text="<h1>Bad Gateway</h1>"),
    ],
)
def test_what_is_no_answer_of_ours_is_shown(ask, answer: httpx.Response):
    client, _ = ask(answer)
    with pytest.raises(SightlineError, match=f"answered {answer.status_code}, and not as .* Gateway"):
        client.list_cached_samples("set")


def test_an_answer_that_a_proxy_compressed_is_read(ask):
    client, _ = ask(OK)

    def compress(_: httpx.Request) -> httpx.Response:
        packed = gzip.compress(b"".join(pack(torch.ones(3))))
        headers = {"content-type": MEDIA_TYPE, "content-encoding": "gzip"}
        return httpx.Response(200, stream=httpx.ByteStream(packed), headers=headers)

    client._http = httpx.Client(transport=httpx.MockTransport(compress))
    assert torch.equal(client.get_hidden_states("set", 0, 1), torch.ones(3))


def test_progress_is_read_and_the_result_after_it(ask):
    rest = b"".join(pack({"count": 2, "x": torch.ones(2)}))
    said = ({"progress": {"done": 1, "total": 2}}, {"progress": {"done": 2, "total": 2}}, {"result": True})
    client, server = ask(stream(*said, rest=rest))
    assert client.batch_forward("set", ["a", "b"])["count"] == 2
    assert server.requests[0].headers["accept"] == PROGRESS_TYPE
    client, server = ask(tensors({"count": 2}))
    client.batch_forward("set", ["a", "b"], show_progress=False)
    assert server.requests[0].headers["accept"] == MEDIA_TYPE


def test_an_error_after_progress_is_raised(ask):
    client, _ = ask(stream({"progress": {"done": 1, "total": 2}}, OutOfMemory("none left").body()))
    with pytest.raises(OutOfMemory, match="none left"):
        client.batch_forward("set", ["a", "b"])


@pytest.mark.parametrize(
    "answer",
    [
        tensors(torch.ones(8)).content[:-4],
        tensors(torch.ones(8)).content[:20],
        b"",
    ],
)
def test_an_answer_that_is_not_whole_is_no_result(ask, answer: bytes):
    client, _ = ask(httpx.Response(200, content=answer, headers={"content-type": MEDIA_TYPE}))
    with pytest.raises(BadEnvelope, match="ends after"):
        client.get_hidden_states("set", 0, 1)
    client, _ = ask(stream({"progress": {"done": 1, "total": 2}}))
    with pytest.raises(BadEnvelope, match="before its result"):
        client.batch_forward("set", ["a"])
    client, _ = ask(httpx.Response(200, content=b"{]\n", headers={"content-type": PROGRESS_TYPE}))
    with pytest.raises(BadEnvelope, match="is damaged"):
        client.batch_forward("set", ["a"])


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "", "http://x:port"])
def test_a_url_that_is_none_is_refused(url: str):
    with pytest.raises(InvalidArgument, match="url is like http://localhost:8000"):
        ModelClient(url)


def test_proxies_are_for_other_machines_and_waiting_has_no_bound_unless_one_is_given():
    for here in ("http://localhost:1", "http://127.0.0.1:1", "http://[::1]:1"):
        assert http_options(here, None)["trust_env"] is False
    assert http_options("http://gpu.example:1", None)["trust_env"] is True
    assert http_options("http://localhost", None)["timeout"] == httpx.Timeout(None, connect=10.0)
    assert http_options("http://localhost", 5.0)["timeout"] == httpx.Timeout(5, connect=10.0)


def test_a_client_closes_its_own_connections_and_not_those_it_was_given(ask):
    client, _ = ask(OK)
    given = client._http
    client.close()
    assert not given.is_closed
    with ModelClient() as own:
        pass
    assert own._http.is_closed
