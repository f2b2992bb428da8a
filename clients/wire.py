"""What a client sends and how it reads the answer, without any input or output of its own.

Both clients share this: `Call` is one request, `Answer` is fed with the pieces of a response, and `Exchange` decides
after a failure whether the call is made again. That is done only for what is safe to repeat, when the connection could
not be made or broke off, or when the server asks to come back (429 or 503 with `Retry-After`), a few times, and never
once progress was reported: whoever has seen half of the work done is told that it broke off.
"""

import json
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import httpx

from attribution.envelope import MEDIA_TYPE, PROGRESS_TYPE, Packed, Unpacker, has_tensor, pack
from attribution.errors import BadEnvelope, ServerUnreachable, SightlineError
from attribution.operation import Operation, Progress

JSON_TYPE = "application/json"
RETRIES = 3
_LONGEST_WAIT = 30.0
_MAX_HEADER_BYTES = 1024**3  # of answers: what a dataset's tokens may take
_SHOWN = 300


@dataclass(frozen=True)
class Call:
    """One request; it can be sent again.

    Attributes:
        name: what is called, for messages.
        safe: whether it may be sent again by itself.
    """

    name: str
    method: str
    path: str
    body: bytes | Packed | None = None
    accept: str = JSON_TYPE
    safe: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """The headers that belong to the body and the answer."""
        headers = {"Accept": self.accept, "Accept-Encoding": "identity"}
        if isinstance(self.body, Packed):
            return headers | {"Content-Type": MEDIA_TYPE, "Content-Length": str(self.body.length)}
        return headers if self.body is None else headers | {"Content-Type": JSON_TYPE}

    async def chunks(self) -> AsyncIterator[bytes | memoryview]:
        """A body of tensors for a client that does not block."""
        assert isinstance(self.body, Packed)
        for chunk in self.body:
            yield chunk


def get(path: str, name: str) -> Call:
    """A call that only reads."""
    return Call(name, "GET", path, safe=True)


def post(path: str, name: str, body: Mapping[str, Any]) -> Call:
    """A call with JSON that is not repeated."""
    return Call(name, "POST", path, json.dumps(body).encode())


def status_path(model: str | None) -> str:
    """The path of the status of a model."""
    return "/attribution/status" + ("" if model is None else f"?{urlencode({'model': model})}")


def call_of(operation: Operation[..., Any], arguments: Mapping[str, Any], model: str | None, progress: bool) -> Call:
    """An operation as a request: what the caller gave, and nothing else."""
    named = model is not None and operation.of_model
    sent = dict(arguments) | ({"model": model} if named else {})
    accept = PROGRESS_TYPE if operation.long and progress else MEDIA_TYPE
    return Call(operation.name, "POST", f"/{operation.path}", _body(sent), accept, operation.safe)


def _body(sent: dict[str, Any]) -> bytes | Packed:
    if has_tensor(sent):
        return pack(sent)
    try:
        return json.dumps(sent, allow_nan=False).encode()
    except ValueError:  # NaN travels in an envelope only
        return pack(sent)


class Answer:
    """Reads one response: `feed` each piece, then `finish`. Tensors are filled while it comes.

    Attributes:
        progress: the last that was told, None when nothing was.
        retry_after: the seconds after which the server asks to come back, None when it does not.
    """

    def __init__(self, url: str, status: int, headers: Mapping[str, str], tell: Callable[[Progress], None]) -> None:
        self.progress: Progress | None = None
        self.retry_after = _seconds(headers.get("retry-after")) if status in (429, 503) else None
        self._url, self._status, self._tell = url, status, tell
        self._kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        self._text = bytearray()
        self._unpacker = self._new_unpacker() if status == 200 and self._kind == MEDIA_TYPE else None

    def feed(self, chunk: bytes) -> None:
        """Take the next piece.

        Raises:
            SightlineError: of the class that the server raised, when that stands in a line of a progress stream.
            BadEnvelope: the answer is damaged.
        """
        if self._unpacker is not None:
            self._unpacker.feed(chunk)
            return
        self._text += chunk
        while self._status == 200 and self._kind == PROGRESS_TYPE and self._unpacker is None and b"\n" in self._text:
            line, _, rest = self._text.partition(b"\n")
            self._text = rest
            self._take_line(bytes(line))

    def finish(self) -> Any:
        """What the operation returned.

        Raises:
            SightlineError: of the class that the server raised; or saying that the answer is none of Sightline's.
            BadEnvelope: the answer is not whole.
        """
        if self._unpacker is not None:
            return self._unpacker.finish()
        if self._status == 200 and self._kind == PROGRESS_TYPE:
            raise BadEnvelope("the answer ends before its result")
        try:
            value = json.loads(self._text)
        except ValueError:
            raise self._foreign() from None
        if self._status != 200:
            raise error_of(value) or self._foreign()
        return value

    def _take_line(self, line: bytes) -> None:
        try:
            value = json.loads(line)
            if "progress" in value:
                self.progress = Progress(**value["progress"])
        except (ValueError, TypeError) as error:
            raise BadEnvelope(f"a line of the answer is damaged: {line[:80]!r}") from error
        if self.progress is not None and "progress" in value:
            self._tell(self.progress)
        elif "result" in value:
            self._unpacker = self._new_unpacker()
            self._unpacker.feed(bytes(self._text))
        else:
            raise error_of(value) or self._foreign()

    def _new_unpacker(self) -> Unpacker:
        return Unpacker(max_header=_MAX_HEADER_BYTES)

    def _foreign(self) -> SightlineError:
        shown = " ".join(bytes(self._text[:_SHOWN]).decode(errors="replace").split()) or "nothing"
        return SightlineError(f"{self._url} answered {self._status}, and not as a Sightline server does: {shown}")


