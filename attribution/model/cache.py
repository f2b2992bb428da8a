"""The keys and values of a batch that grows by one column per step.

transformers' own dynamic cache concatenates: every step copies everything that is cached. Here a step writes one column
into room that was reserved before.
"""

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

Pairs = list[tuple[Tensor, Tensor]]

_ROOM = 64


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, [row, kv_head, column, d_head]: views of buffers with room for more columns."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append columns and return all of them; called by the attention of the model."""
        assert self.keys is not None
        assert self.values is not None
        start = self.keys.shape[2]
        stop = start + key_states.shape[2]
        if self._buffers is None or stop > self._buffers[0].shape[2]:
            room = stop + max(_ROOM, stop // 4)
            self._buffers = (_with_room(self.keys, room), _with_room(self.values, room))
        keys, values = self._buffers
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        self.keys, self.values = keys[:, :, :stop], values[:, :, :stop]
        return self.keys, self.values


def growing_cache(pairs: Pairs) -> DynamicCache:
    """A cache that holds these keys and values, layer by layer."""
    cache = DynamicCache()
    cache.layers = [GrowingLayer(keys, values) for keys, values in pairs]  # pyright: ignore  each is a layer
    return cache


def pairs_of(cache: DynamicCache) -> Pairs:
    """The keys and values of a cache, layer by layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]  # pyright: ignore  every layer is a dynamic one


def _with_room(tensor: Tensor, columns: int) -> Tensor:
    shape = list(tensor.shape)
    shape[2] = columns
    wide = tensor.new_empty(shape)
    wide[:, :, : tensor.shape[2]] = tensor
    return wide
