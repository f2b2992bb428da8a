"""When a call is made again, and when not; the transport is a fake."""

from collections.abc import Iterator

import httpx
import pytest

from attribution.envelope import PROGRESS_TYPE
from attribution.errors import (
    OutOfMemory,
    QueueFull,
    SampleNotFound,
    ServerUnreachable,
    ShuttingDown,
    SightlineError,
)
from tests.clients.fakes import OK, REFUSED, RESET, Reply, refused


@pytest.mark.parametrize(
    ("first", "pause"),
    [
        (REFUSED, 0.25),
        (RESET, 0.25),
        (httpx.RemoteProtocolError("closed"), 0.25),
        (httpx.ConnectTimeout("late"), 0.25),
        (refused(QueueFull("full"), retry_after="2"), 2),
        (refused(OutOfMemory("none"), retry_after="7"), 7),
    ],
)
def test_a_safe_call_is_made_again_after_a_pause(ask, first: Reply, pause: float):
    client, server = ask(first, OK)
    assert client.list_cached_samples("set") == {"sample_ids": [], "count": 0}
    assert len(server.requests) == 2
    assert server.pauses == [pytest.approx(pause, rel=0.21)]


def test_it_is_made_again_a_few_times_only_with_longer_pauses(ask):
    client, server = ask(REFUSED)
    with pytest.raises(ServerUnreachable, match=r"no server answers at http://localhost:8000 .*'sightline serve'"):
        client.list_cached_samples("set")
    assert len(server.requests) == 4
    assert server.pauses[0] < server.pauses[1] < server.pauses[2] < 1.3
    client, server = ask(REFUSED, retries=0)
    with pytest.raises(ServerUnreachable):
        client.health()
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (httpx.ReadTimeout("late"), ServerUnreachable),
        (refused(ShuttingDown("bye")), ShuttingDown),
        (refused(OutOfMemory("none")), OutOfMemory),
        (refused(QueueFull("full"), retry_after="3600"), QueueFull),
        (refused(QueueFull("full")), QueueFull),
        (refused(SampleNotFound("no"), retry_after="1"), SampleNotFound),
        (httpx.Response(500, text="x"), SightlineError),
    ],
)
def test_what_would_not_help_is_not_done_again(ask, reply: Reply, error: type[SightlineError]):
    client, server = ask(reply, OK)
    with pytest.raises(error):
        client.list_cached_samples("set")
    assert len(server.requests) == 1


@pytest.mark.parametrize("reply", [REFUSED, RESET, refused(QueueFull("full"), retry_after="1")])
def test_what_is_not_safe_is_never_done_twice(ask, reply: Reply):
    for call in (
        lambda client: client.clear_cache("set"),
        lambda client: client.clear_all_cache(),
        lambda client: client.load_model("x"),
    ):
        client, server = ask(reply, OK)
        with pytest.raises(SightlineError):
            call(client)
        assert len(server.requests) == 1


def test_a_broken_connection_says_what_may_have_happened(ask):
    client, _ = ask(RESET)
    with pytest.raises(
        ServerUnreachable, match=r"broke off of clear_cache \(reset by peer\); it may have been carried out"
    ):
        client.clear_cache("set")
    client, _ = ask(httpx.ReadTimeout(""), timeout=3.0)
    with pytest.raises(ServerUnreachable, match="sent nothing of list_cached_samples for as long as timeout allows"):
        client.list_cached_samples("set")


class Breaking(httpx.SyncByteStream):
    """A response that breaks off after its first pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        yield from self.pieces
        raise RESET


def test_once_progress_was_told_the_call_is_not_made_again_and_the_error_says_how_far_it_was(ask):
    client, _ = ask(OK)
    requests = []

    def breaks(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        line = b'{"progress": {"done": 3, "total": 8}}\n'
        return httpx.Response(200, stream=Breaking(line), headers={"content-type": PROGRESS_TYPE})

    client._http = httpx.Client(transport=httpx.MockTransport(breaks))
    with pytest.raises(ServerUnreachable, match=r"broke off after 3 of 8 of batch_forward .* are not run again"):
        client.batch_forward("set", ["a"] * 8)
    assert len(requests) == 1
