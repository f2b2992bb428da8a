"""A text file as samples of a model: what autoencoders of any model are trained on.

The file is read from its beginning, line by line, tokenized, and cut into pieces of one length; each begins with the
tokenizer's special token where it has one, whose row is not used: in most models it is unlike all others. Of every
`HELD_OUT_EVERY` pieces one is kept apart, to measure with. When the file ends it begins again.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from attribution.errors import InvalidArgument
from attribution.features.streaming import Sample
from attribution.model.traced import TracedModel

HELD_OUT_EVERY = 20
_BLOCK = 1 << 16
"""Characters that are tokenized at once, and then to the end of the line."""


class TextFile:
    """The samples of a text file, `context` tokens each, the special token included.

    Raises:
        InvalidArgument: the file is not there, is no text in UTF-8, or is too short to train on.
    """

    def __init__(self, model: TracedModel, path: Path, context: int) -> None:
        if not 2 <= context <= model.dimensions.window:
            raise InvalidArgument(
                f"context is from 2 to {model.dimensions.window}, the window of {model.id!r}; found {context}",
                param="context",
            )
        self.path, self.context = path, context
        self.bos: Any = model.tokenizer.bos_token_id
        self._tokenizer = model.tokenizer
        if len(list(islice(self._pieces(), HELD_OUT_EVERY + 1))) <= HELD_OUT_EVERY:
            raise InvalidArgument(
                f"{path} is too short: {HELD_OUT_EVERY + 1} pieces of {context} tokens are needed; give a longer text, "
                "or shorter pieces",
                param="texts",
            )

    def training(self) -> Iterator[Sample]:
        """Without end, as often as the file must be read."""
        while True:
            for number, piece in enumerate(self._pieces()):
                if number % HELD_OUT_EVERY:
                    yield piece

    def held_out(self, count: int) -> list[Sample]:
        """The first pieces of those kept apart."""
        return list(islice((one for number, one in enumerate(self._pieces()) if number % HELD_OUT_EVERY == 0), count))

    def _pieces(self) -> Iterator[Sample]:
        first = [] if self.bos is None else [self.bos]
        length, held = self.context - len(first), []
        for block in self._blocks():
            held += self._tokenizer.encode(block, add_special_tokens=False, verbose=False)
            while len(held) >= length:
                ids = first + held[:length]
                yield Sample(ids, [place >= len(first) for place in range(len(ids))])
                held = held[length:]

    def _blocks(self) -> Iterator[str]:
        try:
            with self.path.open(encoding="utf-8") as file:
                while lines := file.readlines(_BLOCK):
                    yield "".join(lines)
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else f"it is no text in UTF-8 ({error})"
            raise InvalidArgument(f"{self.path} cannot be read: {why}", param="texts") from error
