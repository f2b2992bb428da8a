"""What a graph takes while it is made stays under its ceiling, counted in bytes of living tensors."""

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from attribution.errors import InvalidArgument
from attribution.features.circuits.influence import prune
from attribution.features.circuits.replacement import Transcoder, replace_mlps
from attribution.features.circuits.rows import effects
from attribution.features.circuits.trace import Logits, room_for, trace
from attribution.model.linearised import logit_directions
from attribution.progress import drive
from tests.autoencoders import random_autoencoder
from tests.models import traced

IDS = [(7 * at + 3 * at * at) % 250 for at in range(40)]
CEILING = 12_000_000


class Living(TorchDispatchMode):
    """The bytes of the storages that were made under it and are still held, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_iter(result):
            if isinstance(one, torch.Tensor):
                self._watch(one.untyped_storage())
        return result

    def _watch(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def on_last(vectors: torch.Tensor) -> torch.Tensor:
    """The gradients of what stands at the last of 120 positions."""
    grads = torch.zeros(1, 120, 48)
    grads[:, -1] = vectors
    return grads


def trace_small(max_features: int, max_bytes: int) -> tuple[int, int, int, int]:
    """The most bytes at once while a graph is made and pruned, active features, rows and the bytes of their square."""
    model = traced("qwen3")
    made = {
        layer: Transcoder(f"t{layer}", "mlp_in", random_autoencoder(n_features=450, seed=layer, subtracts_b_dec=False))
        for layer in range(3)
    }
    logits = Logits([3, 60], *logit_directions(model, [3, 60]), probabilities=[0.5, 0.25])
    replacement = replace_mlps(model, IDS, made)
    with Living() as living:
        steps = trace(replacement, logits, max_features, max_bytes)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                circuit, _ = end.value
                break
        prune(circuit.effects, 0.8, 0.98)
    active = len(replacement.features)
    return living.most, active, len(circuit.chosen), 4 * active**2


def test_making_a_graph_stays_under_its_ceiling_and_far_under_the_square_of_the_active_features():
    most, active, rows, square = trace_small(100_000, CEILING)
    assert active > 20_000
    assert 10 < rows < active
    assert rows * active * 4 < most < CEILING < square / 100


def test_what_the_features_of_a_layer_write_is_never_there_all_at_once():
    made = {1: Transcoder("t", "mlp_in", random_autoencoder(n_features=4000, subtracts_b_dec=False))}
    replacement = replace_mlps(traced("qwen3"), [*IDS, *IDS, *IDS], made)
    vectors = torch.ones(1, 48)
    with Living() as living:
        row = effects(replacement, replacement.n_layers, torch.tensor([119]), vectors)
    whole = len(replacement.features) * 48 * 4
    assert living.most < whole / 2
    (grad,) = replacement.linear.backward(3, replacement.linear.final, on_last(vectors))[2]
    written = replacement.writes(1, slice(None))
    expected = (grad[replacement.features.position] * written).sum(1)
    assert torch.allclose(row[0, : len(expected)], expected, rtol=1e-4, atol=1e-4)


def test_a_target_that_nothing_reaches_misses_nothing():
    silent = random_autoencoder(subtracts_b_dec=False)
    silent = dataclasses.replace(silent, W_enc=silent.W_enc * 0, b_enc=torch.ones(silent.n_features))
    steps = trace(
        replace_mlps(traced("qwen3"), IDS, {2: Transcoder("t", "mlp_in", silent)}),
        Logits([3, 60], *logit_directions(traced("qwen3"), [3, 60]), probabilities=[0.5, 0.25]),
        100_000,
        1 << 28,
    )
    circuit, _ = drive(steps, "", show=False)
    assert len(circuit.chosen) == len(circuit.replacement.features) > 1000
    assert circuit.missed == pytest.approx(0, abs=1e-12)


def test_the_measure_sees_what_is_held_at_once():
    with Living() as living:
        for _ in range(5):
            one = torch.zeros(1000)
            del one
        two, three = torch.zeros(1000), torch.ones(1000)
        del two, three
    assert 8_000 <= living.most <= 9_000
    assert living.now == 0


def test_a_higher_ceiling_gives_more_rows_up_to_what_is_asked_for():
    model = traced("qwen3")
    made = {1: Transcoder("t", "mlp_in", random_autoencoder(n_features=400, subtracts_b_dec=False))}
    replacement = replace_mlps(model, IDS, made)
    low, high = (room_for(replacement, 2, 500, ceiling) for ceiling in (2_000_000, 200_000_000))
    assert 0 < low.n_features < high.n_features == 500
    assert (low.reduced, high.reduced) == (True, False)
    assert low.at_once < high.at_once
    with pytest.raises(InvalidArgument, match="needs at least"):
        room_for(replacement, 2, 500, 300_000)
    needed = 6 * 3 * 4 * 40 * 48 * 4
    assert room_for(replacement, 2, 500, needed).at_once == 1
