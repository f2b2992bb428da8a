"""The choice of one row's next token, and its log-probabilities.

1. logits + logit_bias,
2. repetition penalty (prompt and completion), then presence and frequency penalties (completion only),
3. temperature 0: the largest; else divide by the temperature,
4. top_k, top_p and min_p, in this order,
5. one uniform number from the row's own generator, and the inverse of the cumulative distribution.

Everything is computed in float64 from the row's own logits, so that neither the batch nor its size has a part in it.
Log-probabilities are those of the model: before bias, penalties and temperature.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from attribution.errors import NotFinite

_NUCLEUS = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens; names and defaults are OpenAI's, `top_k`, `min_p` and `repetition_penalty` are vLLM's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its log-probability in nats; `top` holds the most likely tokens of the same step."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one sequence. The same seed and choice give the same random numbers."""

    def __init__(self, params: SamplingParams, prompt: list[int], seed: int, choice: int) -> None:
        self.params = params
        self._random = np.random.default_rng(np.random.SeedSequence([seed % 2**64, choice]))
        self._prompt = set(prompt)
        self._counts: Counter[int] = Counter()

    def choose(self, logits: Float[Tensor, " vocab"]) -> int:
        """The next token from the raw logits of its step.

        Raises:
            NotFinite: when a logit is NaN.
        """
        if logits.isnan().any():
            raise NotFinite(
                "the model's logits are NaN: its activations overflow in this dtype, or its weights are damaged; "
                "load it with dtype bfloat16 or float32"
            )
        logits = self._adjusted(logits)
        token = int(logits.argmax()) if self.params.temperature == 0 else self._draw(logits)
        self._counts[token] += 1
        return token

    def _adjusted(self, logits: Tensor) -> Tensor:
        params = self.params
        penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
        if not params.logit_bias and not penalised:
            return logits
        logits = logits.double().clone()
        if params.logit_bias:
            logits[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float64)
        if params.repetition_penalty != 1:
            seen = list(self._prompt | set(self._counts))
            logits[seen] = torch.where(
                logits[seen] > 0,
                logits[seen] / params.repetition_penalty,
                logits[seen] * params.repetition_penalty,
            )
        if self._counts:
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float64)
            logits[list(self._counts)] -= params.presence_penalty + params.frequency_penalty * counts
        return logits

    def _draw(self, logits: Tensor) -> int:
        params = self.params
        logits = logits.double()
        # the largest becomes 0 before the division, which nothing can then carry out of range
        probs = torch.softmax((logits - logits.max()) / params.temperature, dim=-1)
        tokens: Tensor | None = None
        if params.top_k > 0:
            probs, tokens = probs.topk(min(params.top_k, len(probs)))
        if params.top_p < 1:
            probs, tokens = _nucleus(probs, tokens, params.top_p)
        if params.min_p > 0:
            kept = probs >= params.min_p * probs.max()
            probs, tokens = probs[kept], kept.nonzero()[:, 0] if tokens is None else tokens[kept]
        cumulative = probs.cumsum(dim=-1)
        target = torch.tensor(self._random.random(), dtype=torch.float64) * cumulative[-1]
        index = min(int(torch.searchsorted(cumulative, target, right=True)), len(probs) - 1)
        return index if tokens is None else int(tokens[index])


def _nucleus(probs: Tensor, tokens: Tensor | None, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest most likely tokens whose probability, of the distribution left so far, reaches `top_p`."""
    total = probs.sum()
    values, order = probs.topk(min(_NUCLEUS, len(probs)))
    if values.sum() < top_p * total:
        values, order = probs.sort(descending=True)
    kept = int((values.cumsum(dim=-1) < top_p * total).sum()) + 1
    order = order[:kept]
    return values[:kept], order if tokens is None else tokens[order]


def token_logprob(logits: Float[Tensor, " vocab"], token: int, top: int) -> TokenLogprob:
    """The log-probability of `token` and of the `top` most likely tokens, in nats."""
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    values, indices = logprobs.topk(min(top, len(logprobs)))
    return TokenLogprob(token, float(logprobs[token]), tuple(zip(indices.tolist(), values.tolist(), strict=True)))
