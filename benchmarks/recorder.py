"""Measures a run of the benchmark from within: losses, routing, seconds; a run that goes on keeps them."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_moe.layer import MoELayer, moe_layers
from lightning_moe.metrics import ActiveExperts, ExpertLoad, ExpertWeightCosine
from lightning_moe.routing import Routing, observe_routing

Record = dict[str, Any]

ROUTING = "moe/"
VALIDATION = "val_loss"


class RecordLogger(Logger):
    """Keeps what is logged for the whole model: losses, and how the experts are used.

    Args:
        file: where each row is written as it comes, and read again by a run that goes on: Lightning logs a step after
            it has written the checkpoint of that step.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        lines = file.read_text().splitlines() if file.is_file() else []
        self.rows: list[tuple[int, dict[str, float]]] = [tuple(json.loads(line)) for line in lines]

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Keeps a row."""
        self.rows.append((step, metrics))
        with self.file.open("a") as file:
            file.write(json.dumps((step, metrics)) + "\n")

    @property
    def name(self) -> str:
        """Of the logger."""
        return "record"

    @property
    def version(self) -> int:
        """Of the logger."""
        return 0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keeps what is of training; what is of validation comes without the number of steps before it."""
        kept = {k: float(v) for k, v in metrics.items() if k.startswith((ROUTING, "train_loss"))}
        if kept:
            self.add(0 if step is None else int(step), kept)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the record holds the whole configuration."""

    def series(self, prefix: str) -> list[Record]:
        """What was logged under names that begin so, one entry per step; of a step that was run twice, the last."""
        found: dict[int, Record] = {}
        for step, metrics in self.rows:
            kept = {name.removeprefix(prefix): rounded(v) for name, v in metrics.items() if name.startswith(prefix)}
            if kept:
                found.setdefault(step, {"step": step}).update(kept)
        return [found[step] for step in sorted(found)]


class Recorder(Callback):
    """Measures a run from within: seconds, the load in validation, how alike the experts are; goes into checkpoints.

    Args:
        logger: takes the losses of validation.
    """

    def __init__(self, logger: RecordLogger) -> None:
        self.logger = logger
        self.seconds = {"training_wall": 0.0, "training_cpu": 0.0}
        self.similarity: list[float] = []
        self.load: dict[str, ExpertLoad] = {}
        self.active: dict[str, ActiveExperts] = {}
        self.validated = -1
        self._began: tuple[float, float] | None = None
        self._stop: Callable[[], None] = lambda: None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the experts before any of them learnt something."""
        if not self.similarity:
            self.similarity.append(expert_similarity(moe_layers(pl_module)))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the clock."""
        self._began = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops it: validation, checkpoints and the reading of batches are not in it."""
        assert self._began is not None
        self.seconds["training_wall"] += time.perf_counter() - self._began[0]
        self.seconds["training_cpu"] += time.process_time() - self._began[1]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to count the load."""
        layers = moe_layers(pl_module)
        self.load = {layer.name: ExpertLoad(layer.num_experts) for layer in layers.values()}
        self.active = {layer.name: ActiveExperts() for layer in layers.values()}
        self._stop = observe_routing(self._observe)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends it, and keeps the losses."""
        self._stop()
        losses = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(VALIDATION)}
        self.validated = trainer.global_step
        self.logger.add(self.validated, losses)

    def state_dict(self) -> dict[str, Any]:
        """All that was measured so far."""
        return {"seconds": self.seconds, "similarity": self.similarity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self.seconds, self.similarity = state_dict["seconds"], state_dict["similarity"]

    def _observe(self, name: str, routing: Routing, losses: Mapping[str, Tensor]) -> None:
        if name in self.load:
            self.load[name].to(routing.weights.device).update(routing)
            self.active[name].to(routing.weights.device).update(routing)


def expert_similarity(layers: Mapping[str, MoELayer]) -> float:
    """Mean cosine of two experts of a layer; nan without any."""
    metric = ExpertWeightCosine()
    for layer in layers.values():
        metric.update(layer.expert_weights())
    return float(metric.compute()) if layers else math.nan


def rounded(value: Any) -> float:
    """To five places, as records have it."""
    return round(float(value), 5)