class Exchange:
    """One call, with the attempts that it takes."""

    def __init__(self, call: Call, url: str, retries: int) -> None:
        self.call, self._url, self._left = call, url, retries
        self.failures = (SightlineError, httpx.TransportError)
        """What `pause_after` judges."""
        self._answer: Answer | None = None
        self._pause = 0.25

    def answer(self, status: int, headers: Mapping[str, str], tell: Callable[[Progress], None]) -> Answer:
        """The reader of the response that has come."""
        self._answer = Answer(self._url + self.call.path, status, headers, tell)
        return self._answer

    def pause_after(self, failure: SightlineError | httpx.TransportError) -> float:
        """How many seconds to wait before the next attempt.

        Raises:
            SightlineError: the failure, when there is to be none.
        """
        answer, self._answer = self._answer, None
        progress = None if answer is None else answer.progress
        pause = self._wanted_pause(failure, answer)
        if pause is None or progress is not None or not self.call.safe or not self._left or pause > _LONGEST_WAIT:
            if isinstance(failure, SightlineError):
                raise failure
            raise _unreachable(self._url, self.call, failure, progress) from failure
        self._left -= 1
        return pause

    def _wanted_pause(self, failure: Exception, answer: Answer | None) -> float | None:
        if isinstance(failure, SightlineError):
            return None if answer is None else answer.retry_after
        waited = isinstance(failure, httpx.TimeoutException) and not isinstance(failure, httpx.ConnectTimeout)
        pause, self._pause = self._pause * random.uniform(0.8, 1.2), self._pause * 2
        return None if waited else pause


def error_of(body: Any) -> SightlineError | None:
    """The error in the body of a refusal, of the class registered for its code; None when there is none in it."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return None
    known = classes_by_code().get(str(error.get("code")))
    if known is None:
        return SightlineError(f"{error['message']} (code {error.get('code')!r})", param=error.get("param"))
    return known(error["message"], param=error.get("param"))


def classes_by_code() -> dict[str, type[SightlineError]]:
    """The classes of the tree in `attribution.errors`, by the code under which they travel."""
    return {one.code: one for one in _tree(SightlineError)}


def _tree(root: type[SightlineError]) -> Iterator[type[SightlineError]]:
    for one in root.__subclasses__():
        yield from _tree(one)
    yield root


def _unreachable(url: str, call: Call, failure: httpx.TransportError, progress: Progress | None) -> ServerUnreachable:
    reason = str(failure) or type(failure).__name__
    if isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol):
        return ServerUnreachable(
            f"no server answers at {url} ({reason}); start one with 'sightline serve', or give the url of one"
        )
    if isinstance(failure, httpx.TimeoutException):
        return ServerUnreachable(f"{url} sent nothing of {call.name} for as long as timeout allows; timeout=None waits")
    done = "" if progress is None else f" after {progress.done} of {progress.total}"
    again = "it can be called again" if call.safe else "it may have been carried out"
    if progress is not None and call.safe:
        again += ": samples that are stored by now are not run again"
    return ServerUnreachable(f"the connection to {url} broke off{done} of {call.name} ({reason}); {again}")


def _seconds(header: str | None) -> float | None:
    """A `Retry-After` in seconds; a date is not understood."""
    return float(header) if header is not None and header.isdigit() else None
