"""Savepoints: which activations a request keeps, and the recorder that collects them while the tokens come.

1. `declare` resolves the selectors and windows of a request before anything runs; what names nothing is refused here.
2. A `Recorder` per choice takes its rows of every forward, only the positions asked for.
3. `Recorder.finish` joins them into one tensor per savepoint.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from attribution.attention import attention_pattern, attention_scores
from attribution.errors import BadPositions, CaptureTooLarge, InvalidRequest
from attribution.model.block import Block
from attribution.model.capture import Stream
from attribution.model.decode import Fed
from attribution.model.resolve import Resolved, resolve
from attribution.model.traced import TracedModel
from attribution.positions import Window, overlap, parse_window

_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,99}")
_ENDLESS = 1 << 40

Removed = Callable[[int, list[int], int], Tensor | None]


@dataclass(frozen=True)
class SavepointSpec:
    """A savepoint as a user writes it; `positions` None keeps all, `dtype` None is the model's."""

    name: str
    selector: str
    positions: object = None
    dtype: str | None = None


@dataclass(frozen=True)
class Savepoint:
    """A savepoint in a given model."""

    name: str
    selector: Resolved
    window: Window
    dtype: torch.dtype | None

    @property
    def axis(self) -> int:
        """The axis of the saved tensor that counts positions (of the queries, in a pattern)."""
        return int(self.selector.stacked) + int(self.selector.is_pattern)

    def span(self, prompt: int, tokens: int) -> range:
        """The positions kept of a sequence of `tokens` fed positions."""
        return self.selector.span(self.window, prompt, tokens)


def declare(model: TracedModel, specs: list[SavepointSpec]) -> list[Savepoint]:
    """Resolve the savepoints of a request.

    Raises:
        InvalidRequest: two savepoints of one name, or a name that is no file name, or an unknown dtype.
        BadSelector, BadPositions: what is wrong with one of them.
    """
    names = [spec.name for spec in specs]
    for name in names:
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                f"a savepoint's name is 1 to 100 of letters, digits, '_', '-' and '.', no '.' first; found {name!r}",
                param="savepoints",
            )
        if names.count(name) > 1:
            raise InvalidRequest(f"two savepoints are named {name!r}", param="savepoints")
    return [_declare(model, spec) for spec in specs]


def _declare(model: TracedModel, spec: SavepointSpec) -> Savepoint:
    if spec.dtype is not None and spec.dtype not in _DTYPES:
        raise InvalidRequest(f"dtype is one of {', '.join(_DTYPES)}; found {spec.dtype!r}", param="savepoints")
    dtype = None if spec.dtype is None else _DTYPES[spec.dtype]
    return Savepoint(spec.name, resolve(model, spec.selector), parse_window(spec.positions), dtype)


def check_windows(savepoints: list[Savepoint], prompt: int, limit: int, max_bytes: int) -> None:
    """Refuse what cannot be kept for a prompt of `prompt` tokens and at most `limit` generated ones.

    Raises:
        BadPositions: a window that no token of this request can fall in, or that ends beyond the last one.
        CaptureTooLarge: the prompt alone would keep more than `max_bytes`.
    """
    most = prompt + max(limit - 1, 0)
    for savepoint in savepoints:
        what = f"savepoint {savepoint.name!r}"
        check_window(what, savepoint.window, savepoint.span(prompt, most), prompt, limit)
    needed = sum(s.selector.bytes_for(len(s.span(prompt, prompt)), prompt, s.dtype) for s in savepoints)
    if needed > max_bytes:
        raise CaptureTooLarge(
            f"the savepoints keep {needed:,} bytes of the prompt alone and the server allows {max_bytes:,} a request; "
            "name fewer layers or positions, or start it with a larger --max-capture-bytes",
            param="savepoints",
        )


def check_window(what: str, window: Window, span: range, prompt: int, limit: int) -> None:
    """Refuse a window whose `span` of all positions that there can be is empty, or that ends behind them.

    Raises:
        BadPositions: saying what `what` asked for and what there is.
    """
    most = prompt + max(limit - 1, 0)
    if window.stop is not None and window.stop > most:
        raise BadPositions(
            f"{what}: positions.stop is {window.stop}, and this request has at most {most} positions (prompt {prompt}, "
            f"max_tokens {limit}; the last token is never fed)",
            param="positions",
        )
    if not span:
        raise BadPositions(
            f"{what}: its positions select no token of this request; it has at most {most} (prompt {prompt}, "
            f"max_tokens {limit}; the last token is never fed)",
            param="positions",
        )


