"""Envelopes: what goes in comes out, safetensors reads and writes the same, and a lie in a header is refused."""

import io
import json
import math
import pickle
import struct
import tracemalloc
from typing import Any

import pytest
import safetensors.torch
import torch

from attribution.envelope import MAX_JSON_NUMBERS, MEDIA_TYPE, Packed, Unpacker, has_tensor, pack, to_json, unpack
from attribution.envelope_header import DTYPES
from attribution.errors import BadEnvelope, EnvelopeTooLarge, InvalidArgument, InvalidRequest, NotFinite

WORDS: Any = {"a": [1, 2.5, None, True, "ü"], "b": {"c": (1, ("x",))}, "nan": math.nan, "inf": -math.inf}


def data(packed: Packed) -> bytes:
    return b"".join(packed)


def in_pieces(body: bytes, size: int) -> Any:
    unpacker = Unpacker()
    for start in range(0, len(body), size):
        unpacker.feed(body[start : start + size])
    return unpacker.finish()


def blob(entries: dict[str, Any], body: bytes = b"", value: Any = None, **metadata: str) -> bytes:
    """A body with any header; without a value, a list of references to all tensors."""
    text = json.dumps([{"$tensor": key} for key in entries] if value is None else value)
    header = json.dumps({"__metadata__": {"sightline": text} | metadata} | entries).encode()
    return struct.pack("<Q", len(header)) + header + body


def entry(dtype: Any = "F32", shape: Any = (2,), start: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 0, 3), (2, 3, 4)])
def test_a_tensor_of_every_type_and_shape_comes_back(dtype: torch.dtype, shape: tuple[int, ...]):
    tensor = (torch.randn(shape) * 3).to(dtype)
    found = unpack(data(pack({"x": tensor})))["x"]
    assert found.dtype == dtype
    assert torch.equal(found, tensor)


def test_everything_else_comes_back_as_it_was_tuples_and_nan_included():
    found = unpack(data(pack(WORDS)))
    assert math.isnan(found.pop("nan"))
    assert found == {name: value for name, value in WORDS.items() if name != "nan"}


def test_nan_and_infinity_in_tensors_come_back():
    tensor = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    assert torch.equal(unpack(data(pack(tensor))).view(torch.int32), tensor.view(torch.int32))


def test_views_that_are_not_contiguous_come_back_as_they_look():
    base = torch.arange(24.0).reshape(4, 6)
    views = [base.T, base[:, ::2], base[1:2].expand(3, 6), base.requires_grad_()[0]]
    assert all(torch.equal(found, view) for found, view in zip(unpack(data(pack(views))), views, strict=True))


def test_one_tensor_named_twice_is_sent_once():
    tensor = torch.zeros(1000)
    packed = pack([tensor, tensor])
    assert packed.length < 4500
    assert len(unpack(data(packed))) == 2


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 100_000])
def test_the_pieces_in_which_it_comes_make_no_difference(size: int):
    value = [torch.randn(5, 7), {"x": torch.ones(3, dtype=torch.bool), "y": torch.empty(0)}, torch.tensor(7)]
    found = in_pieces(data(pack(value)), size)
    assert torch.equal(found[0], value[0])
    assert torch.equal(found[1]["x"], value[1]["x"])
    assert (found[1]["y"].shape, found[2]) == ((0,), 7)


def test_the_length_is_known_before_and_the_bytes_can_be_taken_twice():
    packed = pack({"x": torch.randn(3_000_000).bfloat16(), "y": "z"})
    assert len(data(packed)) == packed.length
    assert data(packed) == data(packed)
    assert max(map(len, packed)) <= 1024**2


def test_safetensors_reads_what_is_packed():
    value = [torch.arange(5, dtype=torch.int8), torch.randn(2, 3), torch.tensor(1.5, dtype=torch.bfloat16)]
    read = safetensors.torch.load(data(pack(value)))
    assert len(read) == 3
    assert all(torch.equal(read[str(number)], tensor) for number, tensor in enumerate(value))


def test_what_safetensors_writes_is_unpacked():
    tensors = {"b": torch.arange(3, dtype=torch.int16), "a": torch.randn(2, 2, dtype=torch.float64), "c": torch.ones(1)}
    text = json.dumps({"args": [{"$tensor": "a"}, {"$tuple": [{"$tensor": "b"}]}], "c": {"$tensor": "c"}})
    found = unpack(safetensors.torch.save(tensors, metadata={"sightline": text, "format": "pt"}))
    assert torch.equal(found["args"][0], tensors["a"])
    assert torch.equal(found["args"][1][0], tensors["b"])
    assert torch.equal(found["c"], tensors["c"])


