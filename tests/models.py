"""Tiny random models of every family, and a tiny tokenizer: what the tests run in place of real checkpoints.

All sizes differ (3 layers, 6 heads, 2 kv heads, d_head 10, d_model 48, d_mlp 44, 281 tokens), so that a
transposed axis fails. Biases and norm weights are random too: their usual zeros and ones hide mistakes.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

torch.set_num_threads(1)  # matrices this small are ten times slower when threads wait for each other

FAMILIES = ("qwen2", "qwen3", "llama", "gemma2", "gpt2")
N_LAYERS, N_HEADS, N_KV_HEADS, D_HEAD, D_MODEL, D_MLP = 3, 6, 2, 10, 48, 44
WINDOW = 256
SLIDING_WINDOW = 5  # of Gemma 2's layers 0 and 2

_SPECIAL = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
_MERGES = "Ġ t|h e|i n|Ġ a|Ġt he|r e|o n|e r|Ġ s|a t|e n|o r|Ġ c|in g|i s|a n|Ġ o|o u|l l|Ġ w|e s"  # 21
VOCAB = 256 + 21 + len(_SPECIAL)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(family: str, seed: int = 0, **config_changes: Any) -> Any:
    """A random transformers model of `family` in eval mode; the same arguments give the same weights."""
    common = {
        "vocab_size": VOCAB,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,  # tied, a random model says the same token over and over
    }
    sizes = {
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV_HEADS,
        "intermediate_size": D_MLP,
        "max_position_embeddings": WINDOW,
    }
    # softcaps so low that they bend every score; every second layer slides
    gemma = {
        "sliding_window": SLIDING_WINDOW,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 6.0,
    }
    gpt2_sizes = {
        "n_embd": D_MODEL,
        "n_layer": N_LAYERS,
        "n_head": N_HEADS,
        "n_inner": D_MLP,
        "n_positions": WINDOW,
    }
    config_class, model_class, own = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, sizes),  # d_head is d_model / heads = 8
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, sizes | {"head_dim": D_HEAD}),
        "llama": (LlamaConfig, LlamaForCausalLM, sizes | {"head_dim": D_HEAD}),
        "gemma2": (Gemma2Config, Gemma2ForCausalLM, sizes | {"head_dim": D_HEAD} | gemma),
        "gpt2": (GPT2Config, GPT2LMHeadModel, gpt2_sizes),
    }[family]
    model = model_class(config_class(**(common | own | config_changes)))
    return randomised(model, seed)


def randomised(model: Any, seed: int) -> Any:
    """Draw every weight of `model` anew: matrices of deviation 0.3, biases and norms near where they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = 0.3 * torch.randn(weight.shape, generator=generator)
            weight.copy_(noise if weight.dim() > 1 else weight + noise)
    return model.eval()


def tiny_tokenizer(*, add_bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE with 21 merges, ChatML's special tokens and template; any text comes back as it was.

    With `add_bos`, raw text starts with `<|endoftext|>`, as Llama's and Gemma's tokenizers do it.
    """
    merges = [tuple(merge.split(" ")) for merge in _MERGES.split("|")]
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_SPECIAL))
    if add_bos:
        bos = (_SPECIAL[0], backend.token_to_id(_SPECIAL[0]))
        backend.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_SPECIAL[0] if add_bos else None,
        pad_token=_SPECIAL[1],
        eos_token=_SPECIAL[3],
        additional_special_tokens=[_SPECIAL[0], _SPECIAL[2]],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    assert len(tokenizer) == VOCAB
    return tokenizer


@cache
def traced(family: str, seed: int = 0, attn_implementation: str | None = None) -> Any:
    """The `TracedModel` of `tiny_model(family, seed)`, named "tiny-<family>"; it is shared by all tests."""
    from attribution.model.load import trace_model

    model = tiny_model(family, seed)
    if attn_implementation:
        model.set_attn_implementation(attn_implementation)
    return trace_model(f"tiny-{family}", model, tiny_tokenizer())


def save_tiny(family: str, folder: Path, seed: int = 0, **config_changes: Any) -> Path:
    """A folder from which `tiny_model(family, seed, …)` and the tokenizer load by path."""
    tiny_model(family, seed, **config_changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
