"""From tokens to text as it may be sent: no half characters, nothing that may turn out to be a stop string."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"


class TextStream:
    """The text of one completion, token by token.

    A token's text depends on its neighbours, so each one is decoded with the piece of text before it. Text that ends
    in an unfinished character waits for the next token; text that may be the start of a stop string waits as well.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._prefix = self._read = 0
        self._sent = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> None:
        """Add a token; `stopped` tells whether a stop string is complete, and the text ends before it."""
        self._ids.append(token)
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if len(after) > len(before) and not after.endswith(_UNFINISHED):
            self._append(after[len(before) :])
            self._prefix, self._read = self._read, len(self._ids)

    def finish(self) -> None:
        """No token follows: what waited for one is part of the text."""
        if not self.stopped:
            before = self._decode(self._ids[self._prefix : self._read])
            self._append(self._decode(self._ids[self._prefix :])[len(before) :])
        self._stop = ()

    def take(self) -> str:
        """The text that can be sent and was not taken before."""
        end = len(self.text) if self.stopped else len(self.text) - self._held_back()
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _append(self, piece: str) -> None:
        longest = max((len(stop) for stop in self._stop), default=0)
        start = max(0, len(self.text) - longest)
        self.text += piece
        found = [at for stop in self._stop if (at := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held_back(self) -> int:
        """The length of the longest end of the text that a stop string starts with."""
        for length in range(max((len(stop) for stop in self._stop), default=1) - 1, 0, -1):
            if any(len(stop) > length and self.text.endswith(stop[:length]) for stop in self._stop):
                return length
        return 0

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def token_text(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """One token as text, special tokens by their names."""
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
