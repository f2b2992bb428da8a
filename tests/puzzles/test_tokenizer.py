"""The shipped tokenizer: any text survives it, and what the model was taught is in whole words."""

import re

import numpy as np
import pytest
from transformers import AutoTokenizer

from puzzles import demo_model_path, gen_prompt, gen_puzzle, side_neighbor_fn_defs
from puzzles.smalltalk import CHATS
from puzzles.tokenizer import CHAT_TEMPLATE, build_tokenizer

# Code points: ASCII with controls, Latin, Cyrillic, Arabic, Chinese, emoji, combining marks, spaces.
RANGES = [(0x00, 0x7F), (0xA0, 0x24F), (0x400, 0x4FF), (0x600, 0x6FF), (0x4E00, 0x9FFF)]
RANGES += [(0x1F300, 0x1FAFF), (0x300, 0x36F), (0x2000, 0x206F)]


def random_texts(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        picks = rng.integers(len(RANGES), size=rng.integers(1, 60))
        yield "".join(chr(rng.integers(RANGES[pick][0], RANGES[pick][1] + 1)) for pick in picks)


def round_trip(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n\n",
        "Hello , world ! it 's",
        "tab\there, CRLF\r\nthere,\x0b\x0c\u2028 and\u00a0more",
        "héllo Ünïcode 汉字 🦜👩🏽‍🚀",
        "<|im_start|>user\nhi<|im_end|>",
        "<|im_start> |im_end|> <|endoftext|><|unknown|> </s> [MASK]",
        "  K  B K\tG\n",
        "ĠK Ċ Ġhello",
    ],
)
def test_a_text_survives_encoding_and_decoding(shipped_tokenizer, text):
    assert round_trip(shipped_tokenizer, text) == text


def test_random_unicode_survives_encoding_and_decoding(shipped_tokenizer):
    for text in random_texts(300):
        assert round_trip(shipped_tokenizer, text) == text


def test_the_cells_are_single_tokens_in_the_order_of_the_colours(shipped_tokenizer):
    ids = shipped_tokenizer.encode(" K B G R Y", add_special_tokens=False)
    assert shipped_tokenizer.convert_ids_to_tokens(ids) == ["ĠK", "ĠB", "ĠG", "ĠR", "ĠY"]
    assert shipped_tokenizer.encode(" KB", add_special_tokens=False) != ids[:2]


def test_the_marker_of_an_output_is_as_long_as_the_turn_of_the_assistant(shipped_tokenizer):
    marker = shipped_tokenizer.encode("\n\nOutput:\n", add_special_tokens=False)
    turn = shipped_tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    assert len(marker) == len(turn) == 5


def test_every_word_of_the_definitions_prompts_and_small_talk_is_one_token(shipped_tokenizer):
    texts = [*side_neighbor_fn_defs.values(), gen_prompt(gen_puzzle())[0]]
    texts += [text for answer, questions in CHATS for text in (answer, *questions)]
    for word in {word for text in texts for word in re.findall(" ?[A-Za-z]+", text)}:
        assert len(shipped_tokenizer.encode(word, add_special_tokens=False)) == 1, word


def test_the_shipped_files_are_what_the_code_builds(shipped_tokenizer):
    built = build_tokenizer()
    assert built.get_vocab() == shipped_tokenizer.get_vocab()
    assert shipped_tokenizer.chat_template == CHAT_TEMPLATE
    for text in random_texts(20):
        assert built.encode(text) == shipped_tokenizer.encode(text)


def test_the_template_writes_system_user_and_assistant_turns(shipped_tokenizer):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]
    assert shipped_tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nhello<|im_end|>\n"
    )
    asked = shipped_tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("hi<|im_end|>\n<|im_start|>assistant\n")


def test_padding_and_the_end_of_a_turn_are_special_tokens():
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer.model_max_length == 2048
