"""Conversations to collect activations from: the corpus that the embedded model was trained on, drawn anew.

Rows of what the model itself has to say are kept; of the rest, inputs and questions, which are most of a prompt, only a
part is, so that what is learnt from the rows is about answers as much as about prompts.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from puzzles.corpus import STAGES, Encode, chat_batch, puzzle_batch

TEXT_STREAM = 2
"""First word of every seed here: neither the model's training nor ``gen_puzzle`` draws from it."""

CHAT_EVERY = 20
NAMED = 0.08
KEPT = 0.4
"""The share of small talk among the batches is 1 / CHAT_EVERY, of puzzles whose rule is named NAMED, and of tokens that
the model was not trained to predict, and that stand before none that it was, KEPT."""


def draw_texts(encode: Encode, seed: int = 0) -> Iterator[tuple[list[int], list[bool]]]:
    """Without end: the token ids of a conversation, and of each token whether its row is kept."""
    stage = replace(STAGES[-1], named=NAMED)
    number = 0
    while True:
        draw = np.random.default_rng([TEXT_STREAM, seed, number])
        chat = number % CHAT_EVERY == CHAT_EVERY - 1
        batch = chat_batch(draw, encode) if chat else puzzle_batch(draw, encode, stage)
        lengths = (batch.ids != 0).sum(axis=1)
        for ids, weights, length in zip(batch.ids, batch.weights, lengths, strict=True):
            said = weights[:length] > 0
            keep = said | np.append(said[1:], False) | (draw.random(length) < KEPT)
            yield ids[:length].tolist(), keep.tolist()
        number += 1
