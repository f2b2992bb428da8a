"""The model that the serving benchmarks run: a random Qwen3 of 24 M parameters with the embedded model's tokenizer."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from puzzles import demo_model_path

PROMPT = "Input:\n K B G R Y\n R R K K B\n"


def build(folder: Path) -> Path:
    """Write the model to `folder`: hidden 512, 8 layers, 8 heads, 2 key/value heads, MLP 1536, no end token."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompt(index: int, words: int = 24) -> str:
    """A prompt of its own for each client, all of one length."""
    colours = " K", " B", " G", " R", " Y"
    return "Input:\n" + "".join(colours[(index * 7 + i * i) % 5] for i in range(words)) + "\n"
