"""Replies built from openai.types, with Sightline's own fields beside OpenAI's."""

from typing import TYPE_CHECKING, Any

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion_choice import Logprobs as LegacyLogprobs

from server.answers import Answer
from server.generation.sampling import TokenLogprob
from server.generation.sequence import Sequence
from server.generation.text import token_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"


def usage(answer: Answer) -> CompletionUsage:
    """Exact counts: each prompt once, every generated token, the end token included; not those of baselines."""
    prompt = sum(len(prompt) for prompt in answer.plan.prompts)
    completion = sum(len(sequence.tokens) for sequence in answer.sequences)
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def run_fields(answer: Answer, index: int) -> dict[str, Any]:
    """The fields of a choice that lead to its activations, and the receipts of its interventions."""
    meta = answer.meta[index]
    acting = answer.sequences[index].acting
    receipts = {} if acting is None else {"interventions": acting.receipts}
    return receipts | {
        "run_id": answer.run_id,
        "session_id": answer.session_id,
        "activation_files": {name: one["file"] for name, one in meta.items()},
        "activations_meta": meta,
    }


def baseline_field(answer: Answer, index: int) -> dict[str, Any]:
    """`baseline` of a choice: its completion without interventions, and how far apart the two are at each step."""
    if not answer.baselines:
        return {}
    baseline, comparison = answer.baselines[index], answer.baselines[index].comparison
    assert comparison is not None
    tokenizer = answer.loaded.model.tokenizer
    per_token = [
        {
            "kl": step.kl,
            "token": token_text(tokenizer, step.token),
            "token_id": step.token,
            "baseline_token": token_text(tokenizer, step.baseline_token),
            "baseline_token_id": step.baseline_token,
            "changed": step.token != step.baseline_token,
        }
        for step in comparison.steps
    ]
    return {
        "baseline": {
            "text": baseline.text.text,
            "finish_reason": baseline.finish_reason,
            "token_ids": baseline.tokens,
            "tokens": [token_text(tokenizer, token) for token in baseline.tokens],
            "first_changed": comparison.first_changed,
            "per_token": per_token,
        }
    }


def chat_reply(answer: Answer) -> ChatCompletion:
    """The reply of `/v1/chat/completions`."""
    choices = [
        {
            "index": index,
            "finish_reason": sequence.finish_reason,
            "message": {"role": "assistant", "content": sequence.text.text} | run_fields(answer, index),
            "logprobs": chat_logprobs(answer, sequence.logprobs),
        }
        | baseline_field(answer, index)
        for index, sequence in enumerate(answer.sequences)
    ]
    return ChatCompletion.model_validate(
        _head(answer, f"chatcmpl-{answer.run_id}", "chat.completion")
        | {"choices": choices, "usage": usage(answer), "activations_meta": answer.meta[0]}
    )


def chat_chunk(
    answer: Answer,
    index: int,
    delta: dict[str, Any],
    logprobs: tuple[TokenLogprob, ...] = (),
    finish_reason: str | None = None,
) -> ChatCompletionChunk:
    """One chunk of a streamed chat; the last one of a choice carries its files."""
    body = _head(answer, f"chatcmpl-{answer.run_id}", "chat.completion.chunk")
    if finish_reason is not None:
        delta = delta | run_fields(answer, index)
        body |= {"activations_meta": answer.meta[0]}
    content = chat_logprobs(answer, list(logprobs)) if logprobs else None
    choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": content}
    if finish_reason is not None:
        choice |= baseline_field(answer, index)
    return ChatCompletionChunk.model_validate(body | {"choices": [choice]})


def usage_chunk(answer: Answer, chat: bool) -> ChatCompletionChunk | Completion:
    """The chunk after the last choice, with `stream_options.include_usage`."""
    if chat:
        head = _head(answer, f"chatcmpl-{answer.run_id}", "chat.completion.chunk")
        return ChatCompletionChunk.model_validate(head | {"choices": [], "usage": usage(answer)})
    head = _head(answer, f"cmpl-{answer.run_id}", "text_completion")
    return Completion.model_validate(head | {"choices": [], "usage": usage(answer)})


