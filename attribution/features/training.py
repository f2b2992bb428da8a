"""Training sparse autoencoders and transcoders on rows of activations.

1. Rows are centred and scaled by constants taken from the first of them, so that learning rates mean the same in every
   model; at the end this is folded into the weights.
2. a = activation(x W_enc + b_enc), where the k largest activations of each row stay ("topk"), or the k · rows largest
   of the whole batch ("jumprelu": Bussmann et al., BatchTopK Sparse Autoencoders, 2024).
3. The loss is the mean of |y − a W_dec − b_dec|², over the variance of y, and an auxiliary one by which features that
   have not fired for long learn to write the rest (Gao et al., Scaling and evaluating sparse autoencoders, 2024, A.2).
4. The rows of W_dec have length 1 after every step.
5. "jumprelu" is given the threshold that batches had in the last fifth of the training.

y is x for an autoencoder, and for a transcoder what the MLP writes where x is what it reads.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attribution.errors import InvalidArgument
from attribution.features.autoencoder import Autoencoder
from attribution.features.places import Place
from attribution.features.scaling import Scale, folded
from attribution.features.streaming import Sample, shuffled_rows
from attribution.model.traced import TracedModel
from attribution.operation import Progress, Steps

Architecture = Literal["topk", "jumprelu"]

WARM_UP, DECAY = 0.03, 0.3
"""Shares of the training in which the learning rate rises, and falls."""
DEAD_AFTER = 0.08
"""The share of the training without firing after which a feature is dead."""
INITIAL_GAIN = 0.2
"""Of the first encoder: what many features write together must not be more than what there is to write."""
AUXILIARY = 1 / 16
"""The weight of the auxiliary loss."""


@dataclass(frozen=True)
class Recipe:
    """How an autoencoder is trained.

    Attributes:
        features: how many it has.
        k: how many of them are active in a row; of "jumprelu" in the mean.
        rows: how many rows it is trained on.
        batch_rows: rows of one step.
        learning_rate: the highest one; None is 12e-4 / √(features / 2^14).
        skip: whether a transcoder has a linear path beside its features.
        seed: of the first weights.
    """

    features: int = 1024
    architecture: Architecture = "topk"
    k: int = 16
    rows: int = 1_000_000
    batch_rows: int = 1024
    learning_rate: float | None = None
    skip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("features", "k", "rows", "batch_rows"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} is at least 1; found {getattr(self, name)}", param=name)
        if self.k > self.features:
            raise InvalidArgument(f"k is at most the number of features, {self.features}; found {self.k}", param="k")

    @property
    def steps(self) -> int:
        """How many steps the training has."""
        return math.ceil(self.rows / self.batch_rows)

    @property
    def top_rate(self) -> float:
        """The highest learning rate."""
        return 12e-4 / math.sqrt(self.features / 2**14) if self.learning_rate is None else self.learning_rate


class Trainer:
    """An autoencoder in training.

    Args:
        first: rows of what is read, from which constants are taken; the more the better.
        target: the same rows of what is to be written; None for an autoencoder.

    Raises:
        InvalidArgument: an autoencoder is to have a skip path, or the rows are all the same.
    """

    def __init__(
        self,
        recipe: Recipe,
        first: Float[Tensor, "row d_in"],
        target: Float[Tensor, "row d_out"] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if recipe.skip and target is None:
            raise InvalidArgument(
                "only a transcoder has a skip path: an autoencoder would copy its input", param="skip"
            )
        self.recipe, self.device = recipe, torch.device(device)
        self._reads = Scale.of(first.to(self.device).float())
        self._writes = self._reads if target is None else Scale.of(target.to(self.device).float())
        d_in, d_out = first.shape[1], (first if target is None else target).shape[1]
        draw = torch.Generator().manual_seed(recipe.seed)
        decoder = nn.functional.normalize(torch.randn(recipe.features, d_out, generator=draw), dim=-1)
        encoder = decoder.T if target is None else torch.randn(d_in, recipe.features, generator=draw) / math.sqrt(d_in)
        self.W_enc = nn.Parameter((encoder * INITIAL_GAIN).contiguous().to(self.device))
        self.b_enc = nn.Parameter(torch.zeros(recipe.features, device=self.device))
        self.W_dec = nn.Parameter(decoder.to(self.device))
        self.b_dec = nn.Parameter(torch.zeros(d_out, device=self.device))
        self.W_skip = nn.Parameter(torch.zeros(d_in, d_out, device=self.device)) if recipe.skip else None
        weights = [one for one in (self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.W_skip) if one is not None]
        self._optimizer = torch.optim.Adam(weights, lr=recipe.top_rate, betas=(0.9, 0.999), fused=True)
        self._silent = torch.zeros(recipe.features, device=self.device)
        self._thresholds: list[float] = []
        self.taken = 0

    @property
    def dead(self) -> int:
        """How many features are dead now."""
        return int(self._is_dead().sum())

    def step(self, x: Float[Tensor, "row d_in"], y: Float[Tensor, "row d_out"] | None = None) -> float:
        """Train on some rows; the share of the variance that was not explained before the step."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.top_rate * self._rate()
        x = self._reads(x.to(self.device))
        target = x if y is None else self._writes(y.to(self.device))
        pre = torch.addmm(self.b_enc, x, self.W_enc)
        active = self._active(pre)
        written = torch.addmm(self.b_dec, active, self.W_dec)
        if self.W_skip is not None:
            written = written + x @ self.W_skip
        loss = (target - written).square().mean()
        auxiliary = self._auxiliary(pre, (target - written).detach())
        self._optimizer.zero_grad(set_to_none=True)
        (loss if auxiliary is None else loss + AUXILIARY * auxiliary).backward()
        self._clean_gradient()
        self._optimizer.step()
        with torch.no_grad():
            self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True))
            self._silent += len(x)
            self._silent[(active > 0).any(0)] = 0
        self.taken += 1
        return float(loss.detach())

    def finish(self) -> Autoencoder:
        """What was trained, for rows as the model has them: every constant is folded into the weights."""
        threshold = None
        if self.recipe.architecture == "jumprelu":
            found = sum(self._thresholds) / max(1, len(self._thresholds))
            threshold = torch.full_like(self.b_enc, found).detach()
        trained = Autoencoder(
            self.recipe.architecture,
            self.W_enc.detach(),
            self.b_enc.detach(),
            self.W_dec.detach().clone(),
            self.b_dec.detach(),
            threshold=threshold,
            k=self.recipe.k if threshold is None else None,
            W_skip=None if self.W_skip is None else self.W_skip.detach(),
        )
        return folded(trained, self._reads, self._writes)

    def _rate(self) -> float:
        """The learning rate of this step, as a share of the highest."""
        done = self.taken / self.recipe.steps
        return min(1.0, (done + 1 / self.recipe.steps) / WARM_UP, max(0.0, 1 - done) / DECAY)

    def _active(self, pre: Tensor) -> Tensor:
        if self.recipe.architecture == "topk":
            values, indices = pre.topk(self.recipe.k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter(-1, indices, torch.relu(values))
        threshold = _threshold(pre.detach(), self.recipe.k * len(pre))
        if self.taken >= 0.8 * self.recipe.steps:
            self._thresholds.append(threshold)
        return pre * (pre.detach() > threshold)

    def _is_dead(self) -> Tensor:
        return self._silent > DEAD_AFTER * self.recipe.rows

    def _auxiliary(self, pre: Tensor, rest: Tensor) -> Tensor | None:
        """How badly the dead features write what the others left, as a share of it."""
        dead = self._is_dead().nonzero().flatten()
        if not len(dead):
            return None
        values, indices = pre[:, dead].topk(min(len(dead), max(1, rest.shape[1] // 2)), dim=-1, sorted=False)
        active = torch.zeros_like(pre[:, dead]).scatter(-1, indices, torch.relu(values))
        return (rest - active @ self.W_dec[dead]).square().mean() / rest.square().mean().clamp(min=1e-12)

    def _clean_gradient(self) -> None:
        """Take off the part along the rows of W_dec, which have a fixed length."""
        gradient = self.W_dec.grad
        assert gradient is not None
        with torch.no_grad():
            gradient -= (gradient * self.W_dec).sum(-1, keepdim=True) * self.W_dec


def _threshold(pre: Tensor, kept: int) -> float:
    """What `kept` pre-activations of a batch are above, at least 0."""
    if kept >= pre.numel():
        return 0.0
    return max(0.0, float(pre.flatten().kthvalue(pre.numel() - kept).values))


def train(
    model: TracedModel, reads: Place, writes: Place, recipe: Recipe, samples: Iterable[Sample]
) -> Steps[Autoencoder]:
    """Train an autoencoder, or a transcoder where it writes elsewhere than it reads; progress is counted in rows.

    Args:
        samples: as many as the recipe's rows need; those that are left are not read.

    Raises:
        InvalidArgument: the samples have too few rows, or the recipe does not fit.
        UnsupportedModel: the points of the model are not proved.
    """
    (trained,) = yield from train_together(model, [(reads, writes, recipe)], samples)
    return trained


def train_together(
    model: TracedModel, wanted: Sequence[tuple[Place, Place, Recipe]], samples: Iterable[Sample]
) -> Steps[list[Autoencoder]]:
    """Train several on the same rows, for one run of the model; all recipes have the same rows and batches.

    Raises:
        InvalidArgument, UnsupportedModel: as `train`.
    """
    recipe = wanted[0][2]
    assert {(one.rows, one.batch_rows) for _, _, one in wanted} == {(recipe.rows, recipe.batch_rows)}
    places = list(dict.fromkeys(place for reads, writes, _ in wanted for place in (reads, writes)))
    trainers: list[Trainer] = []
    done = 0
    for rows in shuffled_rows(model, places, samples, recipe.batch_rows, seed=recipe.seed):
        pairs = [(rows[reads], rows[writes] if writes != reads else None) for reads, writes, _ in wanted]
        if not trainers:
            trainers = [Trainer(one, x, y, model.device) for (x, y), (_, _, one) in zip(pairs, wanted, strict=True)]
        for trainer, (x, y) in zip(trainers, pairs, strict=True):
            trainer.step(x, y)
        done += len(rows[places[0]])
        yield Progress(min(done, recipe.rows), recipe.rows)
        if done >= recipe.rows:
            return [trainer.finish() for trainer in trainers]
    raise too_few(done, recipe.rows)


def too_few(found: int, wanted: int) -> InvalidArgument:
    """The error of samples that end before the training does."""
    return InvalidArgument(
        f"the samples have {found} rows, and the training asks for {wanted}; give more of them, or fewer rows",
        param="samples",
    )
