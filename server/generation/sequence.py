"""One completion on its way: what it was asked for, what it has produced, and whom it tells.

A sequence is a row of the batch. It lives on the thread that owns the model; `cancelled` is the only field that another
thread writes, and `emit` the only way out.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from attribution.errors import Cancelled, NotFinite, SightlineError
from attribution.model.capture import Stream
from attribution.model.decode import Fed
from server.acting import Acting
from server.generation.comparison import Comparison
from server.generation.sampling import Sampler, TokenLogprob, token_logprob
from server.generation.text import TextStream
from server.savepoints import Recorder


@dataclass(frozen=True)
class Delta:
    """New text of a completion, with the log-probabilities of the tokens that it closes."""

    text: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Finished:
    """The completion is whole: `error` is None, or the reason why there is none."""

    error: SightlineError | None = None


Event = Delta | Finished


@dataclass(eq=False)
class Sequence:
    """One completion of one prompt.

    Attributes:
        prompt: token ids.
        limit: the most tokens to generate; 0 only scores the prompt.
        end_ids: tokens that end it.
        top_logprobs: how many alternatives to report per token; None reports no log-probabilities.
        score_prompt: how many alternatives to report per prompt token; None does not score the prompt.
        stream: whether text is told as it comes.
        emit: called on the model's thread with every event.
        acting: the interventions of its forward passes; None changes nothing.
        comparison: where its steps meet those of the other of a pair, `is_baseline` saying which one this is.
        beside: the baseline that is to share all forward passes with it; it is queued next.
    """

    prompt: list[int]
    limit: int
    sampler: Sampler
    text: TextStream
    end_ids: frozenset[int]
    emit: Callable[[Event], None]
    recorder: Recorder | None = None
    top_logprobs: int | None = None
    score_prompt: int | None = None
    stream: bool = False
    acting: Acting | None = None
    comparison: Comparison | None = None
    is_baseline: bool = False
    beside: "Sequence | None" = None
    cancelled: bool = False

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    activations: dict[str, tuple[Tensor, range]] = field(default_factory=dict)
    finish_reason: str | None = None
    largest_batch: int = 1
    created: float = field(default_factory=time.perf_counter)
    first_token: float | None = None
    _told: int = 0

    @property
    def fed(self) -> int:
        """The number of tokens that the model has been fed when the sequence is finished."""
        return len(self.prompt) + max(len(self.tokens) - 1, 0)

    @property
    def tail(self) -> int:
        """How many positions at the end of the prompt need logits."""
        asked = 1 if self.score_prompt is None else len(self.prompt)
        return max(asked, self.recorder.tail if self.recorder else 1)

    def wanted(self, start: int, stop: int) -> set[Stream]:
        """What has to be captured when the positions [start, stop) of this sequence are fed."""
        return self.recorder.wanted(start, stop) if self.recorder else set()

    def observe(self, fed: Fed, row: int) -> None:
        """Take what a forward saw of this sequence, without choosing a token."""
        if self.recorder:
            self.recorder.take(fed, row)
        if self.score_prompt is not None and fed.ends[row] <= len(self.prompt):
            self._score(fed, row, self.score_prompt)

    def advance(self, fed: Fed, row: int) -> int | None:
        """Take what a forward saw and choose the next token; None when the sequence has ended."""
        self.observe(fed, row)
        if self.limit == 0:
            return self._end("length")
        logits = fed.logits[row, -1]
        token = self._choose(logits)
        self.tokens.append(token)
        self.first_token = self.first_token or time.perf_counter()
        if self.comparison is not None:
            self.comparison.take(logits, token, baseline=self.is_baseline)
        if self.top_logprobs is not None:
            self.logprobs.append(token_logprob(logits, token, self.top_logprobs))
        if token in self.end_ids:
            return self._end("stop")
        self.text.push(token)
        if self.text.stopped:
            return self._end("stop")
        if len(self.tokens) == self.limit:
            return self._end("length")
        self._tell()
        return token

    def _choose(self, logits: Tensor) -> int:
        try:
            return self.sampler.choose(logits)
        except NotFinite as error:
            if self.acting is None:
                raise
            raise NotFinite(
                "the model's logits are NaN: the interventions of this request may have driven its activations out of "
                "range; make them weaker. If it happens without them, they overflow in this dtype, or the "
                "weights are damaged; load the model with dtype bfloat16 or float32",
                param="interventions",
            ) from error

    def fail(self, error: SightlineError) -> None:
        """End without a result."""
        self.finish_reason = "error"
        self.emit(Finished(error))

    def drop(self) -> None:
        """Its client has gone."""
        self.fail(Cancelled("the client closed the connection"))

    def _end(self, reason: str) -> None:
        self.text.finish()
        if self.recorder:
            self.activations = self.recorder.finish(self.fed)
        if self.comparison is not None:
            self.comparison.end(baseline=self.is_baseline)
        self.finish_reason = reason
        self._tell()
        self.emit(Finished())

    def _tell(self) -> None:
        if not self.stream:
            return
        piece = self.text.take()
        if piece or self.finish_reason:
            closed = tuple(self.logprobs[self._told :])
            self._told = len(self.logprobs)
            self.emit(Delta(piece, closed))

    def _score(self, fed: Fed, row: int, top: int) -> None:
        """Log-probabilities of the prompt's tokens: the logits at position p are those of token p + 1."""
        if not self.prompt_logprobs:
            self.prompt_logprobs.append(TokenLogprob(self.prompt[0], None))
        kept = fed.logits.shape[1]
        for column in range(kept):
            position = fed.ends[row] - kept + column
            if 0 <= position < len(self.prompt) - 1 and position + 1 == len(self.prompt_logprobs):
                token = self.prompt[position + 1]
                self.prompt_logprobs.append(token_logprob(fed.logits[row, column], token, top))
