"""Tokenizers and the shipped model for the tests of the puzzles."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from puzzles import demo_model_path, gen_prompt, gen_puzzle

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="session")
def shipped_tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture
def byte_level_tokenizer():
    """A byte-level BPE tokenizer with merges of its own, trained on a few prompts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [gen_prompt(gen_puzzle(seed=seed))[0] for seed in range(4)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = TEMPLATE
    return tokenizer