def chat_logprobs(answer: Answer, entries: list[TokenLogprob]) -> dict[str, Any] | None:
    """OpenAI's `logprobs` of a chat choice; None when they were not asked for."""
    if answer.plan.top_logprobs is None:
        return None
    tokenizer = answer.loaded.model.tokenizer
    content = []
    for entry in entries:
        top = [_token(tokenizer, token, logprob) for token, logprob in entry.top[: answer.plan.top_logprobs]]
        content.append(_token(tokenizer, entry.token_id, entry.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _token(tokenizer: "PreTrainedTokenizerBase", token: int, logprob: float | None) -> dict[str, Any]:
    text = token_text(tokenizer, token)
    # half a character has no text of its own, and its bytes cannot be told from the text
    return {"token": text, "logprob": logprob, "bytes": None if _UNFINISHED in text else list(text.encode())}


def completion_reply(answer: Answer) -> Completion:
    """The reply of `/v1/completions`."""
    choices = [
        completion_choice(
            answer, index, full_text(answer, sequence), all_logprobs(answer, sequence), sequence.finish_reason
        )
        for index, sequence in enumerate(answer.sequences)
    ]
    head = _head(answer, f"cmpl-{answer.run_id}", "text_completion")
    return Completion.model_validate(
        head | {"choices": choices, "usage": usage(answer), "activations_meta": answer.meta[0]}
    )


def completion_chunk(
    answer: Answer,
    index: int,
    text: str,
    entries: tuple[TokenLogprob, ...],
    offset: int,
    finish_reason: str | None = None,
) -> Completion:
    """One chunk of a streamed completion; `offset` is where its text begins."""
    body = _head(answer, f"cmpl-{answer.run_id}", "text_completion")
    if finish_reason is not None:
        body |= {"activations_meta": answer.meta[0]}
    choice = completion_choice(answer, index, text, list(entries), finish_reason, offset)
    return Completion.model_construct(**body, choices=[choice])


def completion_choice(
    answer: Answer,
    index: int,
    text: str,
    entries: list[TokenLogprob],
    finish_reason: str | None,
    offset: int = 0,
) -> CompletionChoice:
    """One choice of a completion, or a part of one."""
    fields = {}
    if finish_reason is not None:
        fields = run_fields(answer, index) | _scored_prompt(answer, index) | baseline_field(answer, index)
    return CompletionChoice.model_construct(
        index=index,
        text=text,
        finish_reason=finish_reason,
        logprobs=_legacy_logprobs(answer, entries, offset),
        **fields,
    )


def full_text(answer: Answer, sequence: Sequence) -> str:
    """The text of a completion, behind its prompt when that was to be echoed."""
    return (prompt_text(answer, sequence) if answer.plan.echo else "") + sequence.text.text


def prompt_text(answer: Answer, sequence: Sequence) -> str:
    """The prompt as the model saw it."""
    tokenizer = answer.loaded.model.tokenizer
    return str(tokenizer.decode(sequence.prompt, clean_up_tokenization_spaces=False))


def all_logprobs(answer: Answer, sequence: Sequence) -> list[TokenLogprob]:
    """The log-probabilities of the prompt, when it is echoed, and of the completion."""
    return [*(sequence.prompt_logprobs if answer.plan.echo else ()), *sequence.logprobs]


def text_width(answer: Answer, entries: tuple[TokenLogprob, ...]) -> int:
    """How far the tokens of `entries` move `text_offset` on."""
    return sum(len(token_text(answer.loaded.model.tokenizer, entry.token_id)) for entry in entries)


def _scored_prompt(answer: Answer, index: int) -> dict[str, Any]:
    """`prompt_logprobs` as vLLM gives them: per token a dictionary by token id, the token itself first."""
    top = answer.plan.prompt_logprobs
    if top is None:
        return {}
    tokenizer = answer.loaded.model.tokenizer
    rows: list[dict[str, Any] | None] = []
    for entry in answer.sequences[index].prompt_logprobs:
        row = dict([(entry.token_id, entry.logprob), *entry.top[:top]])
        named = {
            str(token): {"logprob": logprob, "decoded_token": token_text(tokenizer, token)}
            for token, logprob in row.items()
        }
        rows.append(None if entry.logprob is None else named)
    return {"prompt_logprobs": rows}


def _legacy_logprobs(answer: Answer, entries: list[TokenLogprob], offset: int) -> LegacyLogprobs | None:
    if answer.plan.top_logprobs is None:
        return None
    tokenizer = answer.loaded.model.tokenizer
    tokens = [token_text(tokenizer, entry.token_id) for entry in entries]
    offsets = [offset + sum(map(len, tokens[:i])) for i in range(len(tokens))]
    top: list[dict[str, float] | None] = []
    for entry in entries:
        likeliest = entry.top[: answer.plan.top_logprobs]
        alternatives = {token_text(tokenizer, token): logprob for token, logprob in reversed(likeliest)}
        top.append(None if entry.logprob is None else alternatives)
    return LegacyLogprobs.model_construct(
        tokens=tokens, token_logprobs=[e.logprob for e in entries], top_logprobs=top, text_offset=offsets
    )


def _head(answer: Answer, name: str, kind: str) -> dict[str, Any]:
    return {"id": name, "object": kind, "created": answer.created, "model": answer.loaded.id}
