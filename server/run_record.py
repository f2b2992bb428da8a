"""What run.json says of a run: enough to know, and to repeat, what its tensors hold."""

from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from server.generation.sequence import Sequence
from server.generation.text import token_text

if TYPE_CHECKING:
    from server.answers import Answer

_PACKAGES = ("sightline", "nnsight", "transformers", "torch", "tokenizers")


@cache
def versions() -> dict[str, str]:
    """The versions of the packages that a number depends on."""
    return {name: version(name) for name in _PACKAGES}


def run_record(answer: "Answer") -> dict[str, Any]:
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


def _choice(answer: "Answer", index: int, sequence: Sequence) -> dict[str, Any]:
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
    }
