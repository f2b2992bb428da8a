"""JSON and tensors in one safetensors blob: what carries tensors between a server and its clients.

A blob is 8 bytes (the header's length, little endian), a header in JSON, and the tensors' memory. The header says
dtype, shape and place of each tensor, and under `__metadata__` → "sightline" the value as JSON, with `{"$tensor": key}`
in place of a tensor and `{"$tuple": […]}` of a tuple. NaN and infinity are written as Python's json writes them.

Nothing is held twice: `pack` sends the memory of the tensors themselves, and `Unpacker`, which is fed with chunks as
they come, copies each to its place in a tensor. It believes nothing: the header is checked whole, against the bound and
against what was announced, before anything is allocated. `safetensors` reads what `pack` writes, and the other way.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attribution.envelope_header import DTYPES, METADATA, PLAIN, Entry, parse_header
from attribution.errors import BadEnvelope, EnvelopeTooLarge, InvalidArgument, InvalidRequest, NotFinite

MEDIA_TYPE = "application/vnd.sightline+safetensors"
PROGRESS_TYPE = "application/vnd.sightline+progress"
"""Lines of JSON: `{"progress": {"done", "total"}}` each, then `{"error": …}`, or `{"result": true}` and an envelope."""
MAX_HEADER_BYTES = 16 * 1024**2
MAX_JSON_NUMBERS = 4_000_000
_CHUNK_BYTES = 1024**2
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Packed:
    """A value as bytes: iterate over it, as often as needed, for `length` bytes in chunks of at most 1 MiB."""

    head: bytes
    tensors: tuple[Tensor, ...] = field(repr=False)
    length: int

    def __iter__(self) -> Iterator[bytes | memoryview]:
        yield self.head
        for tensor in self.tensors:
            memory = _memory(tensor.detach().cpu().contiguous())
            for start in range(0, len(memory), _CHUNK_BYTES):
                yield memory[start : start + _CHUNK_BYTES]


def pack(value: Any) -> Packed:
    """A value of JSON's types, tuples and tensors, ready to be sent; the memory of its tensors is not copied.

    Raises:
        TypeError: there is something else in it, or a key that is no string.
        InvalidArgument: a dict has a key that the envelope uses itself.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    text = json.dumps(_without_tensors(value, found), separators=(",", ":"), ensure_ascii=False)
    entries: dict[str, Any] = {"__metadata__": {METADATA: text}}
    ordered = sorted(found.values(), key=lambda one: -one[1].element_size())  # so that each lies aligned
    end = 0
    for key, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % _LENGTH_BYTES)
    head = len(header).to_bytes(_LENGTH_BYTES, "little") + header
    return Packed(head, tuple(tensor for _, tensor in ordered), len(head) + end)


class Unpacker:
    """Reads an envelope that comes in pieces: `feed` each of them, then `finish`.

    Args:
        limit: the most bytes that the whole may have; None for no bound.
        announced: the length that the sender announced, where it did.
        max_header: the most bytes of the header.
    """

    def __init__(
        self, limit: int | None = None, announced: int | None = None, max_header: int = MAX_HEADER_BYTES
    ) -> None:
        if limit is not None and announced is not None and announced > limit:
            raise EnvelopeTooLarge(f"the body has {announced:,} bytes; at most {limit:,} are taken")
        self.limit, self.announced, self.max_header = limit, announced, max_header
        self.read = 0
        self.total: int | None = None
        """Bytes of the whole, once the header is known."""
        self._head = bytearray()
        self._entries: Iterator[Entry] = iter(())
        self._value: Any = None
        self._tensors: dict[str, Tensor] = {}
        self._room = memoryview(b"")  # what is still to be filled of the present tensor

    def feed(self, chunk: bytes | memoryview) -> None:
        """Take the next piece.

        Raises:
            BadEnvelope: this is no envelope, its header does not fit what it describes, or it goes on after its end.
            EnvelopeTooLarge: its header announces more than is taken.
        """
        rest = memoryview(chunk)
        self.read += len(rest)
        if self.total is None:
            rest = self._feed_head(rest)
        while len(rest) and self.total is not None:
            if not len(self._room):
                self._next_tensor()
            taken = min(len(rest), len(self._room))
            self._room[:taken] = rest[:taken]
            self._room, rest = self._room[taken:], rest[taken:]

    def finish(self) -> Any:
        """The value, after the last piece.

        Raises:
            BadEnvelope: something is missing.
        """
        if self.total is None:
            if len(self._head) < _LENGTH_BYTES:
                _refuse_foreign(bytes(self._head))
            raise BadEnvelope(f"the body ends after {self.read:,} bytes, within its header")
        if self.read < self.total:
            raise BadEnvelope(
                f"the body ends after {self.read:,} of the {self.total:,} bytes that its header announces"
            )
        for entry in self._entries:  # those without numbers
            self._tensors[entry.key] = torch.empty(entry.shape, dtype=entry.dtype)
        for key, tensor in self._tensors.items():
            if tensor.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
                raise BadEnvelope(f"the tensor {key!r} is of type BOOL and holds bytes other than 0 and 1")
        return _with_tensors(self._value, self._tensors)

    def _feed_head(self, rest: memoryview) -> memoryview:
        """Collect the header; returns what follows it."""
        rest = self._collect(rest, _LENGTH_BYTES)
        if len(self._head) < _LENGTH_BYTES:
            return rest
        length = int.from_bytes(self._head[:_LENGTH_BYTES], "little")
        if not 2 <= length <= self.max_header:
            _refuse_foreign(bytes(self._head))
            raise BadEnvelope(f"the body says that its header has {length:,} bytes; it has 2 to {self.max_header:,}")
        if self.announced is not None and _LENGTH_BYTES + length > self.announced:
            raise BadEnvelope(f"its header alone would have {length:,} bytes; the body has {self.announced:,}")
        rest = self._collect(rest, _LENGTH_BYTES + length)
        if self._head[_LENGTH_BYTES : _LENGTH_BYTES + 1] not in (b"", b"{"):
            _refuse_foreign(bytes(self._head))
            raise BadEnvelope("the header is no JSON object; the body is no safetensors")
        if len(self._head) == _LENGTH_BYTES + length:
            self._open(bytes(self._head[_LENGTH_BYTES:]))
        return rest

    def _collect(self, rest: memoryview, upto: int) -> memoryview:
        taken = max(0, min(len(rest), upto - len(self._head)))
        self._head += rest[:taken]
        return rest[taken:]

    def _open(self, text: bytes) -> None:
        entries, self._value = parse_header(text)
        total = _LENGTH_BYTES + len(text) + (entries[-1].end if entries else 0)
        if self.limit is not None and total > self.limit:
            raise EnvelopeTooLarge(f"the header announces {total:,} bytes; at most {self.limit:,} are taken")
        if self.announced is not None and total != self.announced:
            raise BadEnvelope(f"the header announces {total:,} bytes in all; the body has {self.announced:,}")
        self._entries, self.total = iter(entries), total
        self._head.clear()

    def _next_tensor(self) -> None:
        """Allocate the tensor that the next byte belongs to."""
        for entry in self._entries:
            tensor = self._tensors[entry.key] = torch.empty(entry.shape, dtype=entry.dtype)
            if tensor.numel():
                self._room = _memory(tensor)
                return
        raise BadEnvelope(f"the body goes on after the {self.total:,} bytes that its header announces")


