"""Conversations to collect activations from: the corpus that the embedded model was trained on, drawn anew.

Rows of what the model itself has to say are kept; of the cells of inputs, which are most of a prompt, and of the words
and signs around them, which are the same in every prompt, only a part is: what is learnt from the rows is then about
answers as much as about prompts.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from puzzles.corpus import STAGES, Encode, chat_batch, puzzle_batch
from puzzles.relations import COLOURS

TEXT_STREAM = 2
"""First word of every seed here: neither the model's training nor ``gen_puzzle`` draws from it."""

CHAT_EVERY = 20
NAMED = 0.08
KEPT_CELLS, KEPT_WORDS = 0.5, 0.15
"""Of the batches 1 in CHAT_EVERY is small talk, and of the puzzles the share NAMED names its rule. Tokens that the
model was trained to predict, or that stand before such a one, are kept; of others a part, by whether they are cells."""


def draw_texts(encode: Encode, seed: int = 0) -> Iterator[tuple[list[int], list[bool]]]:
    """Without end: the token ids of a conversation, and of each token whether its row is kept."""
    stage = replace(STAGES[-1], named=NAMED)
    cells = [encode(f" {colour}")[0] for colour in COLOURS]
    number = 0
    while True:
        draw = np.random.default_rng([TEXT_STREAM, seed, number])
        chat = number % CHAT_EVERY == CHAT_EVERY - 1
        batch = chat_batch(draw, encode) if chat else puzzle_batch(draw, encode, stage)
        lengths = (batch.ids != 0).sum(axis=1)
        for ids, weights, length in zip(batch.ids, batch.weights, lengths, strict=True):
            said = weights[:length] > 0
            share = np.where(np.isin(ids[:length], cells), KEPT_CELLS, KEPT_WORDS)
            keep = said | np.append(said[1:], False) | (draw.random(length) < share)
            yield ids[:length].tolist(), keep.tolist()
        number += 1
