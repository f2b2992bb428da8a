"""Train the embedded model from scratch: ``python -m puzzles.train --out DIR --minutes 60 --seed 0``.

1. Build the tokenizer and a small Qwen3 (q/k-norm weights start at 1.7, so that heads can attend sharply early).
2. Take two fresh batches at every step, one for each of two threads, which share the weights and add up their
   gradients; go to the next stage of the curriculum when the answers are mostly right, or when its time is over.
3. Step Muon on the hidden matrices and AdamW on the rest; constant rate, then cosine decay over the last 40 % of
   the time.
4. Save every two minutes and at the end.

Everything runs on a CPU in float32. Where page faults are dear (a virtual machine), glibc's habit of giving memory
back at every step costs a third of the time; ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
MALLOC_TOP_PAD_=268435456`` in the environment ends it.
"""

import argparse
import copy
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

from puzzles.corpus import STAGES, Batch, cached_encoder, chat_batch, puzzle_batch
from puzzles.optimizer import Muon
from puzzles.shipping import save_model
from puzzles.tokenizer import MAX_LENGTH, PAD, TURN_END, build_tokenizer

TRAIN_STREAM = 0
MUON_RATE, ADAM_RATE = 0.02, 3e-3
WARMUP_STEPS, DECAY_SHARE = 100, 0.4
NEXT_STAGE_AT = 0.93
STAGE_ENDS = (0.08, 0.14, 0.34, 1.0)
CHAT_EVERY = 8
THREADS = 2
SAVE_EVERY = 120.0
QUERY_BLOCK = 96
ATTENTION = "puzzles_plain"


def plain_attention(_module, query, key, value, _mask, scaling, **_options):
    """Causal attention as matrix products over blocks of queries: for the backward's speed on a CPU.

    ``query [rows, heads, pos, width]``, ``key`` and ``value`` with fewer heads. Padding is on the right,
    where the causal mask hides it already.
    """
    rows, heads, length, width = query.shape
    groups = heads // key.shape[1]
    key, value = (states.repeat_interleave(groups, dim=1).flatten(0, 1) for states in (key, value))
    query = query.flatten(0, 1)
    future = torch.full((length, length), -1e9).triu(1)
    outputs = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        scores = torch.baddbmm(future[start:end, :end], query[:, start:end], key[:, :end].mT, alpha=scaling)
        outputs.append(torch.bmm(scores.softmax(-1), value[:, :end]))
    return torch.cat(outputs, dim=1).view(rows, heads, length, width).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, plain_attention)


def build_model(tokenizer, start_from: str | Path | None = None) -> Qwen3ForCausalLM:
    """The untrained model, or the one in the folder ``start_from``."""
    if start_from is not None:
        return Qwen3ForCausalLM.from_pretrained(start_from, attn_implementation=ATTENTION)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        intermediate_size=384,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation(ATTENTION)
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            nn.init.constant_(weight, 1.7)
    return model


def build_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding and the norms."""
    hidden = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed" not in name]
    rest = [weight for name, weight in model.named_parameters() if weight.ndim != 2 or "embed" in name]
    return [
        Muon(hidden, lr=MUON_RATE),
        torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(step: int, progress: float) -> float:
    """Warm up, stay, then fall along a cosine to zero; ``progress`` is the share of the time, 0 to 1."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    into_decay = max(0.0, progress - (1 - DECAY_SHARE)) / DECAY_SHARE
    return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, into_decay)))


def loss_and_accuracy(model: Qwen3ForCausalLM, batch: Batch) -> tuple[torch.Tensor, float]:
    """Weighted mean cross-entropy in nats, and the share of answer cells predicted right (NaN without)."""
    ids, weights = torch.from_numpy(batch.ids), torch.from_numpy(batch.weights)
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    targets, weights = ids[:, 1:], weights[:, 1:]
    wanted = weights > 0
    logits = model.lm_head(hidden[wanted]).float()
    losses = nn.functional.cross_entropy(logits, targets[wanted], reduction="none")
    loss = (losses * weights[wanted]).sum() / weights.sum()
    answer = torch.from_numpy(batch.answer)[:, 1:][wanted]
    right = logits.detach().argmax(-1)[answer] == targets[wanted][answer]
    return loss, right.float().mean().item()