class Recorder:
    """Collects the savepoints of one sequence.

    Args:
        removed: says which edges of a layer's attention were removed, (layer, queries, keys) to [head, query, key], or
            None; None is for a sequence that no knockout touches.
    """

    def __init__(
        self,
        model: TracedModel,
        savepoints: list[Savepoint],
        prompt: int,
        max_bytes: int,
        removed: Removed | None = None,
    ) -> None:
        self.savepoints = savepoints
        self._removed = removed
        self._model = model
        self._prompt = prompt
        self._left = max_bytes
        self._kept: dict[tuple[str, int], list[Tensor]] = {
            (savepoint.name, index): [] for savepoint in savepoints for index in range(len(savepoint.selector.streams))
        }

    def wanted(self, start: int, stop: int) -> set[Stream]:
        """What has to be captured when the positions [start, stop) are fed."""
        return {
            stream
            for savepoint in self.savepoints
            for index, stream in enumerate(savepoint.selector.streams)
            if overlap(self._window(savepoint, index), start, stop)
        }

    @property
    def tail(self) -> int:
        """How many positions at the end of the prompt need logits."""
        starts = [s.span(self._prompt, _ENDLESS).start for s in self.savepoints if s.selector.tail]
        return max([1, *(self._prompt - start for start in starts)])

    def take(self, fed: Fed, row: int) -> None:
        """Keep this sequence's row of a forward.

        Raises:
            CaptureTooLarge: when the request has kept more than it may.
        """
        end = fed.ends[row]
        for savepoint in self.savepoints:
            for index, stream in enumerate(savepoint.selector.streams):
                if stream not in fed.captured:
                    continue
                rows = fed.captured[stream][:, row]
                first = end - rows.shape[1]
                wanted = overlap(self._window(savepoint, index), max(first, 0), end)
                if wanted:
                    piece = rows[:, wanted.start - first : wanted.stop - first : wanted.step]
                    self._keep(savepoint, index, piece)

    def _window(self, savepoint: Savepoint, index: int) -> range:
        # the keys of a pattern are needed from the first position on
        return range(_ENDLESS) if index == 1 else savepoint.span(self._prompt, _ENDLESS)

    def _keep(self, savepoint: Savepoint, index: int, piece: Tensor) -> None:
        dtype = piece.dtype if savepoint.dtype is None or savepoint.selector.is_pattern else savepoint.dtype
        self._spend(savepoint, piece.numel() * dtype.itemsize)
        self._kept[savepoint.name, index].append(piece.to(dtype, copy=True))

    def _spend(self, savepoint: Savepoint, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise CaptureTooLarge(
                f"savepoint {savepoint.name!r}: this request keeps more bytes than the server allows; name fewer "
                "layers or positions, lower max_tokens, or start the server with a larger --max-capture-bytes",
                param="savepoints",
            )

    def finish(self, tokens: int) -> dict[str, tuple[Tensor, range]]:
        """One tensor per savepoint with the positions of its rows, for a sequence of `tokens` fed positions."""
        return {s.name: (self._join(s, tokens), s.span(self._prompt, tokens)) for s in self.savepoints}

    def _join(self, savepoint: Savepoint, tokens: int) -> Tensor:
        resolved = savepoint.selector
        parts = [self._kept.pop((savepoint.name, index)) for index in range(len(resolved.streams))]
        if not parts[0]:
            return self._empty(savepoint, tokens)
        joined = [torch.cat(pieces, dim=1) for pieces in parts]
        queries = savepoint.span(self._prompt, tokens)
        if joined[0].shape[1] != len(queries):
            raise RuntimeError(f"{savepoint.name}: kept {joined[0].shape[1]} rows of {len(queries)}")
        if resolved.is_pattern:
            self._spend(savepoint, resolved.bytes_for(len(queries), tokens, savepoint.dtype))
            patterns = [
                self._pattern(layer, q, k, list(queries)) for layer, q, k in zip(resolved.layers, *joined, strict=True)
            ]
            joined = [torch.stack(patterns).to(savepoint.dtype or resolved.dtype)]
        return joined[0] if resolved.stacked else joined[0][0]

    def _pattern(self, layer: int, q: Tensor, k: Tensor, queries: list[int]) -> Tensor:
        """A pattern from q and k; edges that were removed are masked as the model masked them, before the softmax."""
        block = Block(self._model, layer)
        removed = None if self._removed is None else self._removed(layer, queries, len(k))
        if removed is None:
            return block.pattern_of(q, k, queries)
        scores = attention_scores(block.rotate(q, queries), block.rotate(k, list(range(len(k)))), block.scaling)
        if block.softcap is not None:
            scores = torch.tanh(scores / block.softcap) * block.softcap
        scores = scores.masked_fill(removed.to(scores.device), float("-inf"))
        return attention_pattern(scores, block.hidden(queries, len(k)).to(q.device), None)

    def _empty(self, savepoint: Savepoint, tokens: int) -> Tensor:
        """No position of the window was reached: no rows, of the right shape."""
        resolved = savepoint.selector
        width = (resolved.width[0], 0, tokens) if resolved.is_pattern else (0, *resolved.width)
        layers = (len(resolved.layers),) if resolved.stacked else ()
        assert prod(width) == 0
        return torch.empty(*layers, *width, dtype=savepoint.dtype or resolved.dtype)