def unpack(data: bytes) -> Any:
    """The value of an envelope that is there as a whole; raises as `Unpacker`."""
    unpacker = Unpacker(announced=len(data))
    unpacker.feed(data)
    return unpacker.finish()


def has_tensor(value: Any) -> bool:
    """Whether there is a tensor anywhere in a value."""
    if isinstance(value, dict):
        return any(has_tensor(item) for item in value.values())
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(has_tensor(item) for item in value))


def to_json(value: Any) -> bytes:
    """A value as JSON for people and curl: tensors as `{"dtype", "shape", "data": nested lists}`, tuples as lists.

    Raises:
        NotFinite: there is a NaN or an infinity in it, which JSON cannot say.
        InvalidRequest: its tensors have more than `MAX_JSON_NUMBERS` numbers.
    """
    found: dict[int, tuple[str, Tensor]] = {}
    _without_tensors(value, found)
    if (count := sum(tensor.numel() for _, tensor in found.values())) > MAX_JSON_NUMBERS:
        raise InvalidRequest(
            f"the answer has {count:,} numbers, too many for JSON ({MAX_JSON_NUMBERS:,}); "
            f"ask for less of it, or with 'Accept: {MEDIA_TYPE}'"
        )
    try:
        return json.dumps(value, default=_plain_tensor, allow_nan=False, ensure_ascii=False).encode()
    except ValueError as error:
        raise NotFinite(
            f"the answer holds a NaN or an infinity, which JSON cannot say; ask with 'Accept: {MEDIA_TYPE}'"
        ) from error


def _plain_tensor(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data": tensor.tolist()}


def _memory(tensor: Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # numpy knows no bfloat16
    return memoryview(flat)


def _without_tensors(value: Any, found: dict[int, tuple[str, Tensor]]) -> Any:
    """`value` with a reference in place of each tensor; each is put into `found` once, by its id, with its key."""
    if type(value) in PLAIN:  # most of a long answer; asking torch whether it is a tensor costs more than the rest
        return value
    if isinstance(value, Tensor):
        if value.dtype not in _NAMES or value.layout != torch.strided:
            raise TypeError(f"a tensor of {value.dtype} and layout {value.layout} cannot be sent")
        key, _ = found.setdefault(id(value), (str(len(found)), value))
        return {"$tensor": key}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a key that is no string cannot be sent: {key!r}")
            if key in ("$tensor", "$tuple"):
                raise InvalidArgument(f"a dict with the key {key!r} cannot be sent: it stands for something else here")
        return {key: item if type(item) in PLAIN else _without_tensors(item, found) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_without_tensors(item, found) for item in value]
        return items if isinstance(value, list) else {"$tuple": items}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be sent")


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if type(value) in PLAIN:
        return value
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$tuple" in value:
        return tuple(_with_tensors(item, tensors) for item in value["$tuple"])
    return {key: item if type(item) in PLAIN else _with_tensors(item, tensors) for key, item in value.items()}


def _refuse_foreign(start: bytes) -> None:
    """Say what a body is that is no envelope, where its first bytes tell."""
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise BadEnvelope("the body is a pickle; pickles are never read. Send safetensors or JSON")
    if start[:2] == b"PK":
        raise BadEnvelope(
            "the body is a zip archive, such as torch.save writes; it holds pickles, which are never read. "
            "Send safetensors or JSON"
        )
