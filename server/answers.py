"""From a request to its finished completions: the same for chat and completions, streamed or not.

1. `open_answer` checks everything that can be checked before a token is generated.
2. `Answer.start` queues one sequence per completion on the model's thread.
3. `Answer.events` tells what happens until all sequences have finished; `server.recording` then writes the run.
"""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from attribution.errors import ContextLengthExceeded, InvalidRequest
from server.acting import Acting
from server.directions import ready
from server.generation.comparison import Comparison
from server.generation.sampling import Sampler
from server.generation.sequence import Event, Finished, Sequence
from server.generation.text import TextStream
from server.interventions import Knockout, Ready, check_interventions, declare_interventions
from server.registry import LoadedModel
from server.savepoints import Recorder, Savepoint, SavepointSpec, check_windows, declare
from server.schemas import GenerationBody

_LOGITS = SavepointSpec("logits", "logits")


@dataclass(frozen=True)
class Plan:
    """What a route has made of its body: prompts as token ids, and what chat and completions name differently.

    Attributes:
        limit: the most tokens to generate; None is the rest of the window.
        top_logprobs: alternatives per token; None reports no log-probabilities.
        echo: whether the prompt is part of the answer.
        prompt_logprobs: alternatives per prompt token; None reports no log-probabilities of the prompt.
    """

    prompts: list[list[int]]
    limit: int | None
    top_logprobs: int | None
    echo: bool = False
    prompt_logprobs: int | None = None

    @property
    def score_prompt(self) -> int | None:
        """The most alternatives that anyone asked for per prompt token; None when the prompt is not scored."""
        asked = [self.prompt_logprobs, self.top_logprobs if self.echo else None]
        return max((count for count in asked if count is not None), default=None)