class Progress:
    """Running accuracy per kind of batch, the current stage, and a line on stderr now and then."""

    def __init__(self, stage: int = 0) -> None:
        self.stage = stage
        self.accuracy: dict[str, float] = {}
        self.seen: dict[str, int] = defaultdict(int)
        self.chat_loss = float("nan")

    def note(self, kind: str, loss: float, accuracy: float) -> None:
        """Take in one step's result."""
        if kind == "chat":
            self.chat_loss = loss
            return
        self.seen[kind] += 1
        before = self.accuracy.get(kind, accuracy)
        self.accuracy[kind] = before + (accuracy - before) * 0.03

    def advance(self, progress: float) -> None:
        """Go to the next stage when every shape of this one is mostly right, or when its time is over."""
        shapes = len(STAGES[self.stage].sides) ** 2
        known = [self.accuracy[kind] for kind, count in self.seen.items() if count >= 40]
        mastered = len(known) >= shapes and min(known) >= NEXT_STAGE_AT
        if self.stage + 1 < len(STAGES) and (mastered or progress > STAGE_ENDS[self.stage]):
            self.stage += 1
            self.seen.clear()

    def report(self, step: int, seconds: float) -> None:
        """One line on stderr: running accuracy of answer cells per shape, in all ways of asking."""
        shapes = " ".join(f"{kind} {share:.4f}" for kind, share in sorted(self.accuracy.items()))
        line = f"{seconds:6.0f} s  step {step:6d}  stage {self.stage}  talk loss {self.chat_loss:.3f}  {shapes}"
        sys.stderr.write(line + "\n")


def train(
    out_dir: str | Path,
    minutes: float = 60.0,
    seed: int = 0,
    start_from: str | Path | None = None,
    rate: float = 1.0,
    report_every: float = 20.0,
) -> Path:
    """Train for ``minutes`` of wall-clock time and save the model to ``out_dir``; returns that folder.

    The decay is tied to ``minutes``: a run that is stopped early leaves a checkpoint of the constant rate.
    ``start_from`` takes the weights of such a folder and begins with the last stage (give another ``seed``,
    for other data, and a ``rate`` below 1, which scales all learning rates). ``report_every`` is in seconds.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    encode = cached_encoder(tokenizer)
    model = build_model(tokenizer, start_from).train()
    optimizers = build_optimizers(model)
    replicas = replicate(model, THREADS)
    progress = Progress(stage=len(STAGES) - 1 if start_from else 0)
    start, step, next_report, next_save = time.monotonic(), 0, report_every, SAVE_EVERY
    torch.set_num_threads(1)
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while (seconds := time.monotonic() - start) < 60 * minutes:
            share = seconds / (60 * minutes)
            numbers = range(THREADS * step, THREADS * (step + 1))
            batches = [draw_batch(encode, progress.stage, seed, number) for number in numbers]
            for result in take_step(replicas, pool, optimizers, batches, rate * rate_factor(step, share)):
                progress.note(*result)
            progress.advance(share)
            step += 1
            if seconds > next_report:
                progress.report(step, seconds)
                next_report = seconds + report_every
            if seconds > next_save:
                save_model(model, tokenizer, out_dir)
                next_save = seconds + SAVE_EVERY
    save_model(model, tokenizer, out_dir)
    progress.report(step, seconds)
    return Path(out_dir)


def draw_batch(encode, stage: int, seed: int, number: int) -> Batch:
    """The batch of this number: every ``CHAT_EVERY``-th is small talk."""
    rng = np.random.default_rng([TRAIN_STREAM, seed, number])
    if number % CHAT_EVERY == CHAT_EVERY - 1:
        return chat_batch(rng, encode)
    return puzzle_batch(rng, encode, STAGES[stage])


def take_step(
    replicas: Sequence, pool: Executor, optimizers: Sequence, batches: Sequence[Batch], factor: float
) -> list:
    """One optimizer step at ``factor`` of the full rates; returns (kind, loss, accuracy) of every batch."""
    results = list(pool.map(backward, replicas, batches))
    for shared, *others in zip(*(replica.parameters() for replica in replicas), strict=True):
        for other in others:
            shared.grad.add_(other.grad)
            other.grad = None
        shared.grad.div_(len(replicas))
    nn.utils.clip_grad_norm_(replicas[0].parameters(), 1.0)
    for optimizer, rate in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return results


def backward(model: Qwen3ForCausalLM, batch: Batch) -> tuple[str, float, float]:
    """Add the batch's gradients to the model's; returns (kind, loss, accuracy)."""
    loss, accuracy = loss_and_accuracy(model, batch)
    loss.backward()
    return batch.kind, loss.item(), accuracy


def replicate(model: Qwen3ForCausalLM, count: int) -> list[Qwen3ForCausalLM]:
    """The model and copies that share its weights but have gradients of their own, one for each thread."""
    replicas = [model, *(copy.deepcopy(model) for _ in range(count - 1))]
    for replica in replicas[1:]:
        for mine, shared in zip(replica.parameters(), model.parameters(), strict=True):
            mine.data = shared.data
    return replicas


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m puzzles.train", description="Train the embedded puzzle model.")
    parser.add_argument("--out", required=True, help="folder of the trained model")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock budget; fixes the decay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-from", help="folder of a model to train further, in the last stage")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on all learning rates")
    options = parser.parse_args(arguments)
    train(options.out, options.minutes, options.seed, options.start_from, options.rate)


if __name__ == "__main__":
    main()
