"""The grammar of selectors: what parses, as what, and what every refusal names."""

import pytest

from attribution.errors import BadSelector
from attribution.selectors import POINTS, ModulePath, Point, parse_selector, pick


@pytest.mark.parametrize(
    ("inside", "index"),
    [
        ("3", 3),
        ("-1", -1),
        ("003", 3),
        (" 3 ", 3),
        ("*", slice(None)),
        (":", slice(None)),
        ("0:8:2", slice(0, 8, 2)),
        ("1:", slice(1, None)),
        (":2", slice(None, 2)),
        ("-2:", slice(-2, None)),
        ("::2", slice(None, None, 2)),
        ("::-1", slice(None, None, -1)),
        ("9" * 200, int("9" * 200)),
    ],
)
def test_an_index_is_an_integer_a_star_or_a_slice(inside: str, index: object) -> None:
    assert parse_selector(f"z[{inside}]") == Point(f"z[{inside}]", "z", index)  # type: ignore[arg-type]
    path = f"model.layers[{inside}].output"
    assert parse_selector(path) == ModulePath(path, ("model", "layers", index), "output")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in POINTS if name != "logits"])
def test_a_point_is_a_name_with_one_index(name: str) -> None:
    assert parse_selector(f"{name}[2]") == Point(f"{name}[2]", name, 2)


def test_logits_take_no_index() -> None:
    assert parse_selector("logits") == Point("logits", "logits", None)
    with pytest.raises(BadSelector, match=r"'logits' takes no index, found '\[0\]'"):
        parse_selector("logits[0]")


