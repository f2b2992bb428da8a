"""Models for comparisons: another tokenizer, and models whose next token never depends on what came before."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from attribution.model.load import trace_model
from tests.models import tiny_model, tiny_tokenizer

BOS = "<s>"


def byte_tokenizer(*, bos: bool = False, adds: bool = False, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """One token for each byte, without merges.

    Args:
        bos: whether it has a token to begin with.
        adds: whether it puts that before every text by itself.
        lowercase: whether it reads every text in lower case.
    """
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: at for at, symbol in enumerate(symbols)}, []))
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS])
    if adds:
        start = (BOS, backend.token_to_id(BOS))
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[start])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS if bos else None)


def blank_tokenizer(*, prepends: bool = False) -> PreTrainedTokenizerFast:
    """Tokens that begin with a blank, and bytes for unknown characters, as Gemma's.

    Args:
        prepends: whether a blank is put before every text, as Llama 2's does.
    """
    special, words = ["<unk>", "<s>"], ["▁", *"abcdefghijklmnopqrstuvwxyz", "th", "the", "▁the", "ca", "cat", "▁cat"]
    vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    ids = {token: at for at, token in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepends else replace
    strip = [decoders.Strip(" ", 1, 0)] if prepends else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


def unigram(name: str, tokenizer: Any, weights: list[float]) -> Any:
    """A model that gives token t the probability weights[t] / Σ weights, whatever came before it."""
    module = tiny_model("gpt2", vocab_size=len(weights))
    with torch.no_grad():
        module.transformer.ln_f.weight.zero_()
        module.transformer.ln_f.bias.zero_()[0] = 1.0  # of every token the final stream is this one vector
        module.lm_head.weight[:, 0] = torch.tensor(weights).log()
    return trace_model(name, module, tokenizer)


def bytes_of(tokenizer: Any, token: int) -> bytes:
    """What a token of a byte-level tokenizer stands for."""
    table = {symbol: byte for byte, symbol in _bytes_to_symbols().items()}
    return bytes(table[symbol] for symbol in tokenizer.convert_ids_to_tokens(token))


def _bytes_to_symbols() -> dict[int, str]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}


def tiny(name: str, family: str = "llama", seed: int = 0, *, add_bos: bool = False) -> Any:
    """A tiny random model, with or without a token to begin with."""
    return trace_model(name, tiny_model(family, seed), tiny_tokenizer(add_bos=add_bos))