def test_packing_and_unpacking_hold_no_second_copy():
    tensor = torch.zeros(8_000_000)  # 32 MB, which tracemalloc does not see, as it sees bytes
    tracemalloc.start()
    unpacker = Unpacker()
    for chunk in pack(tensor):
        unpacker.feed(chunk)
    found = unpacker.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert torch.equal(found, tensor)
    assert peak < 2_000_000


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ({1: 2}, TypeError, "no string"),
        ({1, 2}, TypeError, "a set cannot be sent"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(2, 2).to_sparse(), TypeError, "sparse"),
        ({"a": {"$tensor": "x"}}, InvalidArgument, "'\\$tensor'"),
        ([{"$tuple": 1}], InvalidArgument, "'\\$tuple'"),
    ],
)
def test_what_cannot_be_sent_is_refused_before_a_byte_is(value: Any, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        pack(value)


ZIP = io.BytesIO()
torch.save(torch.zeros(100), ZIP)
OLD_PICKLE = io.BytesIO()
torch.save(torch.zeros(100), OLD_PICKLE, _use_new_zipfile_serialization=False)
GOOD = blob({"x": entry()}, bytes(8))

BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ends after 0 bytes"),
    "half a length": (GOOD[:5], "within its header"),
    "half a header": (GOOD[:40], "within its header"),
    "truncated": (GOOD[:-1], "ends after .* of the"),
    "too long": (GOOD + b"x", "goes on after"),
    "a pickle": (pickle.dumps({"x": [1] * 1000}, protocol=4), "is a pickle"),
    "a short pickle": (b"\x80\x04N.", "is a pickle"),
    "what torch.save wrote": (ZIP.getvalue(), "zip archive, such as torch.save writes"),
    "what torch.save wrote long ago": (OLD_PICKLE.getvalue(), "is a pickle"),
    "JSON": (b'{"dataset_id": "x", "sample_id": 1}', "says that its header has"),
    "a header of no length": (struct.pack("<Q", 0) + b"{}", "says that its header has 0 bytes"),
    "a header of 17 MiB": (struct.pack("<Q", 17 * 2**20) + b"{" * 100, "it has 2 to 16,777,216"),
    "no JSON": (struct.pack("<Q", 8) + b"{abcdefg", "the header is not JSON"),
    "a list": (struct.pack("<Q", 8) + b"[      ]", "no JSON object"),
    "no UTF-8": (struct.pack("<Q", 8) + b'{"\xff":1}'.ljust(8), "not JSON"),
    "no metadata": (struct.pack("<Q", 8) + b"{}      ", "no 'sightline' under __metadata__"),
    "metadata that is no JSON": (blob({})[:8] + blob({})[8:].replace(b"[]", b"[["), "not JSON"),
    "a key twice": (
        struct.pack("<Q", 60) + b'{"__metadata__": {"sightline": "1"}, "x": 1, "x": 2}'.ljust(60),
        "a key comes twice",
    ),
    "an unknown dtype": (blob({"x": entry("F7")}, bytes(8)), "has the dtype 'F7'; known are"),
    "a dtype that is no text": (blob({"x": entry(["F32"])}, bytes(8)), "has the dtype"),
    "a shape that lies": (blob({"x": entry(shape=(3,))}, bytes(8)), "needs 12 bytes; its data_offsets give it 8"),
    "a shape of huge numbers": (blob({"x": entry(shape=(2**40, 2**40))}, bytes(8)), "its data_offsets give it 8"),
    "a negative shape": (blob({"x": entry(shape=(-2, -1))}, bytes(8)), "no list of up to 16 counts"),
    "a shape with a bool": (blob({"x": entry(shape=(2, True))}, bytes(8)), "no list of up to 16 counts"),
    "a shape with a float": (blob({"x": entry(shape=(2.0,))}, bytes(8)), "no list of up to 16 counts"),
    "too many axes": (blob({"x": entry(shape=(1,) * 17, end=4)}, bytes(4)), "no list of up to 16 counts"),
    "offsets the wrong way": (blob({"x": entry(start=8, end=0)}, bytes(8)), "give it -8"),
    "negative offsets": (blob({"x": entry(start=-8, end=0)}, bytes(8)), "not two counts"),
    "a gap": (
        blob({"x": entry(), "y": entry(start=12, end=20)}, bytes(20)),
        "begins at 12; the one before it ends at 8",
    ),
    "an overlap": (blob({"x": entry(), "y": entry(start=4, end=12)}, bytes(12)), "begins at 4; the one before"),
    "a gap at the start": (blob({"x": entry(start=4, end=12)}, bytes(12)), "begins at 4"),
    "more in an entry": (blob({"x": entry() | {"more": 1}}, bytes(8)), "and nothing else"),
    "no entry": (blob({"x": 5}, bytes(8)), "and nothing else"),
    "a tensor that is not there": (blob({}, value={"$tensor": "y"}), "there is no tensor 'y'"),
    "a tensor that is not used": (blob({"x": entry()}, bytes(8), value=[]), "does not use the tensor 'x'"),
    "a reference with more": (blob({"x": entry()}, bytes(8), value={"$tensor": "x", "a": 1}), "nothing else"),
    "a tuple that is none": (blob({}, value={"$tuple": 1}), "a list under it"),
    "a value nested deep": (blob({}, value=json.loads("[" * 200 + "]" * 200)), "nested more than 100 deep"),
    "a bool of 2": (blob({"x": entry("BOOL", (2,), 0, 2)}, b"\x01\x02"), "bytes other than 0 and 1"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("size", [1, 1 << 20], ids=["in bytes", "at once"])
def test_a_bad_body_is_refused_in_words(name: str, size: int):
    body, words = BAD[name]
    with pytest.raises(BadEnvelope, match=words):
        in_pieces(body, size)


def test_a_header_nested_beyond_python_is_refused():
    body = b'{"__metadata__":' + b"[" * 100_000
    with pytest.raises(BadEnvelope, match="not JSON"):
        unpack(struct.pack("<Q", len(body)) + body)


def test_ten_gigabytes_by_the_header_are_refused_before_anything_is_allocated():
    size = 10 * 2**30
    body = blob({"x": entry("F32", (size // 4,), 0, size)})
    with pytest.raises(EnvelopeTooLarge, match=r"announces 10,737,418,\d+ bytes; at most 1,000 are taken"):
        Unpacker(limit=1000).feed(body)
    lazy = Unpacker()  # without a bound they are believed, and still nothing is there before the first of them comes
    lazy.feed(body)
    assert lazy._tensors == {}


def test_a_length_that_was_announced_is_held_to():
    with pytest.raises(EnvelopeTooLarge, match="the body has 2,000 bytes; at most 1,000"):
        Unpacker(limit=1000, announced=2000)
    with pytest.raises(BadEnvelope, match="the header announces"):
        Unpacker(announced=len(GOOD) + 1).feed(GOOD)
    with pytest.raises(BadEnvelope, match="its header alone"):
        Unpacker(announced=20).feed(GOOD)


def test_json_for_people_has_nested_lists():
    value = {"x": torch.tensor([[1.5, 2], [3, 4]]).bfloat16(), "y": (1, None), "b": torch.tensor(True)}
    assert json.loads(to_json(value)) == {
        "x": {"dtype": "BF16", "shape": [2, 2], "data": [[1.5, 2.0], [3.0, 4.0]]},
        "y": [1, None],
        "b": {"dtype": "BOOL", "shape": [], "data": True},
    }


@pytest.mark.parametrize("value", [{"x": torch.tensor([1.0, math.nan])}, [math.inf]])
def test_json_cannot_say_nan_and_names_the_type_that_can(value: Any):
    with pytest.raises(NotFinite, match=f"'Accept: {MEDIA_TYPE.replace('+', '.')}'"):
        to_json(value)


def test_json_refuses_tensors_that_would_be_too_long():
    with pytest.raises(InvalidRequest, match=r"4,000,001 numbers, too many for JSON"):
        to_json({"x": torch.zeros(1).expand(MAX_JSON_NUMBERS + 1)})


def test_a_tensor_is_found_wherever_it_is():
    assert has_tensor({"a": [1, (2, {"b": torch.zeros(1)})]})
    assert not has_tensor({"a": [1, (2, {"b": [0.0]})]})
