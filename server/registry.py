"""The models that are loaded: each with its own thread, its savepoints, and one name."""

import asyncio
import gc
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from attribution.errors import Busy, ModelAmbiguous, ModelNotFound
from attribution.features.sources import FeatureStore
from attribution.model.hub import canonical
from attribution.model.known import check_fits
from attribution.model.load import LoadSpec, load
from attribution.model.traced import TracedModel
from attribution.positions import parse_window
from attribution.selectors import parse_selector
from attribution.session import NONE_LOADED, LocalSession, vectors_beside
from attribution.store import ActivationStore
from server.generation.engine import make_engine
from server.metrics import Metrics
from server.savepoints import SavepointSpec, declare
from server.settings import Settings
from server.worker import ModelWorker

EMBEDDED = "demo"
log = logging.getLogger("sightline.models")


@dataclass(frozen=True)
class LoadedModel:
    """A model that can serve: itself, its thread, its session for attribution, and the savepoints of its load."""

    model: TracedModel
    worker: ModelWorker
    session: LocalSession
    spec: LoadSpec
    savepoints: tuple[SavepointSpec, ...] = ()
    created: float = field(default_factory=time.time)

    @property
    def id(self) -> str:
        """The name that requests use."""
        return self.model.id


class ModelRegistry:
    """Loads, finds and unloads models. Used from the event loop only."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self.store = ActivationStore(settings.store_dir, int(settings.store_ram))
        """The stored samples of all models."""
        self.vectors = vectors_beside(self.store, settings.vectors_dir)
        """The steering vectors of all models."""
        self.features = FeatureStore(settings.features, int(settings.features_ram))
        """The autoencoders of all models."""
        self._loaded: dict[str, LoadedModel] = {}
        self._loading: dict[str, tuple[LoadSpec, asyncio.Task[LoadedModel]]] = {}
        self._asking: Counter[str] = Counter()  # loads of each model that have not been answered
        self._taken: set[str] = set()  # the models of which one has been
        self._guests = asyncio.Lock()  # one at a time

    @property
    def loaded(self) -> list[LoadedModel]:
        """The models that can serve, oldest first."""
        return list(self._loaded.values())

    @property
    def queue_length(self) -> int:
        """How many sequences wait, over all models."""
        return sum(entry.worker.queue_length for entry in self._loaded.values())

    def get(self, name: str) -> LoadedModel:
        """The loaded model of this name.

        Raises:
            ModelNotFound: listing what is loaded.
        """
        entry = self._loaded.get(canonical(name))
        if entry is None:
            names = ", ".join(self._loaded) or "none"
            raise ModelNotFound(
                f"no model {name!r} is loaded; loaded: {names}. POST /models/load loads one", param="model"
            )
        return entry

    def choose(self, name: str | None) -> LoadedModel:
        """The loaded model of this name; None is the only one.

        Raises:
            ModelNotFound: it is not loaded, or none is.
            ModelAmbiguous: no name was given and several are.
        """
        if name is not None:
            return self.get(name)
        if not self._loaded:
            raise ModelNotFound(NONE_LOADED, param="model")
        if len(self._loaded) > 1:
            names = ", ".join(self._loaded)
            raise ModelAmbiguous(f"several models are loaded, and none was named: {names}", param="model")
        return next(iter(self._loaded.values()))

    def empty_session(self) -> LocalSession:
        """A session without a model, for what needs none."""
        runs_dir = self._settings.activations_dir
        return LocalSession(None, store=self.store, runs_dir=runs_dir, vectors_dir=self.vectors, features=self.features)

    async def load(self, spec: LoadSpec, savepoints: tuple[SavepointSpec, ...] = ()) -> LoadedModel:
        """Load a model, or wait for the load of it that is under way; loaded again, it takes other savepoints.

        Raises:
            Busy: it is loaded, or being loaded, with other options.
            ModelLoadFailed: the checkpoint cannot be read.
            BadSelector, BadPositions, InvalidRequest: a savepoint is wrong; nothing is changed then.
        """
        for savepoint in savepoints:
            parse_selector(savepoint.selector)
            parse_window(savepoint.positions)
        name = canonical(spec.model_id)
        spec = replace(spec, model_id=name)
        self._asking[name] += 1
        try:
            entry = self._loaded.get(name) or await self._load_once(name, spec)
            if entry.spec != spec:
                raise Busy(
                    f"{name!r} is loaded with {_differences(entry.spec, spec)}; unload it first", param="model_id"
                )
            declare(entry.model, list(savepoints))
            self._taken.add(name)
        finally:
            self._asking[name] -= 1
            if name in self._loaded and name not in self._taken and not self._asking[name]:
                await self.unload(name)  # all who asked for it were refused
        if savepoints and savepoints != entry.savepoints:
            entry = self._loaded[name] = replace(entry, savepoints=savepoints)
        return entry

    async def unload(self, name: str) -> int:
        """Unload a model and free its memory; its requests fail. Returns the bytes of its weights.

        Raises:
            ModelNotFound: it is not loaded.
        """
        entry = self.get(name)
        del self._loaded[entry.id]
        self._taken.discard(entry.id)
        self._metrics.models_loaded.set(len(self._loaded))
        await asyncio.to_thread(entry.worker.stop)
        await asyncio.to_thread(self.features.drop, entry.id)  # which waits while descriptions are read
        size = entry.model.memory_bytes
        del entry
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        log.info("model unloaded", extra={"model": name})
        return size

    @asynccontextmanager
    async def guest(self, spec: LoadSpec) -> AsyncIterator[LoadedModel]:
        """Load a model for one piece of work, and let go of it after; there is one guest at a time.

        No request finds it by its name, so that nobody relies on it, and a request that names no model still means the
        one that is loaded.

        Raises:
            CannotFit: memory does not hold it.
            ModelLoadFailed, InvalidRequest: the checkpoint cannot be read.
        """
        await self._guests.acquire()
        worker: ModelWorker | None = None
        try:
            await asyncio.to_thread(check_fits, spec)
            spec = replace(spec, model_id=canonical(spec.model_id))
            worker = self._worker(spec)
            model = await asyncio.shield(asyncio.wrap_future(worker.loaded))
            yield self._with_session(model, worker, spec)
        finally:
            # to its end, also when the request is cancelled meanwhile
            await asyncio.shield(asyncio.create_task(self._let_go(worker, spec.model_id)))

    async def _let_go(self, worker: ModelWorker | None, name: str) -> None:
        try:
            if worker is not None:
                await asyncio.to_thread(worker.stop)
                if name not in self._loaded:
                    await asyncio.to_thread(self.features.drop, name)
        finally:
            self._guests.release()

    async def close(self) -> None:
        """Unload everything."""
        for name in list(self._loaded):
            await self.unload(name)

    def _with_session(self, model: TracedModel, worker: ModelWorker, spec: LoadSpec) -> LoadedModel:
        runs_dir = self._settings.activations_dir
        session = LocalSession(
            model, store=self.store, runs_dir=runs_dir, vectors_dir=self.vectors, features=self.features
        )
        return LoadedModel(model, worker, session, spec)

    async def _load_once(self, name: str, spec: LoadSpec) -> LoadedModel:
        if name not in self._loading:
            self._loading[name] = (spec, asyncio.create_task(self._load(name, spec)))
        under_way, task = self._loading[name]
        if under_way != spec:
            raise Busy(
                f"{name!r} is being loaded with {_differences(under_way, spec)}; wait for it",
                param="model_id",
            )
        return await asyncio.shield(task)

    def _worker(self, spec: LoadSpec) -> ModelWorker:
        settings = self._settings
        engine = partial(
            make_engine,
            max_batch=settings.max_batch,
            prefill_chunk=settings.prefill_chunk,
            metrics=self._metrics,
        )
        return ModelWorker(spec.model_id, partial(load, spec), engine, settings.max_queue, self._metrics)

    async def _load(self, name: str, spec: LoadSpec) -> LoadedModel:
        log.info("loading model", extra={"model": name})
        worker = self._worker(spec)
        try:
            model = await asyncio.wrap_future(worker.loaded)
            await asyncio.to_thread(self.features.of, model)  # those that wait for it are checked
            entry = self._loaded[name] = self._with_session(model, worker, spec)
        finally:
            del self._loading[name]
        self._metrics.models_loaded.set(len(self._loaded))
        log.info(
            "model loaded",
            extra={
                "model": name,
                "family": model.model_type,
                "points": model.note or "proved",
                "seconds": round(model.load_seconds, 2),
                "bytes": model.memory_bytes,
                "device": str(model.device),
            },
        )
        return entry


def _differences(there: LoadSpec, asked: LoadSpec) -> str:
    fields = ("device_map", "dtype", "attn_implementation", "revision", "quantization")
    changed = [f"{name}={getattr(there, name)!r}" for name in fields if getattr(there, name) != getattr(asked, name)]
    return ", ".join(changed) or "other options"
