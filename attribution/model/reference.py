"""The reference path: nnsight's own `generate`, one sequence at a time.

It shares no decoding code with the step loop: transformers runs the loop, `tracer.all()` visits its steps, and one
empty invoke per site reads what passes there. The step loop is held against it in the tests; it serves `--max-batch 1`
and the families that the step loop is not proved on.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence

import nnsight
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from attribution.model.capture import Change, Stream
from attribution.model.decode import Fed
from attribution.model.traced import LOGITS, Site, TracedModel, first_tensor

_END_OF_LOOP = ".*was never reached: the loop asked for a step"

Take = Callable[[Fed], int | None]


class _Choose(LogitsProcessor):
    """Lets `take` choose the next token: every other token is ruled out."""

    def __init__(self, steps: "_Steps") -> None:
        self.steps = steps

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore  any tensor will do
        """Called by transformers with the logits of the last position, [1, vocab]."""
        token = self.steps.finish_step(scores)
        chosen = torch.full_like(scores, float("-inf"))
        chosen[0, token] = 0.0
        return chosen


class _Stop(StoppingCriteria):
    def __init__(self, steps: "_Steps") -> None:
        self.steps = steps

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:  # type: ignore[override]  # pyright: ignore  any tensor will do
        """Called by transformers after each token; one flag per row."""
        return torch.tensor([self.steps.stopped], device=input_ids.device)


class _Steps:
    """Collects what one step saw, and hands it to `take` when the logits of the step are there."""

    def __init__(self, model: TracedModel, streams: list[Stream], prompt: int, tail: int, take: Take) -> None:
        self.model, self.streams, self.take = model, streams, take
        self.seen: dict[Site, Tensor] = {}
        self.fed, self.tail, self.stopped = prompt, tail, False
        self.new = prompt

    def feeding(self) -> tuple[Tensor, int]:
        """The mask of the step under way, and how many tokens it feeds."""
        return torch.ones(1, self.fed, dtype=torch.long, device=self.model.device), self.new

    def finish_step(self, scores: Tensor) -> int:
        logits = self.seen.get(LOGITS, scores.to(self.model.dtype)[:, None])
        captured = {
            stream: torch.stack([stream.cut(self.seen[site]).cpu() for site in stream.sites]) for stream in self.streams
        }
        token = self.take(Fed(logits.cpu(), captured, [self.fed]))
        self.stopped = token is None
        self.fed, self.new = self.fed + 1, 1
        self.seen.clear()
        return 0 if token is None else token


def generate(
    model: TracedModel,
    prompt: list[int],
    limit: int,
    tail: int,
    streams: Iterable[Stream],
    take: Take,
    changes: Sequence[Change] = (),
    *,
    all_keys: bool = False,
) -> None:
    """Generate with nnsight; call it on the model's own thread.

    Args:
        prompt: token ids.
        limit: the most tokens to generate, at least 1.
        tail: how many positions of the prompt, from its end, get logits.
        streams: what to capture.
        take: called after every forward with what it gave; returns the next token, or None to stop.
        changes: what changes something on the way, in every forward; each waits for a place of the model.
        all_keys: whether layers that see a window keep the keys that have left it: who removes edges counts on them.
    """
    # An open loop over the steps ends by asking for one more: that is how it is meant to end. Set at every
    # call, for the filters may have been changed since; not by catch_warnings, which is not made for threads.
    warnings.filterwarnings("ignore", message=_END_OF_LOOP, category=UserWarning)
    streams = list(streams)
    steps = _Steps(model, streams, len(prompt), tail, take)
    wanted = {site for stream in streams for site in stream.sites} | {LOGITS}
    sites = [(site, model.envoy if site == LOGITS else model.envoy.get(site.path)) for site in sorted(wanted)]
    ids = torch.tensor([prompt], device=model.device)
    options = {
        "generation_config": GenerationConfig(
            max_new_tokens=limit, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
        ),
        "logits_processor": LogitsProcessorList([_Choose(steps)]),
        "stopping_criteria": StoppingCriteriaList([_Stop(steps)]),
        "logits_to_keep": tail,
    }
    if all_keys:
        options["past_key_values"] = DynamicCache()
    with torch.no_grad(), model.envoy.generate(**options) as tracer:
        with tracer.invoke(input_ids=ids, attention_mask=torch.ones_like(ids)):
            nnsight.save(tracer.result)
        for change in changes:  # before those who read: they see what is left there
            with tracer.invoke():
                for _ in tracer.all():
                    change(steps.feeding)
        for site, envoy in sites:
            with tracer.invoke():
                for _ in tracer.all():
                    _see(steps, site, envoy)


def _see(steps: _Steps, site: Site, envoy: object) -> None:
    value = envoy.output if site.side == "output" else envoy.input  # type: ignore[attr-defined]
    tensor = value.logits if site == LOGITS else first_tensor(value)
    assert tensor is not None
    # of a module that runs several times in one forward the first run is read, as `forward` does it
    steps.seen.setdefault(site, tensor.detach())
