"""The card of the autoencoders that are shipped for the embedded model, from their figures and descriptions."""

from typing import Any

from attribution.features.card import FORMULAS

_PLAIN = ("token", "next token", "part", "next part")
_SHOWN = 6

_HEAD = """\
# Autoencoders of the embedded puzzle model

A sparse autoencoder of the residual stream that leaves layer 2 (of the layers 0 to 3), and a transcoder for the MLP of
each layer: {n_features} features each (jumprelu, {k} active in the mean of a batch), width 128, float32, in the
directory format of SAELens. `features.toml` declares them; the server and a session find them by themselves.

```
python -m examples.demo_features --out puzzles/demo_features
```

trains all five together ({rows:,} rows, {minutes:.0f} minutes on less than one free CPU core), measures and describes
them; `--again` measures and describes what is there. One of them alone, by the same recipe:

```
sightline sae train demo --point 'resid_post[2]' --features {n_features} --tokens 800k --trainer own --out DIR
sightline sae train demo --transcoder --layer 2 --features {n_features} --tokens 800k --out DIR
```

Rows come from conversations drawn as the model's own training drew them, with other seeds. Figures and descriptions are
of puzzles of `gen_puzzle`, which no training draws.

## Figures

| source | L0 | explained variance | dead | spliced | zero | mean | recovered (zero) | recovered (mean) | \
cells right | described |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""

_BELOW = """
Over {tokens:,} tokens of {conversations} conversations. A loss is of what the model itself says: {scored:,} tokens
of answers, names of rules and small talk; without autoencoders it is {loss:.4f}.

{formulas}- *cells right*: answer cells predicted right after the right cells before them, with the reconstruction in
  place at every token. Without any it is {right:.2f} %, with all four transcoders at once {all_right:.2f} %.
- *described*: features whose description has an F1 of at least 0.6.

## Clamping a feature changes the cell that it should change

A feature of {clamped} that fires on cells of a colour is clamped at one cell of the test grid of another colour.
Nothing else is touched, and the reconstruction error stays. The rule says which cells of the answer a cell of that
colour would change. On held-out 4×4 puzzles of all rules, with values chosen on other puzzles:

| feature | description | clamped at | should take the colour: do | should stay: do | a random feature, at that value |
| ---: | --- | ---: | ---: | ---: | ---: |
"""

_ABOUT_DESCRIPTIONS = """
## Descriptions

`descriptions.jsonl` beside the weights: for each feature the label of tokens, or up to three together, that best say
where it is above `level`: 0, or an activation that the description ends with ("above 33"), below which it says nothing.
`f1` is 2 · both / (fires + holds), on other conversations than those that labels and level were chosen on; `density` is
the share of tokens on which it fires; `promotes` is what one unit of its direction adds to the logit of each colour,
less their mean, before the scale of the final norm. A feature that no label describes with an F1 of 0.6 has no line.
The best of each source that are about cells or rules:

"""


def card(figures: dict[str, Any], described: dict[str, list[dict[str, Any]]]) -> str:
    """README.md: sizes, figures, what clamping does, and some descriptions."""
    one = next(iter(figures["sources"].values()))
    head = _HEAD.format(**{key: figures[key] for key in ("rows", "minutes", "k")}, n_features=one["n_features"])
    below = _BELOW.format(
        tokens=one["rows"],
        conversations=figures["conversations"],
        scored=one["tokens"],
        loss=one["loss"],
        formulas=FORMULAS,
        right=100 * figures["cells_right"],
        all_right=100 * figures["all_transcoders"]["cells_right"],
        clamped=figures["clamped"],
    )
    rows = "".join(_row(name, source) for name, source in figures["sources"].items())
    texts = {line["index"]: line["description"] for line in described[figures["clamped"]]}
    clamps = "".join(_clamp(clamp, texts) for clamp in figures["clamps"])
    return head + rows + below + clamps + _ABOUT_DESCRIPTIONS + "".join(map(_best, described.items()))


def _row(name: str, one: dict[str, Any]) -> str:
    losses = (f"{one[key]:.4f}" for key in ("spliced", "zero", "mean", "recovered", "recovered_of_mean"))
    right = f"{100 * one['cells_right']:.2f} %"
    numbers = (f"{one['l0']:.1f}", f"{one['explained_variance']:.3f}", one["dead"], *losses, right, one["described"])
    return f"| {name} | {' | '.join(map(str, numbers))} |\n"


def _clamp(one: dict[str, Any], texts: dict[int, str]) -> str:
    shares = _share(one["effect"], "changed"), _share(one["effect"], "stayed"), _share(one["random_effect"], "changed")
    return f"| {one['index']} | {texts[one['index']]} | {one['value']:g} | {' | '.join(shares)} |\n"


def _share(effect: dict[str, Any], what: str) -> str:
    return f"{100 * effect[what]:.1f} % of {effect[f'n_{what}']}"


def _best(source: tuple[str, list[dict[str, Any]]]) -> str:
    name, lines = source
    about = [one for one in lines if not all(group in _PLAIN for group, _ in one["labels"])]
    return "".join([f"- {name}\n", *(f"  - {one['index']}: {one['description']}\n" for one in about[:_SHOWN])])