@pytest.mark.parametrize(
    ("text", "parts", "side"),
    [
        ("lm_head.output", ("lm_head",), "output"),
        ("model.norm.input", ("model", "norm"), "input"),
        ("model.layers.3.mlp.output", ("model", "layers", 3, "mlp"), "output"),
        ("model.layers[3].mlp.down_proj.input", ("model", "layers", 3, "mlp", "down_proj"), "input"),
        ("transformer.h[*].ln_1.output", ("transformer", "h", slice(None), "ln_1"), "output"),
        ("blocks[1][0].output", ("blocks", 1, 0), "output"),
        ("layers[2].experts[*].w1.output", ("layers", 2, "experts", slice(None), "w1"), "output"),
        # a module may be named like a point, or start like one
        ("q.output", ("q",), "output"),
        ("v2.output", ("v2",), "output"),
        ("k_proj.output", ("k_proj",), "output"),
        ("logits.output", ("logits",), "output"),
        # or like a side
        ("layer.output.dense.output", ("layer", "output", "dense"), "output"),
    ],
)
def test_a_module_path_is_names_and_indices_and_ends_in_a_side(text: str, parts: tuple, side: str) -> None:
    assert parse_selector(text) == ModulePath(text, parts, side)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a selector has 1 to 300 characters, this one has 0"),
        ("a" * 301, "a selector has 1 to 300 characters, this one has 301"),
        # points
        ("z", "the point 'z' takes one layer index, .* found ''"),
        ("z[]", r"an index is an integer, .* found '\[\]'"),
        ("z[1][2]", r"the point 'z' takes one layer index, .* found '\[1\]\[2\]'"),
        ("z[1", r"the point 'z' takes one layer index, .* found '\[1'"),
        ("z[1]]", r"the point 'z' .* found '\[1\]\]'"),
        ("z [1]", r"the point 'z' .* found ' \[1\]'"),
        ("z[1]\n", r"the point 'z' .* found '\[1\]\\n'"),
        ("z[0].output", r"the point 'z' .* found '\[0\]\.output'"),
        ("logits ", "'logits' takes no index, found ' '"),
        ("resid_pots[1]", "a module path ends in '.output' or '.input' .* a point is one of resid_pre, "),
        ("RESID_POST[1]", "a module path ends in '.output' or '.input'"),
        # indices
        ("z[a]", r"found '\[a\]'"),
        ("z[1,2]", r"found '\[1,2\]'"),
        ("z[1.5]", r"found '\[1\.5\]'"),
        ("z[+1]", r"found '\[\+1\]'"),
        ("z[--1]", r"found '\[--1\]'"),
        ("z[- 1]", r"found '\[- 1\]'"),
        ("z[1_0]", r"found '\[1_0\]'"),
        ("z[0x1]", r"found '\[0x1\]'"),
        ("z[**]", r"found '\[\*\*\]'"),
        ("z[*:2]", r"found '\[\*:2\]'"),
        ("z[1:2:3:4]", r"found '\[1:2:3:4\]'"),
        ("z[True]", r"found '\[True\]'"),
        ("z[٣]", r"found '\[٣\]'"),
        ("z[１]", r"found '\[１\]'"),
        ("z[²]", r"found '\[²\]'"),
        ("z[0:٣]", r"found '\[0:٣\]'"),
        ("z[0:4:0]", "the step of a slice cannot be 0"),
        ("z[::-0]", "the step of a slice cannot be 0"),
        ("model.layers[x].output", r"found '\[x\]'"),
        ("model.layers[0::0].output", "the step of a slice cannot be 0"),
        ("model.layers[*].experts[*].output", "at most one index may name several modules"),
        ("model.layers[0:2].experts[1:].output", "at most one index may name several modules"),
        # paths
        ("model", "a module path ends in '.output' or '.input'"),
        ("output", "a module path ends in '.output' or '.input'"),
        ("model.layers[0]", "a module path ends in '.output' or '.input'"),
        ("model.layers[0].outputs", "a module path ends in '.output' or '.input'"),
        ("model.output[0]", "a module path ends in '.output' or '.input'"),
        (".output", r"expected a module name at character 0, found '\.output'"),
        ("model..output", r"expected a module name at character 6, found '\.output'"),
        ("model.", "expected a module name at character 6, found ''"),
        ("[0].output", r"expected a module name at character 0, found '\[0\]\.output'"),
        ("model.[0].output", r"expected a module name at character 6, found '\[0\]\.output'"),
        ("model.layers[0", r"expected '\.' or '\[index\]' at character 12, found '\[0'"),
        ("model.layers]0[.output", r"expected '\.' or '\[index\]' at character 12"),
        ("model.layers[0]x.output", r"expected '\.' or '\[index\]' at character 15, found 'x\.output'"),
        ("model.layers.-1.output", r"expected a module name at character 13, found '-1\.output'"),
        ("model.layers.3x.output", r"expected '\.' or '\[index\]' at character 14, found 'x\.output'"),
        ("model.layers.*.output", r"expected a module name at character 13, found '\*\.output'"),
        ("model.läyers[0].output", r"expected '\.' or '\[index\]' at character 7"),
        ("model.layers.٣.output", "expected a module name at character 13, found '٣"),
        ("lm_head.output\n", r"expected '\.' or '\[index\]' at character 14, found '\\n'"),
        (" lm_head.output", "expected a module name at character 0"),
        ("lm_head.output.", "expected a module name at character 15, found ''"),
        ("lm_head\x00.output", r"expected '\.' or '\[index\]' at character 7"),
        # what an evaluated selector would run
        ("__import__('os').output", r"expected '\.' or '\[index\]' at character 10, found \"\('os'\)"),
        ("model.layers[0].self_attn(1).output", "at character 25"),
        ("../../etc/passwd.output", "expected a module name at character 0"),
        ("model/layers.output", r"expected '\.' or '\[index\]' at character 5"),
        ("model.layers[__import__('os')].output", r"found '\[__import__\('os'\)\]'"),
        ("model.layers[(0)].output", r"found '\[\(0\)\]'"),
        ("lambda: 0", r"expected '\.' or '\[index\]' at character 6"),
        ("model;lm_head.output", r"expected '\.' or '\[index\]' at character 5, found ';lm_head"),
    ],
)
def test_a_selector_that_does_not_parse_is_refused_by_the_part_that_failed(text: str, says: str) -> None:
    with pytest.raises(BadSelector, match=says) as refused:
        parse_selector(text)
    assert refused.value.param == "selector"
    assert "\n" not in refused.value.message


def test_the_longest_selector_parses() -> None:
    text = "a" * (300 - len(".output")) + ".output"
    assert parse_selector(text) == ModulePath(text, ("a" * 293,), "output")


@pytest.mark.parametrize(
    ("index", "members"),
    [
        (0, [0]),
        (4, [4]),
        (-1, [4]),
        (-5, [0]),
        (slice(None), [0, 1, 2, 3, 4]),
        (slice(None, None, 2), [0, 2, 4]),
        (slice(None, None, -2), [4, 2, 0]),
        (slice(-2, None), [3, 4]),
        (slice(3, 10**300), [3, 4]),
    ],
)
def test_an_index_picks_the_members_that_python_would(index: int | slice, members: list[int]) -> None:
    assert pick(index, 5, "z[…]", "the list") == members


@pytest.mark.parametrize(
    "index", [5, -6, 10**300, -(10**300), slice(5, None), slice(2, 2), slice(3, 1), slice(0, 2, -1)]
)
def test_an_index_that_picks_nothing_is_refused_with_what_there_is(index: int | slice) -> None:
    with pytest.raises(BadSelector, match=r"'z\[…\]': the list has 5 members, 0 to 4; the index names none"):
        pick(index, 5, "z[…]", "the list")
