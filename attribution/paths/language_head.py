"""The path of `lm_head`."""

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.integrate import Points
from attribution.model.head import OutputHead
from attribution.model.traced_backward import traced_input_gradient
from attribution.paths.pieces import pieces


class LanguageHeadPath:
    """`lm_head`: O = Σ_i log softmax(U Ñ(x_i))[label_i], over the candidates or the whole vocabulary."""

    def __init__(self, head: OutputHead, x: Float[Tensor, "pos d_model"], labels: list[int]) -> None:
        self.head, self.x = head, x.to(head.device, head.dtype)
        self.labels = torch.tensor(labels, device=head.device)
        self._frozen = head.norm.at(self.x)

    def gradient(self, points: Points, rows: list[int]) -> Float[Tensor, "1 chosen d_model"]:
        """See `attribution.integrate.Path`."""
        return self.complete_gradient(points)[:, rows]

    def complete_gradient(self, points: Points) -> Float[Tensor, "1 pos d_model"]:
        """See `attribution.integrate.Path`."""
        parts = []
        for rows in pieces(len(self.x), len(points.alphas) * self.head.width):
            x, frozen, labels = self.x[rows], self._frozen.rows(rows), self.labels[rows]
            grad = traced_input_gradient(
                self.head.norm_envoy,
                points.rows(torch.zeros_like(x), x).to(self.head.norm_dtype),
                lambda normed, labels=labels: points.weigh(self._log_probabilities(normed, labels)).sum(),
                output=lambda x_s, frozen=frozen: frozen(x_s.to(self.head.dtype)),
            )
            parts.append(grad.to(self.head.dtype).sum(0))
        return torch.cat(parts)[None]

    @torch.no_grad()
    def objective(self, alpha: float) -> Float[Tensor, "1"]:
        """See `attribution.integrate.Path`."""
        total = torch.zeros(1, dtype=torch.float64, device=self.x.device)
        for rows in pieces(len(self.x), self.head.width):
            normed = self._frozen.rows(rows)(alpha * self.x[rows])
            total += self._log_probabilities(normed, self.labels[rows]).sum()
        return total

    def _log_probabilities(self, normed: Float[Tensor, "*point pos d_model"], labels: Tensor) -> Tensor:
        logits = self.head.logits(normed).double()
        return logits.log_softmax(-1).gather(-1, labels.expand(logits.shape[:-1])[..., None])[..., 0]
