"""A finished answer becomes a run on disk: its tensors, and run.json, enough to know and to repeat what they hold."""

import asyncio
from functools import cache
from importlib.metadata import version
from typing import Any

from server.answers import Answer
from server.generation.sequence import Sequence
from server.generation.text import token_text
from server.replies import baseline_field
from server.runs import RunStore, SavedTensor

_PACKAGES = ("sightline", "nnsight", "transformers", "torch", "tokenizers")


async def record(answer: Answer, store: RunStore) -> int:
    """Write the activations and run.json, and put into `answer.meta` what lies where.

    Returns:
        The bytes written; 0 when no activations were asked for.

    Raises:
        StorageFailed, CaptureTooLarge: nothing of the run is on disk then.
    """
    if not answer.savepoints:
        answer.meta = [{} for _ in answer.sequences]
        return 0
    declared = {savepoint.name: savepoint for savepoint in answer.savepoints}
    tensors = [
        SavedTensor(index, name, declared[name].selector.text, tensor, positions, declared[name].axis)
        for index, sequence in enumerate(answer.sequences)
        for name, (tensor, positions) in sequence.activations.items()
    ]
    answer.meta = [
        {saved.name: store.describe(answer.run_id, saved) for saved in tensors if saved.choice == index}
        for index in range(len(answer.sequences))
    ]
    return await asyncio.to_thread(lambda: store.write(answer.run_id, tensors, _run_record(answer)))


@cache
def versions() -> dict[str, str]:
    """The versions of the packages that a number depends on."""
    return {name: version(name) for name in _PACKAGES}


def _run_record(answer: Answer) -> dict[str, Any]:
    """The content of run.json."""
    model = answer.loaded.model
    return {
        "run_id": answer.run_id,
        "session_id": answer.session_id,
        "created": answer.created,
        "model": model.id,
        "source": model.source,
        "revision": model.revision,
        "model_type": model.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.attn_implementation,
        "chat_template_sha256": model.template_hash,
        "seed": answer.seed,
        "versions": versions(),
        "request": answer.body.model_dump(mode="json", exclude_unset=True),
        "choices": [_choice(answer, index, sequence) for index, sequence in enumerate(answer.sequences)],
    }


def _choice(answer: Answer, index: int, sequence: Sequence) -> dict[str, Any]:
    token_ids = sequence.prompt + sequence.tokens
    tokenizer = answer.loaded.model.tokenizer
    return {
        "index": index,
        "prompt_tokens": len(sequence.prompt),
        "completion_tokens": len(sequence.tokens),
        "finish_reason": sequence.finish_reason,
        "text": sequence.text.text,
        "token_ids": token_ids,
        "tokens": [token_text(tokenizer, token) for token in token_ids],
        "largest_batch": sequence.largest_batch,
        "activations": answer.meta[index],
        **({} if sequence.acting is None else {"interventions": sequence.acting.receipts}),
        **baseline_field(answer, index),
    }
