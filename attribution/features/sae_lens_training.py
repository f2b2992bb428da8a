"""Training a sparse autoencoder with SAELens, from the same rows as `attribution.features.training`.

SAELens trains on what its iterator gives: rows centred and scaled by constants. What it saves for inference is read as
any such folder is, and the constants are folded into the weights. It has no training of transcoders.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attribution.errors import InvalidArgument, LibraryMissing
from attribution.features.autoencoder import Autoencoder
from attribution.features.places import Place
from attribution.features.reading import read_autoencoder
from attribution.features.scaling import Scale, folded
from attribution.features.streaming import Sample, shuffled_rows
from attribution.features.training import DECAY, WARM_UP, Recipe, too_few
from attribution.model.traced import TracedModel
from attribution.operation import Progress, Steps


def train_with_sae_lens(
    model: TracedModel, place: Place, recipe: Recipe, samples: Iterable[Sample]
) -> Steps[Autoencoder]:
    """Train an autoencoder at a place; "jumprelu" is SAELens' batch top-k. Progress is counted in rows.

    Raises:
        LibraryMissing: sae-lens is not installed.
        InvalidArgument: the samples have too few rows, or the recipe has a skip path.
        UnsupportedModel: the points of the model are not proved.
    """
    if recipe.skip:
        raise InvalidArgument("only a transcoder has a skip path: an autoencoder would copy its input", param="skip")
    trainer_of = sae_lens_trainer()
    rows = _Rows(shuffled_rows(model, [place], samples, recipe.batch_rows, seed=recipe.seed), place, recipe)
    trainer = trainer_of(recipe, len(rows.scale.mean), str(model.device), rows)
    while trainer.n_training_samples < recipe.rows:
        trainer.maybe_reset_sparsity()
        trainer.step(next(rows))
        trainer.n_training_steps += 1
        yield Progress(min(trainer.n_training_samples, recipe.rows), recipe.rows)
    with tempfile.TemporaryDirectory() as folder:
        trainer.sae.save_inference_model(folder)
        trained = read_autoencoder(folder).autoencoder
    return folded(trained.to("cpu"), rows.scale, rows.scale)


@dataclass
class _Rows:
    """The iterator that SAELens takes from: rows of one place, scaled by the constants of its first batch."""

    batches: Iterator[dict[Place, Tensor]]
    place: Place
    recipe: Recipe
    taken: int = 0

    def __post_init__(self) -> None:
        first = next(self.batches, None)
        if first is None:
            raise too_few(0, self.recipe.rows)
        self._next: Tensor | None = first[self.place]
        self.scale = Scale.of(self._next)

    def __iter__(self) -> "_Rows":
        return self

    def __next__(self) -> Tensor:
        rows = self._next if self._next is not None else next(self.batches, {}).get(self.place)
        self._next = None
        if rows is None:
            raise too_few(self.taken, self.recipe.rows)
        self.taken += len(rows)
        return self.scale(rows)


def sae_lens_trainer() -> Any:
    """What makes a trainer of SAELens of a recipe, a width, a device and rows.

    Raises:
        LibraryMissing: sae-lens is not installed.
    """
    try:
        from sae_lens import (  # pyright: ignore[reportMissingImports]
            BatchTopKTrainingSAE,
            BatchTopKTrainingSAEConfig,
            LoggingConfig,
            TopKTrainingSAE,
            TopKTrainingSAEConfig,
        )
        from sae_lens.config import SAETrainerConfig  # pyright: ignore[reportMissingImports]
        from sae_lens.training.sae_trainer import SAETrainer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise LibraryMissing(
            "autoencoders are trained with sae-lens: pip install 'sightline[sae]', or choose the trainer that needs no "
            "library, --trainer own",
            param="trainer",
        ) from error

    def make(recipe: Recipe, width: int, device: str, rows: Iterator[Tensor]) -> Any:
        import torch

        torch.manual_seed(recipe.seed)
        batched = recipe.architecture == "jumprelu"
        options: dict[str, Any] = {"d_in": width, "d_sae": recipe.features, "k": recipe.k, "device": device}
        if batched:  # a running mean, which must have settled when the training ends
            options["topk_threshold_lr"] = min(1.0, max(0.01, 10 / recipe.steps))
        config = (BatchTopKTrainingSAEConfig if batched else TopKTrainingSAEConfig)(**options)
        training = SAETrainerConfig(
            total_training_samples=recipe.rows,
            train_batch_size_samples=recipe.batch_rows,
            lr=recipe.top_rate,
            lr_end=0.0,
            lr_warm_up_steps=int(WARM_UP * recipe.steps),
            lr_decay_steps=int(DECAY * recipe.steps),
            device=device,
            dead_feature_window=max(1, recipe.steps // 12),
            logger=LoggingConfig(log_to_wandb=False),
        )
        sae = (BatchTopKTrainingSAE if batched else TopKTrainingSAE)(config)
        return SAETrainer(training, sae, rows)

    return make
