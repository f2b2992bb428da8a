"""Samples: run the model and store its activations, list them, delete them. What is kept: `docs/store.md`."""

import gc
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import psutil
import torch

from attribution.activations import batches, collect
from attribution.arguments import DatasetId, Index, Positions, SampleId
from attribution.errors import CannotFit, InvalidArgument
from attribution.estimate import check_room, estimate
from attribution.operation import Progress, Steps, operation
from attribution.prompts import Message, Prompt, check_tokens, only_given, run_tokens, token_text, tokens_of

if TYPE_CHECKING:
    from attribution.session import LocalSession

# --- run and store


@operation()
def forward(
    session: "LocalSession",
    dataset_id: DatasetId,
    sample_id: SampleId,
    prompt: str | None = None,
    *,
    messages: list[Message] | None = None,
    token_ids: Positions | None = None,
    run_id: str | None = None,
    choice: Index = 0,
    add_special_tokens: bool = True,
) -> dict[str, Any]:
    """Run one sample and store its activations; a sample that is stored already is not run again.

    Args:
        prompt: a text; this, `messages`, `token_ids` and `run_id` exclude each other.
        messages: a conversation, put through the model's chat template.
        run_id: a recorded chat answer: prompt and completion together, of its `choice`.
        add_special_tokens: whether a text gets the tokenizer's own special tokens; False for templated texts.

    Returns:
        dataset_id, sample_id, seq_len, token_ids, tokens (as texts), stored (False: it was there), and finite: whether
        the model computed neither NaN nor inf. What is not finite is stored as it is.
    """
    given = {"prompt": prompt, "messages": messages, "token_ids": token_ids, "run_id": run_id}
    name = only_given(given)
    model = session.model
    if run_id is not None:
        tokens = run_tokens(model, session.runs_dir, run_id, choice)
    else:
        tokens = tokens_of(model, given[name] or [], special=add_special_tokens, name=name)
    check_tokens(model, tokens, name)
    found = session.store.find(dataset_id, sample_id, session.identity, tokens)
    if stored := found is None:
        (tensors,) = collect(model, [tokens])
        found = session.store.write(dataset_id, sample_id, session.identity, tokens, tensors)
    return {
        "dataset_id": dataset_id,
        "sample_id": sample_id,
        "seq_len": len(tokens),
        "token_ids": tokens,
        "tokens": [token_text(model, token) for token in tokens],
        "stored": stored,
        "finite": found.finite,
    }


@operation()
def batch_forward(
    session: "LocalSession",
    dataset_id: DatasetId,
    prompts: list[Prompt],
    sample_ids: list[SampleId] | None = None,
    show_progress: bool = True,
    add_special_tokens: bool = True,
) -> Steps[dict[str, Any]]:
    """Run many samples, batched by length, and store them; those that are stored already are skipped.

    Every sample is on disk when its batch is done: a call that was cut off is resumed by repeating it.

    Args:
        prompts: texts, conversations or token ids, as in `forward`.
        sample_ids: their names; None is 0 … N − 1.

    Returns:
        dataset_id, sample_ids, count, stored (how many ran now), skipped, tokens (how many, in all samples), finite (of
        all samples), and the estimate of what was run now.
    """
    model, store, identity = session.model, session.store, session.identity
    names = _sample_names(len(prompts), sample_ids)
    tokens = _all_tokens(session, prompts, special=add_special_tokens)
    there = [store.find(dataset_id, name, identity, one) for name, one in zip(names, tokens, strict=True)]
    missing = [index for index, found in enumerate(there) if found is None]
    needed = estimate(model, [len(tokens[index]) for index in missing])
    check_room(model, store, needed)
    done, finite = len(prompts) - len(missing), all(found.finite for found in there if found)
    for batch in batches([len(tokens[index]) for index in missing]):
        chosen = [missing[index] for index in batch]
        for index, tensors in zip(chosen, collect(model, [tokens[index] for index in chosen]), strict=True):
            finite &= store.write(dataset_id, names[index], identity, tokens[index], tensors).finite
        done += len(chosen)
        yield Progress(done, len(prompts))
    return {
        "dataset_id": dataset_id,
        "sample_ids": names,
        "count": len(names),
        "stored": len(missing),
        "skipped": len(names) - len(missing),
        "tokens": sum(len(one) for one in tokens),
        "finite": finite,
        "estimate": asdict(needed),
    }


def _sample_names(count: int, given: list[int | str] | None) -> list[int | str]:
    if count == 0:
        raise InvalidArgument("prompts is empty; give at least one", param="prompts")
    names: list[int | str] = [*range(count)] if given is None else list(given)
    if len(names) != count:
        raise InvalidArgument(f"there are {len(names)} sample_ids for {count} prompts", param="sample_ids")
    if len(set(names)) != count:
        twice = next(name for index, name in enumerate(names) if name in names[:index])
        raise InvalidArgument(f"sample_ids names {twice!r} twice", param="sample_ids")
    return names


def _all_tokens(session: "LocalSession", prompts: list[Any], *, special: bool) -> list[list[int]]:
    found = []
    for index, prompt in enumerate(prompts):
        found.append(tokens_of(session.model, prompt, special=special, name=f"prompts.{index}"))
        check_tokens(session.model, found[-1], f"prompts.{index}")
    return found


@operation()
def estimate_memory(
    session: "LocalSession", prompts: list[Prompt], add_special_tokens: bool = True
) -> dict[str, int | bool]:
    """What `batch_forward` of these prompts would take, were none of them stored: nothing is run.

    Returns:
        samples, tokens, disk_bytes, peak_bytes (memory for the largest batch), device_bytes (the same on GPUs),
        disk_free, memory_available, and fits.
    """
    tokens = _all_tokens(session, prompts, special=add_special_tokens)
    needed = estimate(session.model, [len(one) for one in tokens])
    room = {"disk_free": session.store.disk_free(), "memory_available": psutil.virtual_memory().available}
    try:
        check_room(session.model, session.store, needed)
    except CannotFit:
        return asdict(needed) | room | {"fits": False}
    return asdict(needed) | room | {"fits": True}


# --- what is stored


@operation()
def list_cached_samples(session: "LocalSession", dataset_id: DatasetId) -> dict[str, Any]:
    """The samples of a dataset: sample_ids, integers first, and their count."""
    names = session.sample_ids(dataset_id)
    return {"sample_ids": names, "count": len(names)}


@operation(safe=False)
def clear_cache(session: "LocalSession", dataset_id: DatasetId) -> dict[str, int]:
    """Delete a dataset, whichever model it is of. Returns the number of samples and the bytes freed on disk."""
    samples, freed = session.store.clear(dataset_id)
    return {"samples": samples, "bytes": freed}


@operation(safe=False)
def clear_all_cache(session: "LocalSession") -> dict[str, int]:
    """Delete all datasets of this model; those of others stay. Returns the number of samples and the bytes freed."""
    samples, freed = session.store.clear_all(session.identity)
    return {"samples": samples, "bytes": freed}


@operation()
def empty_cuda_cache(session: "LocalSession") -> dict[str, int]:
    """Give the GPU memory that torch holds in reserve back: the bytes it held before and after; 0 without a GPU."""
    before = _reserved()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"before": before, "after": _reserved()}


def _reserved() -> int:
    return sum(torch.cuda.memory_reserved(device) for device in range(torch.cuda.device_count()))
