"""A puzzle made ready for a model."""

import pytest

from puzzles import COLOURS, PuzzleError, Result, gen_puzzle, side_neighbor_fn_defs


@pytest.mark.parametrize("fn_defs", [None, side_neighbor_fn_defs])
def test_positions_labels_and_candidates_index_the_tokens_of_the_conversation(shipped_tokenizer, fn_defs):
    puzzle = gen_puzzle(n=4, m=5, n_train=3, seed=5)
    result = Result.from_puzzle(puzzle, shipped_tokenizer, index=2, fn_defs=fn_defs)
    ids = shipped_tokenizer.encode(result.prompt, add_special_tokens=False)
    assert [shipped_tokenizer.decode([ids[i]]) for i in result.answer_indices] == [f" {a}" for a in result.answers]
    assert [ids[i] for i in result.answer_indices] == result.labels
    assert shipped_tokenizer.decode(result.candidate_ids) == " K B G R Y"
    assert result.labels == [result.candidate_ids[COLOURS.index(letter)] for letter in result.answers]
    assert result.answers == [cell for row in puzzle.test_output for cell in row]
    assert (result.index, result.outputs) == (2, None)
    assert result.puzzle.ranges.answer[0][0] == (result.answer_indices[0], result.answer_indices[0] + 1)


def test_a_query_lies_one_before_its_answer(shipped_tokenizer):
    result = Result.from_puzzle(gen_puzzle(n=3, m=3), shipped_tokenizer)
    ids = shipped_tokenizer.encode(result.prompt, add_special_tokens=False)
    assert result.query_positions == [position - 1 for position in result.answer_indices]
    # the first cell is predicted at the newline after "assistant", the fourth at the newline before its row
    assert shipped_tokenizer.decode([ids[result.query_positions[0]]]) == "\n"
    assert shipped_tokenizer.decode([ids[result.query_positions[3]]]) == "\n"
    assert result.query_positions[1] == result.answer_indices[0]


def test_the_conversation_is_the_chat_template_over_both_turns(shipped_tokenizer):
    result = Result.from_puzzle(gen_puzzle(n=3, m=3), shipped_tokenizer)
    assert result.prompt.startswith("<|im_start|>user\nInput:\n")
    assert result.prompt.count("<|im_start|>") == 2
    assert result.prompt.endswith("<|im_end|>\n")


def test_a_tokenizer_in_which_a_cell_is_no_single_token_is_refused(byte_level_tokenizer):
    merged = byte_level_tokenizer.encode(" K", add_special_tokens=False)
    letters = [len(byte_level_tokenizer.encode(f" {c}", add_special_tokens=False)) for c in COLOURS]
    assert len(merged) == 1  # the tokenizer knows the cells of its training text ...
    assert letters == [1] * 5
    Result.from_puzzle(gen_puzzle(n=3, m=3), byte_level_tokenizer)
    plain = type(byte_level_tokenizer)(tokenizer_object=_without_merges())
    plain.chat_template = byte_level_tokenizer.chat_template
    with pytest.raises(PuzzleError, match="' K' is 2 tokens"):
        Result.from_puzzle(gen_puzzle(n=3, m=3), plain)


def _without_merges():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def test_uneven_lists_and_a_position_without_a_predecessor_are_refused():
    with pytest.raises(PuzzleError, match="one entry per cell, not 2, 1 and 1"):
        Result(0, "x", ["K", "B"], [4], [3], [3, 4])
    with pytest.raises(PuzzleError, match="position 0 is predicted nowhere"):
        Result(0, "x", ["K"], [0], [3], [3, 4])


def test_a_text_of_any_kind_is_a_result_with_its_answer(shipped_tokenizer):
    result = Result.from_text(3, "Hello, I am", " demo", shipped_tokenizer, candidates=[" K", " B"])
    ids = shipped_tokenizer.encode("Hello, I am demo")
    assert shipped_tokenizer.encode(result.prompt, add_special_tokens=False) == ids
    assert result.labels == ids[result.answer_indices[0] :]
    assert result.query_positions == [at - 1 for at in result.answer_indices]
    assert "".join(result.answers) == " demo"
    assert result.candidate_ids == [shipped_tokenizer.encode(one)[0] for one in (" K", " B")]
    assert Result.from_text(0, "Hello", " there", shipped_tokenizer).candidate_ids is None


def test_a_text_whose_answer_cannot_be_told_apart_is_refused(shipped_tokenizer):
    with pytest.raises(PuzzleError, match="by tokens of its own"):
        Result.from_text(0, "Hello", "", shipped_tokenizer)
    with pytest.raises(PuzzleError, match="it must be one"):
        Result.from_text(0, "Hello", " there", shipped_tokenizer, candidates=["no token of its own"])
