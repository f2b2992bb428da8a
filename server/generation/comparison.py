"""Two completions of one prompt, step by step: what interventions did to the next-token distributions.

Both run in the same forward passes, so that no more than one row of logits waits for the other; where they cannot (the
reference path runs one after the other), what waits is bounded.
"""

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from attribution.divergence import kl_divergence
from attribution.errors import CaptureTooLarge, NotFinite


@dataclass(frozen=True)
class Step:
    """One step of both, each on its own text.

    Attributes:
        kl: KL(baseline ‖ modified) of the next-token distributions in nats, before temperature, penalties and bias.
        token, baseline_token: the ids that were chosen.
    """

    kl: float
    token: int
    baseline_token: int


class Comparison:
    """Collects the steps that both have taken. Used on the model's thread until both have finished.

    Args:
        max_bytes: the most that may wait for the other.
    """

    def __init__(self, max_bytes: int) -> None:
        self.steps: list[Step] = []
        self._left = max_bytes
        self._waiting: tuple[deque[tuple[Tensor, int]], deque[tuple[Tensor, int]]] = (deque(), deque())
        self._ended = [False, False]

    @property
    def first_changed(self) -> int | None:
        """The first step at which another token was chosen; None when none was."""
        return next((i for i, step in enumerate(self.steps) if step.token != step.baseline_token), None)

    def take(self, logits: Tensor, token: int, *, baseline: bool) -> None:
        """One of the two has chosen a token from these logits, [vocab].

        Raises:
            CaptureTooLarge: too much waits for the other one.
            NotFinite: the divergence is not a number.
        """
        own, other = self._waiting[baseline], self._waiting[not baseline]
        if other:
            pairs = ((logits, token), other.popleft())
            self._left += pairs[1][0].nbytes
            (base, base_token), (modified, modified_token) = pairs if baseline else pairs[::-1]
            kl = float(kl_divergence(base, modified))
            if kl != kl:
                raise NotFinite("the divergence from the baseline is NaN: the logits of one of them are not finite")
            self.steps.append(Step(kl, modified_token, base_token))
        elif not self._ended[not baseline]:
            self._left -= logits.nbytes
            if self._left < 0:
                raise CaptureTooLarge(
                    "baseline: on the reference path one completion waits for the other with the logits of every step, "
                    "and these take more bytes than the server allows a request; lower max_tokens, or start it with a "
                    "larger --max-capture-bytes or --max-batch",
                    param="baseline",
                )
            own.append((logits.clone(), token))

    def end(self, *, baseline: bool) -> None:
        """One of the two has finished: the other has nothing more to wait for."""
        self._ended[baseline] = True
        self._waiting[not baseline].clear()
