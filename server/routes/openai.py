"""The OpenAI routes: chat, completions and the list of models."""

import asyncio
import inspect
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from jinja2 import TemplateError
from pydantic import BaseModel

from attribution.errors import InvalidRequest, SightlineError
from server import replies
from server.answers import Answer, Plan, open_answer
from server.bodies import unless_gone
from server.generation.sequence import Delta
from server.recording import record
from server.registry import LoadedModel
from server.schemas import ChatBody, CompletionBody, GenerationBody
from server.state import State, state_of

router = APIRouter(prefix="/v1", tags=["openai"])


@router.post("/chat/completions", response_model=None)
async def chat_completions(request: Request, body: ChatBody) -> Response:
    """One or more completions of a conversation, with the activations that the request names on disk."""
    loaded = state_of(request).registry.get(body.model)
    prompt = await asyncio.to_thread(_templated, loaded, body)
    limit = body.max_completion_tokens or body.max_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    return await _answer(request, loaded, body, Plan([prompt], limit, top))


@router.post("/completions", response_model=None)
async def completions(request: Request, body: CompletionBody) -> Response:
    """Completions of raw prompts; with `echo` and `max_tokens: 0` the prompts are only scored."""
    loaded = state_of(request).registry.get(body.model)
    tokenizer = loaded.model.tokenizer
    prompts = [
        prompt if isinstance(prompt, list) else await asyncio.to_thread(tokenizer.encode, prompt)
        for prompt in body.prompts()
    ]
    if not prompts:
        raise InvalidRequest("prompt is an empty list", param="prompt")
    plan = Plan(prompts, body.max_tokens, body.logprobs, body.echo, body.prompt_logprobs)
    return await _answer(request, loaded, body, plan)


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The loaded models, as OpenAI lists them."""
    return {"object": "list", "data": [_card(entry) for entry in state_of(request).registry.loaded]}


@router.get("/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One loaded model."""
    return _card(state_of(request).registry.get(name))


def _card(entry: LoadedModel) -> dict[str, Any]:
    return {"id": entry.id, "object": "model", "created": int(entry.created), "owned_by": "sightline"}


def _templated(loaded: LoadedModel, body: ChatBody) -> list[int]:
    """The conversation as token ids, through the model's chat template."""
    tokenizer = loaded.model.tokenizer
    template = tokenizer.chat_template
    if template is None:
        raise InvalidRequest(f"{loaded.id!r} has no chat template; use /v1/completions", param="messages")
    own = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"documents", "kwargs"}
    if taken := own & set(body.chat_template_kwargs):
        raise InvalidRequest(
            f"chat_template_kwargs are variables of the template; {', '.join(sorted(taken))} cannot be set there",
            param="chat_template_kwargs",
        )
    if body.tools and "tools" not in str(template):
        raise InvalidRequest(f"the chat template of {loaded.id!r} has no place for tools", param="tools")
    try:
        text = tokenizer.apply_chat_template(
            [message.plain() for message in body.messages],
            tools=body.tools,  # pyright: ignore[reportArgumentType]  a list of dicts is one
            add_generation_prompt=True,
            tokenize=False,
            **body.chat_template_kwargs,
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error
    return tokenizer.encode(text, add_special_tokens=False)  # type: ignore[arg-type]


async def _answer(request: Request, loaded: LoadedModel, body: GenerationBody, plan: Plan) -> Response:
    state = state_of(request)
    answer = await open_answer(loaded, body, plan, int(state.settings.max_capture_bytes))
    answer.start()
    if body.stream:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_stream(answer, state), media_type="text/event-stream", headers=headers)
    await _finished_or_gone(request, answer)
    await _record(answer, state)
    reply = replies.chat_reply(answer) if isinstance(body, ChatBody) else replies.completion_reply(answer)
    return JSONResponse(reply.model_dump(mode="json", exclude_unset=True))


async def _finished_or_gone(request: Request, answer: Answer) -> None:
    """Wait for the answer, or drop it when its client closes the connection."""

    async def finish() -> None:
        async for _ in answer.events():
            pass

    try:
        await unless_gone(request, finish())
    finally:
        answer.cancel()


async def _record(answer: Answer, state: State) -> None:
    state.count(answer, await record(answer, state.runs))


async def _stream(answer: Answer, state: State) -> AsyncIterator[str]:
    """Server-sent events. The last chunk of each choice waits until the run is on disk; an error takes its place."""
    chat = isinstance(answer.body, ChatBody)
    sent = [0] * len(answer.sequences)
    try:
        if chat:
            for index in range(len(answer.sequences)):
                yield _event(replies.chat_chunk(answer, index, {"role": "assistant", "content": ""}))
        async for index, event in answer.events():
            if not isinstance(event, Delta):
                continue
            if answer.plan.echo and not sent[index]:
                sequence = answer.sequences[index]
                prompt = replies.prompt_text(answer, sequence)
                yield _event(replies.completion_chunk(answer, index, prompt, tuple(sequence.prompt_logprobs), 0))
                sent[index] = len(prompt)
            if chat:
                yield _event(replies.chat_chunk(answer, index, {"content": event.text}, event.logprobs))
            else:
                yield _event(replies.completion_chunk(answer, index, event.text, event.logprobs, sent[index]))
            sent[index] += replies.text_width(answer, event.logprobs)
        await _record(answer, state)
        for index, sequence in enumerate(answer.sequences):
            reason = sequence.finish_reason
            last = (
                replies.chat_chunk(answer, index, {}, (), reason)
                if chat
                else replies.completion_chunk(answer, index, "", (), sent[index], reason)
            )
            yield _event(last)
        if answer.body.stream_options and answer.body.stream_options.include_usage:
            yield _event(replies.usage_chunk(answer, chat))
        yield "data: [DONE]\n\n"
    except SightlineError as error:
        yield _event_json(error.body())
    finally:
        answer.cancel()


def _event(model: BaseModel) -> str:
    return f"data: {model.model_dump_json(exclude_unset=True)}\n\n"


def _event_json(body: dict[str, Any]) -> str:
    return f"data: {JSONResponse(body).body.decode()}\n\n"  # type: ignore[union-attr]
