"""Decoding with continuous batching: sequences join and leave between steps, and share every forward pass.

1. `Prefill` feeds the prompts of newcomers, left-padded together, in pieces of bounded size.
2. `DecodeBatch.join` pads the shorter of old and new keys and values on the left and concatenates the rows.
3. `DecodeBatch.step` feeds each row's last token at its own position.
4. `DecodeBatch.keep` takes the rows that stay and cuts the columns that are padding for all of them.

Every call runs on the thread that owns the model.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from attribution.model.cache import Pairs, growing_cache, pairs_of
from attribution.model.capture import Batch, Change, Stream, forward
from attribution.model.traced import TracedModel


@dataclass(frozen=True)
class Fed:
    """What one forward gave.

    Attributes:
        logits: of the last columns that were asked for, on the CPU in the model's dtype.
        captured: for each stream [layer, row, column, ...]; the last column is at position `ends[row] − 1`.
        ends: per row, the number of tokens fed so far.
    """

    logits: Float[Tensor, "row kept vocab"]
    captured: dict[Stream, Tensor]
    ends: list[int]


class Prefill:
    """Prompts on their way into the batch, padded on the left to the longest of them."""

    def __init__(self, model: TracedModel, prompts: list[list[int]]) -> None:
        self.model = model
        self.lengths = [len(prompt) for prompt in prompts]
        self.columns = max(self.lengths)
        self.fed = 0
        self.cache = DynamicCache()
        self._ids = torch.tensor([[0] * (self.columns - len(prompt)) + prompt for prompt in prompts])
        self.mask = torch.tensor([[0] * (self.columns - n) + [1] * n for n in self.lengths])

    @property
    def done(self) -> bool:
        """Whether the whole prompts have been fed."""
        return self.fed == self.columns

    def advance(self, tokens: int, tail: int, streams: Iterable[Stream], changes: Sequence[Change] = ()) -> Fed:
        """Feed the next `tokens` columns; logits are computed for those of the last `tail` columns among them."""
        start, stop = self.fed, min(self.columns, self.fed + tokens)
        positions = (self.mask.cumsum(dim=1) - 1).clamp_min(0)
        device = self.model.device
        batch = Batch(
            ids=self._ids[:, start:stop].to(device),
            mask=self.mask[:, :stop].to(device),
            positions=positions[:, start:stop].to(device),
            cache=self.cache,
            keep=max(1, stop - max(start, self.columns - tail)),
        )
        logits, captured = forward(self.model, batch, streams, changes)
        self.fed = stop
        return Fed(logits.cpu(), captured, [length - (self.columns - stop) for length in self.lengths])


class DecodeBatch:
    """The keys and values of the sequences being decoded. Row i is the i-th sequence that joined and stayed."""

    def __init__(self, model: TracedModel) -> None:
        self.model = model
        self.lengths: list[int] = []
        self._cache = DynamicCache()
        self._mask = torch.zeros(0, 0, dtype=torch.long)

    def step(self, tokens: list[int], streams: Iterable[Stream], changes: Sequence[Change] = ()) -> Fed:
        """Feed one token per row."""
        device = self.model.device
        mask = torch.cat([self._mask, torch.ones(len(tokens), 1, dtype=torch.long)], dim=1)
        batch = Batch(
            ids=torch.tensor(tokens)[:, None].to(device),
            mask=mask.to(device),
            positions=torch.tensor(self.lengths)[:, None].to(device),
            cache=self._cache,
            keep=1,
        )
        logits, captured = forward(self.model, batch, streams, changes)
        self._mask = mask
        self.lengths = [length + 1 for length in self.lengths]
        return Fed(logits.cpu(), captured, list(self.lengths))

    def join(self, prefill: Prefill, rows: list[int]) -> None:
        """Take in the given rows of a prefill that is done."""
        if not rows:
            return
        lengths = [prefill.lengths[row] for row in rows]
        mask, cache = _trimmed(prefill.mask[rows], _selected(prefill.cache, rows, prefill.mask.shape[0]), lengths)
        if self.lengths:
            columns = max(mask.shape[1], self._mask.shape[1])
            mask = torch.cat([_padded(self._mask, 1, columns), _padded(mask, 1, columns)])
            cache = [
                (_joined(old_keys, new_keys, columns), _joined(old_values, new_values, columns))
                for (old_keys, old_values), (new_keys, new_values) in zip(pairs_of(self._cache), cache, strict=True)
            ]
        self._mask, self._cache = mask, growing_cache(cache)
        self.lengths += lengths

    def keep(self, rows: list[int]) -> None:
        """Keep only the given rows, in this order."""
        if not rows:
            self.__init__(self.model)
            return
        self.lengths = [self.lengths[row] for row in rows]
        self._mask, cache = _trimmed(self._mask[rows], _selected(self._cache, rows, self._mask.shape[0]), self.lengths)
        self._cache = growing_cache(cache)


def _selected(cache: DynamicCache, rows: list[int], total: int) -> Pairs:
    if rows == list(range(total)):
        return pairs_of(cache)
    return [(keys[rows], values[rows]) for keys, values in pairs_of(cache)]


def _trimmed(mask: Tensor, cache: Pairs, lengths: list[int]) -> tuple[Tensor, Pairs]:
    """Cut the leading columns that are padding in every row."""
    columns = max(lengths)
    return mask[:, -columns:], [(keys[:, :, -columns:], values[:, :, -columns:]) for keys, values in cache]


def _joined(old: Tensor, new: Tensor, columns: int) -> Tensor:
    return torch.cat([_padded(old, 2, columns), _padded(new, 2, columns)])


def _padded(tensor: Tensor, axis: int, columns: int) -> Tensor:
    missing = columns - tensor.shape[axis]
    if missing == 0:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=axis)
