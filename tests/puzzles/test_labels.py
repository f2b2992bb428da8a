"""The labels of tokens, by hand on a small puzzle, and the explanations that are found with them."""

import numpy as np
import pytest

from puzzles.corpus import cached_encoder
from puzzles.explain import Explainer, f1, holds
from puzzles.labels import held_out_conversations, label_matrix, label_puzzle, label_talk, sentence
from puzzles.layout import format_grid
from puzzles.prompts import build_conversation, gen_prompt
from puzzles.puzzle import Puzzle, gen_puzzle
from puzzles.relations import side_neighbor_fn_defs
from puzzles.texts import draw_texts
from puzzles.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
ENCODE = cached_encoder(TOKENIZER)


@pytest.mark.parametrize("named", [False, True])
def test_a_labelled_conversation_has_the_tokens_of_the_templated_one(named):
    puzzle = gen_puzzle("cover up", 3, 4, 2, 5)
    prompt, _, puzzle = gen_prompt(puzzle, side_neighbor_fn_defs if named else None, TOKENIZER)
    whole = build_conversation(prompt, format_grid(puzzle.test_output), TOKENIZER)
    found = label_puzzle(puzzle, ENCODE, named=named, asks=True)
    text = whole.text.rstrip("\n") + (
        "\n<|im_start|>user\nWhich rule?<|im_end|>\n<|im_start|>assistant\ncover up<|im_end|>"
    )
    assert found.token_ids == TOKENIZER.encode(text, add_special_tokens=False)
    assert puzzle.ranges is not None
    assert found.answer == [start for row in puzzle.ranges.answer for start, _ in row]


def test_the_labels_of_a_cell_are_those_that_one_reads_off_the_grids():
    # shift right: every cell takes the colour of its left neighbour
    grids = {"given": (("R", "K", "B"), ("K", "G", "K")), "answer": (("K", "R", "K"), ("K", "K", "G"))}
    puzzle = Puzzle("shift right", ((grids["given"], grids["answer"]),), grids["given"], grids["answer"], 0)
    found = label_puzzle(puzzle, ENCODE)
    second = found.labels[found.answer[1]]
    assert second == {
        "part": "answer", "colour": "R", "row": "1", "column": "2", "place": "not last in its row",
        "input": "K", "changed": "changed", "left": "R", "right": "B", "upper": "outside", "lower": "G",
        "verb": "shift", "direction": "right",
        "next part": "answer", "next colour": "K", "next row": "1", "next column": "3",
        "next place": "last in its row", "next input": "B", "next changed": "changed", "next left": "K",
        "next right": "outside", "next upper": "outside", "next lower": "K",
    }  # fmt: skip
    # before the first cell stands the newline of the template, which predicts it
    before = found.labels[found.answer[0] - 1]
    assert (before["part"], before["next colour"], before["next left"]) == ("template", "K", "outside")
    first_input = next(one for one in found.labels if one["part"] == "example input" and "colour" in one)
    assert (first_input["colour"], first_input["example"], first_input["right"]) == ("R", "1", "K")
    assert "input" not in first_input
    # six cells, the newline between their rows, and no more
    assert sum(found.said) == 7


def test_small_talk_is_labelled_by_who_says_it():
    found = label_talk("hello", "Good.", ENCODE)
    parts = {one["part"] for one in found.labels}
    assert parts == {"template", "talk", "reply"}
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nGood.<|im_end|>"
    assert TOKENIZER.decode(found.token_ids) == text
    assert sum(found.said) == len(ENCODE("Good."))


def test_a_matrix_has_the_labels_that_hold_often_enough():
    conversations = list(held_out_conversations(ENCODE, 3, 1))[:6]
    known, matrix = label_matrix(conversations, at_least=40)
    tokens = [one for conversation in conversations for one in conversation.labels]
    assert matrix.shape == (len(tokens), len(known))
    assert (matrix.sum(axis=0) >= 40).all()
    column = known.index(("colour", "B"))
    assert matrix[:, column].tolist() == [one.get("colour") == "B" for one in tokens]
    again, same = label_matrix(conversations, known)
    assert again == known
    assert (same == matrix).all()


def test_sentences_say_what_labels_mean():
    said = sentence([("next part", "answer"), ("next colour", "B"), ("part", "answer")], TOKENIZER.decode)
    assert said == "before a blue (B) cell, in the answer"
    assert sentence([("left", "outside")], TOKENIZER.decode) == (
        "on a cell where there is no left neighbour in the input"
    )
    assert sentence([("verb", "erase")], TOKENIZER.decode) == "where the rule's verb is 'erase'"
    assert sentence([("token", str(ENCODE("Input")[0]))], TOKENIZER.decode) == "on the token 'Input'"


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    fires, true = np.array([1, 1, 1, 0, 0, 0], bool), np.array([1, 1, 0, 1, 0, 0], bool)
    # precision 2/3, recall 2/3
    assert f1(fires, true) == pytest.approx(2 / 3)
    assert f1(np.zeros(3, bool), np.zeros(3, bool)) == 0


def test_the_explainer_finds_one_two_or_three_planted_labels_and_the_level():
    draw = np.random.default_rng(0)
    matrix = draw.random((4000, 12)) < 0.4
    explainer = Explainer(matrix)
    for labels in ((3,), (1, 7), (0, 5, 9)):
        found = explainer.explain(np.where(holds(matrix, labels), 1 + draw.random(4000), 0.0))
        assert found is not None
        assert (sorted(found.labels), found.f1) == (list(labels), 1.0)
        assert found.level == 0
    # weak firing everywhere, strong firing where a label holds: the level tells them apart
    found = explainer.explain(np.where(matrix[:, 4], 10.0, 1.0))
    assert found is not None
    assert (found.labels, found.level, found.f1) == ((4,), 2.5, 1.0)
    assert explainer.explain(np.eye(1, 4000)[0]) is None


def test_texts_are_conversations_of_which_what_the_model_says_is_kept():
    texts = draw_texts(ENCODE, seed=1)
    kept = whole = 0
    for _ in range(60):
        ids, keep = next(texts)
        assert len(ids) == len(keep)
        assert 0 not in ids
        text = TOKENIZER.decode(ids)
        if "Input:" in text:
            answer = text[text.rindex("assistant\n") + 10 :].removesuffix("<|im_end|>")
            cells = ENCODE(answer + "<|im_end|>")
            assert all(keep[-len(cells) :])
        kept, whole = kept + sum(keep), whole + len(keep)
    assert 0.4 < kept / whole < 0.9
    assert next(draw_texts(ENCODE, seed=1)) == next(draw_texts(ENCODE, seed=1))
    assert next(draw_texts(ENCODE, seed=1)) != next(draw_texts(ENCODE, seed=2))
