"""The embedded model's tokenizer: whole words without merges, every other text byte by byte.

A word is one token if the vocabulary has it, with its leading space where it has one; what is not in the
vocabulary falls apart into bytes, so any text survives encoding and decoding. A cell with its leading space
is one token.
"""

import re

from puzzles.relations import COLOURS, side_neighbor_fn_defs
from puzzles.smalltalk import CHATS, PREAMBLES, SYSTEM_LINES

PAD, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MAX_LENGTH = 2048
_PIECES = r"\n| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s"
_ROLES_AND_MARKERS = "system user assistant Input: Output: Rule: Which rule? color colors Color Colour"


def _byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes in byte-level BPE, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def words() -> list[str]:
    """Every word of the definitions, markers and small talk, sorted; single letters are bytes already."""
    texts = [_ROLES_AND_MARKERS, *side_neighbor_fn_defs.values(), *SYSTEM_LINES, *PREAMBLES]
    for answer, questions in CHATS:
        texts += [answer, *questions, *(question.capitalize() for question in questions)]
    found = {word for text in texts for word in re.findall("[A-Za-z]+", text)}
    return sorted(word for word in found if len(word) > 1)


def vocabulary() -> dict[str, int]:
    """Token to id: 3 special tokens, 5 colours with their space, 256 bytes, then the words."""
    tokens = [
        PAD,
        TURN_START,
        TURN_END,
        *(f"Ġ{letter}" for letter in COLOURS),
        *_byte_alphabet(),
        "ĠI",
        "Ġa",
        "ĠA",
    ]
    tokens += [form for word in words() for form in (word, f"Ġ{word}")]
    return {token: i for i, token in enumerate(tokens)}


def build_tokenizer():
    """The fast tokenizer, with its chat template, as ``AutoTokenizer.from_pretrained`` loads it again."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab=vocabulary(), merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in (PAD, TURN_START, TURN_END)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=TURN_END,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