@dataclass(eq=False)
class Answer:
    """One request on its way. `sequences` are its choices: the n completions of the first prompt, and so on.

    Its `baselines`, one for each choice when they are asked for, are the same without `interventions`.
    """

    loaded: LoadedModel
    body: GenerationBody
    plan: Plan
    savepoints: list[Savepoint]
    max_bytes: int
    seed: int
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    sequences: list[Sequence] = field(default_factory=list)
    meta: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    interventions: list[Ready | Knockout] = field(default_factory=list)
    baselines: list[Sequence] = field(default_factory=list)

    @property
    def session_id(self) -> str:
        """The short form of the run id."""
        return self.run_id[:8]

    def start(self) -> None:
        """Queue the sequences.

        Raises:
            QueueFull, ShuttingDown: they are not taken.
        """
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        def emit(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        for prompt in self.plan.prompts:
            for _ in range(self.body.n):
                index = len(self.sequences)
                tell = partial(emit, index)
                self.sequences.append(self._sequence(prompt, index, tell))
                if self.body.baseline:
                    self.baselines.append(self._baseline(self.sequences[-1], index, tell))
        self.loaded.worker.add(self._all)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """The events of all choices until each has finished.

        Raises:
            SightlineError: of the first choice that failed; the others are dropped.
        """
        left = len(self._all)
        try:
            while left:
                index, event = await self._events.get()
                if isinstance(event, Finished):
                    if event.error is not None:
                        raise event.error
                    left -= 1
                yield index, event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Drop what has not finished."""
        for sequence in self._all:
            sequence.cancelled = True

    @property
    def _all(self) -> list[Sequence]:
        """All that is generated, each baseline behind its choice."""
        if not self.baselines:
            return self.sequences
        return [one for pair in zip(self.sequences, self.baselines, strict=True) for one in pair]

    def _sequence(self, prompt: list[int], index: int, emit: Any) -> Sequence:
        body, model = self.body, self.loaded.model
        limit = limit_of(self.loaded, len(prompt), self.plan.limit)
        acting = Acting(model, self.interventions, len(prompt), limit) if self.interventions else None
        recorder = None
        if self.savepoints:
            removed = None if acting is None else acting.removed
            recorder = Recorder(model, self.savepoints, len(prompt), self.max_bytes, removed)
        return Sequence(
            prompt=prompt,
            limit=limit,
            sampler=Sampler(body.sampling(), prompt, self.seed, index),
            text=TextStream(model.tokenizer, body.stops()),
            end_ids=frozenset() if body.ignore_eos else model.end_token_ids,
            emit=emit,
            recorder=recorder,
            top_logprobs=self.plan.top_logprobs,
            score_prompt=self.plan.score_prompt,
            stream=body.stream,
            acting=acting,
        )

    def _baseline(self, sequence: Sequence, index: int, emit: Any) -> Sequence:
        """The same completion without interventions, in the same forward passes and with the same random numbers."""
        body = self.body
        sequence.comparison = Comparison(self.max_bytes)
        sequence.beside = Sequence(
            prompt=sequence.prompt,
            limit=sequence.limit,
            sampler=Sampler(body.sampling(), sequence.prompt, self.seed, index),
            text=TextStream(self.loaded.model.tokenizer, body.stops()),
            end_ids=sequence.end_ids,
            emit=emit,
            comparison=sequence.comparison,
            is_baseline=True,
        )
        return sequence.beside


async def open_answer(loaded: LoadedModel, body: GenerationBody, plan: Plan, max_bytes: int) -> Answer:
    """Check a request and make its answer; no token has been generated when this raises.

    Raises:
        ContextLengthExceeded, InvalidRequest, BadSelector, BadPositions, CaptureTooLarge: naming what is wrong.
        SightlineError: what `declare_interventions`, `check_interventions` and `ready` raise.
    """
    for prompt in plan.prompts:
        _check_tokens(loaded, prompt, "prompt")
        limit_of(loaded, len(prompt), plan.limit)
    _check_tokens(loaded, list(body.logit_bias or {}), "logit_bias", may_be_empty=True)
    savepoints = declare(loaded.model, _asked(loaded, body))
    share = max_bytes // (len(plan.prompts) * body.n)
    for prompt in plan.prompts:
        check_windows(savepoints, len(prompt), limit_of(loaded, len(prompt), plan.limit), share)
    interventions = await _interventions(loaded, body, plan)
    seed = secrets.randbits(63) if body.seed is None else body.seed
    return Answer(loaded, body, plan, savepoints, share, seed, interventions=interventions)


async def _interventions(loaded: LoadedModel, body: GenerationBody, plan: Plan) -> list[Ready | Knockout]:
    """The interventions of a request, checked for each prompt."""
    # on another thread, as the store of autoencoders is held while descriptions are read
    declared = await asyncio.to_thread(declare_interventions, loaded.model, body, loaded.session.features)
    if not declared:
        return []
    if body.baseline and plan.limit == 0:
        raise InvalidRequest(
            "baseline compares the tokens that are generated, and max_tokens is 0; ask for at least one, or leave "
            "baseline out",
            param="baseline",
        )
    for prompt in plan.prompts:
        limit = limit_of(loaded, len(prompt), plan.limit)
        await asyncio.to_thread(check_interventions, loaded.model, declared, len(prompt), limit)
    return await ready(loaded, declared)


def _asked(loaded: LoadedModel, body: GenerationBody) -> list[SavepointSpec]:
    """The savepoints of a request: its own, else those given at load, else the logits if activations are asked for."""
    if body.store_activations is False:
        return []
    own = [savepoint.spec() for savepoint in body.savepoints or []]
    specs = own or list(loaded.savepoints)
    return specs or ([_LOGITS] if body.store_activations else [])


def limit_of(loaded: LoadedModel, prompt: int, limit: int | None) -> int:
    """The most tokens that may be generated after `prompt` tokens.

    Raises:
        ContextLengthExceeded: with the numbers.
    """
    window = loaded.model.dimensions.window
    if prompt + (1 if limit is None else limit) > window:
        asked = "at least one token" if limit is None else f"max_tokens {limit}"
        raise ContextLengthExceeded(
            f"{loaded.id!r} has a window of {window} tokens; the prompt has {prompt}, and {asked} do not fit behind it",
            param="messages" if limit is None else "max_tokens",
        )
    return window - prompt if limit is None else limit


def _check_tokens(loaded: LoadedModel, ids: list[int], param: str, may_be_empty: bool = False) -> None:
    size = loaded.model.dimensions.d_vocab
    if not ids and not may_be_empty:
        raise InvalidRequest("the prompt has no tokens", param=param)
    wrong = next((token for token in ids if not 0 <= token < size), None)
    if wrong is not None:
        raise InvalidRequest(f"{param}: token ids of {loaded.id!r} are 0 to {size - 1}; found {wrong}", param=param)
