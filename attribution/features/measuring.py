"""How good autoencoders are on texts that they were not trained on.

1. The model runs over samples as it is; what each place holds gives, over all rows that are kept, the mean number of
   active features (L0), the features that are never active (dead), and the explained variance,
   1 − Σ|y − ŷ|² / Σ|y − ȳ|².
2. It runs again with what the autoencoder reconstructs in the place of what is written, and with zeros, and with the
   mean ȳ. Each gives a loss: the mean cross-entropy, in nats, of the tokens that are scored.
3. Recovered is (loss of the ablation − loss spliced) / (loss of the ablation − loss as it is).

Several can be spliced in at once: each then reads what the ones before it have left.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from attribution.activations import batches, padded
from attribution.errors import InvalidArgument
from attribution.features.autoencoder import Autoencoder
from attribution.features.places import Place, place_rows, place_stream
from attribution.features.streaming import Sample
from attribution.model.capture import Batch, forward
from attribution.model.edits import Edit, changes_of, targets_of
from attribution.model.traced import TracedModel
from attribution.operation import Progress, Steps

_LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Piece:
    """An autoencoder with its places."""

    autoencoder: Autoencoder
    reads: Place
    writes: Place


@dataclass(frozen=True)
class Figures:
    """What was measured, over so many rows and so many scored tokens.

    Attributes:
        l0: active features of a row, in the mean.
        explained_variance: 1 − Σ|y − ŷ|² / Σ|y − ȳ|²; 0 is the mean, 1 perfect.
        dead: features that none of the rows activates.
        loss: mean cross-entropy of a scored token, in nats, of the model as it is.
        spliced, zero, mean: the same with the reconstruction, zeros, or the mean in place.
    """

    rows: int
    tokens: int
    n_features: int
    l0: float
    explained_variance: float
    dead: int
    loss: float
    spliced: float
    zero: float
    mean: float

    @property
    def recovered(self) -> float:
        """The share of the loss that zeros cost, and the reconstruction does not."""
        return _share(self.zero - self.spliced, self.zero - self.loss)

    @property
    def recovered_of_mean(self) -> float:
        """The share of the loss that the mean costs, and the reconstruction does not."""
        return _share(self.mean - self.spliced, self.mean - self.loss)


def _share(kept: float, whole: float) -> float:
    """NaN where there is nothing to recover."""
    return kept / whole if whole else float("nan")


class _Sums:
    """What is added up over rows, in float64."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder
        self.rows, self.active, self.error, self.square = 0, 0, 0.0, 0.0
        self.total = torch.zeros(autoencoder.d_out, dtype=torch.float64)
        self.fired = torch.zeros(autoencoder.n_features, dtype=torch.bool)

    def add(self, x: Tensor, y: Tensor) -> None:
        features = self.autoencoder.encode(x)
        error = y.to(features) - self.autoencoder.decode(features, x)
        self.rows += len(x)
        self.active += int((features > 0).sum())
        self.fired |= (features > 0).any(0).cpu()
        self.error += float(error.double().square().sum())
        self.square += float(y.double().square().sum())
        self.total += y.double().sum(0).cpu()

    @property
    def mean(self) -> Tensor:
        return self.total / self.rows

    @property
    def explained(self) -> float:
        variance = self.square - self.rows * float(self.mean.square().sum())
        return 1 - self.error / variance


def measure(model: TracedModel, piece: Piece, samples: Sequence[Sample]) -> Steps[Figures]:
    """Measure one autoencoder; progress is counted in samples, each of which is run five times.

    Raises:
        InvalidArgument: the samples have no rows, or no scored tokens.
        UnsupportedModel: the points of the model are not proved.
    """
    for what in ("kept", "counted"):
        if not any(bool(getattr(sample, what)().any()) for sample in samples):
            raise InvalidArgument(
                f"there is nothing to measure with: no token of the samples is {what}", param="samples"
            )
    groups = [
        part for group in batches([len(one.token_ids) for one in samples]) for part in _small(model, group, samples)
    ]
    sums, done = _Sums(piece.autoencoder), 0
    for group in groups:
        for x, y, keep in _rows(model, piece, [samples[index] for index in group]):
            sums.add(x[keep], y[keep])
        done += len(group)
        yield Progress(done, 2 * len(samples))
    flat = _constants(piece, sums.mean)
    losses, tokens = torch.zeros(4, dtype=torch.float64), 0
    for group in groups:
        chosen = [samples[index] for index in group]
        runs = [[], [piece], *([one] for one in flat)]
        losses += torch.tensor([_loss(spliced_logits(model, chosen, run), chosen) for run in runs], dtype=torch.float64)
        tokens += sum(int(one.counted().sum()) for one in chosen)
        done += len(group)
        yield Progress(done, 2 * len(samples))
    return Figures(
        sums.rows,
        tokens,
        piece.autoencoder.n_features,
        sums.active / sums.rows,
        sums.explained,
        int((~sums.fired).sum()),
        *(losses / tokens).tolist(),
    )


