"""What the model is trained on: token ids, and a weight for each."""

import numpy as np
import pytest

from puzzles.corpus import (
    STAGES,
    Row,
    Stage,
    cached_encoder,
    chat_batch,
    draw_puzzles,
    puzzle_batch,
    write_turn,
)
from puzzles.layout import CANONICAL, Layout, format_grid
from puzzles.smalltalk import CHATS, EXAMPLE, FALLBACK, dress, random_text
from puzzles.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def encode(tokenizer):
    return cached_encoder(tokenizer)


def one_puzzle(n_examples=3):
    return draw_puzzles(np.random.default_rng(0), STAGES[-1], n_examples, 3, 4, 1)[0]


def test_a_row_has_the_ids_of_the_templated_conversation(tokenizer, encode):
    puzzle = one_puzzle()
    for layout in (CANONICAL, Layout("\n", "\n", "\n\n", "\n", "\n\nOutput:", first_cell_spaced=False)):
        row = Row(encode)
        write_turn(row, layout, puzzle, "Rule: shift up")
        user = layout.prompt(puzzle[1], puzzle[2], "Rule: shift up")
        turns = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": format_grid(puzzle[3])},
        ]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        assert row.ids == tokenizer.encode(text.removesuffix("\n"))


def test_the_answer_and_the_later_outputs_bear_weight_and_the_inputs_none(tokenizer, encode):
    puzzle = one_puzzle(2)
    row = Row(encode)
    write_turn(row, CANONICAL, puzzle, "")
    by_weight = {
        weight: tokenizer.decode([i for i, w in zip(row.ids, row.weights, strict=True) if w == weight])
        for weight in (0.3, 1.0, 2.0)
    }
    first, second = (format_grid(output).replace("\n", "") for _, output in puzzle[1])
    assert by_weight == {0.3: first, 1.0: second + "<|im_end|>", 2.0: format_grid(puzzle[3])}
    marked = [i for i, answer in zip(row.ids, row.answer, strict=True) if answer]
    assert tokenizer.decode(marked) == format_grid(puzzle[3]).replace("\n", "")


def test_batches_are_pure_and_pad_on_the_right_without_weight(encode):
    first, again = (puzzle_batch(np.random.default_rng([0, 1]), encode, STAGES[-1]) for _ in range(2))
    assert (first.ids == again.ids).all()
    assert (first.weights[first.ids == 0] == 0).all()
    assert ((first.ids == 0).cumsum(1) > 0).sum() == (first.ids == 0).sum()


def test_a_stage_draws_only_its_relations_and_sides(encode):
    stage = Stage(2, (3,), 0.0)
    drawn = draw_puzzles(np.random.default_rng(0), stage, 3, 3, 3, 50)
    assert {puzzle[0] for puzzle in drawn} == {"shift right", "shift left"}
    kinds = {puzzle_batch(np.random.default_rng(i), encode, STAGES[2]).kind for i in range(30)}
    assert kinds == {"3x3", "3x4", "4x3", "4x4"}


def test_every_known_question_is_asked_of_one_answer_only_and_random_text_gets_the_fallback(tokenizer, encode):
    questions = [question for _, known in CHATS for question in known]
    assert len(questions) == len(set(questions))
    batch = chat_batch(np.random.default_rng(0), encode)
    texts = [tokenizer.decode(ids) for ids in batch.ids]
    answers = [answer for answer, _ in CHATS]
    assert all(any(f"assistant\n{answer}<|im_end|>" in text for answer in answers) for text in texts)
    assert FALLBACK.endswith(EXAMPLE)


def test_questions_and_random_texts_vary_and_depend_on_the_generator_alone():
    draws = [[dress(np.random.default_rng(s), "hello there") for s in range(50)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert {text.strip(" ?!.:)\n").lower() for text in draws[0]} == {"hello there"}
    assert len(set(draws[0])) > 10
    assert len({random_text(np.random.default_rng(s)) for s in range(50)}) > 45