def spliced_logits(
    model: TracedModel, samples: Sequence[Sample], pieces: Sequence[Piece]
) -> list[Float[Tensor, "pos vocab"]]:
    """The logits at every position of samples, with reconstructions in place at the rows that are kept.

    The pieces are to be given in the order in which the model reaches them.
    """
    batch = padded(model, [sample.token_ids for sample in samples])
    batch = replace(batch, keep=batch.ids.shape[1])
    edits: list[Edit] = []
    for piece in pieces:
        stream = place_stream(model, piece.reads)
        _, captured = forward(model, replace(batch, keep=1), [stream], changes_of(model, edits))
        x = place_rows(model, piece.reads, captured[stream][0])
        edits += _edits(model, piece, samples, x)
    logits, _ = forward(model, batch, [], changes_of(model, edits))
    return [logits[row, -len(sample.token_ids) :] for row, sample in enumerate(samples)]


def _edits(model: TracedModel, piece: Piece, samples: Sequence[Sample], x: Tensor) -> list[Edit]:
    (target,) = targets_of(model, place_stream(model, piece.writes), point=piece.writes.point)
    found = []
    for row, sample in enumerate(samples):
        length = len(sample.token_ids)
        written, keep = piece.autoencoder.reconstruct(x[row, -length:]), sample.kept()

        def put(rows: Tensor, written: Tensor = written, keep: Tensor = keep) -> Tensor:
            value = written.to(rows).reshape(rows.shape)
            return torch.where(keep.to(rows.device).view(-1, *[1] * (rows.ndim - 1)), value, rows)

        found.append(Edit(target, row, put, columns=range(-length, 0)))
    return found


def _rows(model: TracedModel, piece: Piece, samples: Sequence[Sample]) -> list[tuple[Tensor, Tensor, Tensor]]:
    streams = [place_stream(model, place) for place in (piece.reads, piece.writes)]
    batch: Batch = padded(model, [sample.token_ids for sample in samples])
    _, captured = forward(model, batch, dict.fromkeys(streams))
    x, y = (
        place_rows(model, place, captured[stream][0]).float()
        for place, stream in zip((piece.reads, piece.writes), streams, strict=True)
    )
    lengths = [len(sample.token_ids) for sample in samples]
    return [(x[row, -n:], y[row, -n:], samples[row].kept()) for row, n in enumerate(lengths)]


def _constants(piece: Piece, mean: Tensor) -> list[Piece]:
    """What writes zeros, and what writes the mean, whatever it reads."""
    one = piece.autoencoder
    nothing = Autoencoder(
        "relu", torch.zeros_like(one.W_enc[:, :1]), torch.zeros_like(one.W_enc[0, :1]), torch.zeros_like(one.W_dec[:1]),
        torch.zeros_like(one.b_dec),
    )  # fmt: skip
    return [
        replace(piece, autoencoder=replace(nothing, b_dec=value)) for value in (nothing.b_dec, mean.to(nothing.b_dec))
    ]


def _loss(logits: Sequence[Tensor], samples: Sequence[Sample]) -> float:
    """The sum of the cross-entropies of the tokens that are scored."""
    total = 0.0
    for rows, sample in zip(logits, samples, strict=True):
        places = sample.counted().nonzero().flatten().to(rows.device)
        labels = torch.tensor(sample.token_ids, device=rows.device)[places]
        total += float(torch.nn.functional.cross_entropy(rows[places - 1].double(), labels, reduction="sum"))
    return total


def _small(model: TracedModel, group: list[int], samples: Sequence[Sample]) -> list[list[int]]:
    """A batch cut so that the logits of all its positions stay small."""
    longest = max(len(samples[index].token_ids) for index in group)
    count = max(1, _LOGITS_AT_ONCE // (longest * model.dimensions.d_vocab))
    return [group[first : first + count] for first in range(0, len(group), count)]
