"""Shows in the Trainer's loggers how the experts are used."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_moe.callbacks.base import RoutingCallback, on, require_routed_layers
from lightning_moe.callbacks.coactivation import Coactivation
from lightning_moe.callbacks.dashboard import about, layout
from lightning_moe.callbacks.heatmap import coactivation_heatmaps, load_heatmap
from lightning_moe.callbacks.loggers import log_histogram, log_image, log_layout, log_scalars, log_text
from lightning_moe.callbacks.probe import SelectionProbe
from lightning_moe.callbacks.statistics import RoutingStatistics
from lightning_moe.callbacks.throughput import Throughput
from lightning_moe.routing import MoEWarning, Routing

_MAX_LAYER_SCALARS = 64


class ExpertUtilizationCallback(RoutingCallback):
    """Logs how the experts are used, in training.

    Everything is counted from selections, once per token, padding left out, over all ranks and over all steps since the
    last log; each ``fit`` begins anew, and one from a checkpoint goes on. Logged to every logger, at the Trainer's
    ``log_every_n_steps``:

    - ``moe/max_violation`` (mean over the layers) and ``moe/max_violation_worst`` (worst layer), ``moe/dead_experts``
      (experts without a token, of all layers), ``moe/load_entropy``, ``moe/routing_entropy``, ``moe/router_margin``,
      ``moe/drop_rate``, and each balance loss; these can be monitored by ``ModelCheckpoint`` and ``EarlyStopping``;
    - ``moe/selection_change``, from the second log on: the share of a token's experts that are others than at the log
      before, for 128 hidden states of each layer that are kept from there and routed again;
    - ``moe/tokens_per_second``, ``moe/tflops_per_second`` (per device, of the active parameters) and ``moe/mfu`` (where
      the device's peak is known); validation is not in the time;
    - per layer, up to 64 layers, the same as ``moe_<name>/<layer>``;
    - TensorBoard, Weights & Biases and MLflow also get pictures: the load of layers x experts, and which experts come
      together; TensorBoard a histogram of the relative load, a page of custom scalars, and what each number means.

    Args:
        per_layer: whether to log the scalars of each layer.
        images_every_n_logs: pictures and a histogram with every n-th log, and of the last one at the end; 0 turns them
            off. A run shorter than ``log_every_n_steps`` logs nothing, as of Lightning's own.

    Example:
        >>> ExpertUtilizationCallback(images_every_n_logs=5).per_layer
        True
    """

    def __init__(self, *, per_layer: bool = True, images_every_n_logs: int = 10) -> None:
        if images_every_n_logs < 0:
            raise ValueError(f"images_every_n_logs={images_every_n_logs}: wanted 0 (off) or more.")
        super().__init__()
        self.per_layer = per_layer
        self.images_every_n_logs = images_every_n_logs
        self._statistics = RoutingStatistics({}, {})
        self._coactivation = Coactivation({})
        self._probe = SelectionProbe({})
        self._throughput: Throughput | None = None
        self._sequence_length = 0
        self._num_logs = 0
        self._last_step = -1
        self._last_load: Tensor | None = None
        self._last_drawn = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the layers."""
        self._layers = {layer.name: layer for layer in require_routed_layers(self, pl_module).values()}
        if not trainer.loggers:
            rank_zero_warn(
                "ExpertUtilizationCallback has no logger to write to: pass `logger=` to the Trainer, or leave the "
                "callback out. Its aggregates still reach `trainer.callback_metrics`.",
                category=MoEWarning,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares the counters, now that all losses are attached; takes up the counts of a checkpoint."""
        num_experts = {name: layer.num_experts for name, layer in self._layers.items()}
        losses = {name: list(layer.balance_losses) for name, layer in self._layers.items()}
        self._statistics = RoutingStatistics(num_experts, losses)
        self._coactivation = Coactivation(num_experts if self.images_every_n_logs else {})
        self._probe = SelectionProbe(self._layers)
        self._probe.attach()
        self._throughput = Throughput(pl_module, self._layers)
        log_text(trainer, "moe/about", about(self._statistics.loss_names))
        log_layout(trainer, layout(self._statistics.loss_names, per_layer=self._logs_layers()))
        restored = self.__dict__.pop("_restored", None) or {}
        self._num_logs, self._last_step = restored.get("num_logs", 0), restored.get("last_step", -1)
        self._last_drawn = restored.get("last_drawn", -1)
        self._last_load = on(restored.get("last_load"), pl_module.device)
        if restored and trainer.is_global_zero:
            self._statistics.load_state_dict(restored, pl_module.device)
            self._coactivation.load_state_dict(restored.get("coactivation", {}), pl_module.device)
            self._probe.load_state(restored.get("probe", {}), pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins to count."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if _logs_now(trainer):
            self._probe.look()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops counting and logs, if it is time."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if _logs_now(trainer):
            self._last_step = int(trainer.fit_loop.epoch_loop._batches_that_stepped)
            self._log(trainer, pl_module, self._last_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        if self._throughput is not None:
            self._throughput.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the clock run again."""
        if self._throughput is not None:
            self._throughput.resume()

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Keeps the time of the ``with`` block out of the throughput."""
        throughput = self._throughput
        if throughput is not None:
            throughput.pause()
        try:
            yield
        finally:
            if throughput is not None:
                throughput.resume()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the last load once more, so that the final picture is never missing."""
        if self._last_load is not None and self.images_every_n_logs and self._last_drawn != self._last_step:
            self._draw(trainer, self._last_load, self._last_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Does what `teardown` does, which Lightning does not call after an exception."""
        super().on_exception(trainer, pl_module, exception)
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stops counting, and leaves the routers alone."""
        super().teardown(trainer, pl_module, stage)
        self._probe.detach()

    def state_dict(self) -> dict[str, Any]:
        """The counts since the last log, and what it kept. With several ranks the checkpoint holds those of rank 0."""
        counts = self._finished_counts()
        state = {
            **counts["statistics"],
            "coactivation": counts["coactivation"],
            "probe": SelectionProbe.to_state(counts["probe"]),
            "num_logs": self._num_logs,
            "last_step": self._last_step,
            "last_load": self._last_load,
            "last_drawn": self._last_drawn,
        }
        saved: dict[str, Any] = on(state, "cpu")
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting where the checkpoint was written."""
        self._restored = state_dict

    def _counts(self) -> dict[str, Any]:
        return {
            "statistics": self._statistics.state_dict(),
            "coactivation": self._coactivation.state_dict(),
            "probe": self._probe.kept,
        }

    def _set_counts(self, counts: dict[str, Any]) -> None:
        self._statistics.set_state(counts["statistics"])
        self._coactivation.set_state(counts["coactivation"])
        self._probe.keep(counts["probe"])

    def _logs_layers(self) -> bool:
        return self.per_layer and len(self._layers) <= _MAX_LAYER_SCALARS

    def _count(self, name: str, routing: Routing, losses: Mapping[str, Tensor]) -> None:
        self._statistics.add(name, routing, losses)
        self._coactivation.add(name, routing)
        self._sequence_length = routing.sequence_length or 0

    def _log(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        # every rank has the same layers, whatever ran on it
        totals = trainer.strategy.reduce(self._statistics.totals(pl_module.device), reduce_op="sum")
        load, sums = self._statistics.split(totals)
        change = trainer.strategy.reduce(self._probe.totals(pl_module.device), reduce_op="sum")
        self._statistics.reset()
        if not bool(sums["tokens"].sum() > 0):
            return
        measures = self._statistics.measures(load, sums)
        values = {name: (list(self._layers), rows) for name, rows in measures.items()}
        if bool((change[:, 1] > 0).any()):
            values["selection_change"] = (self._probe.names, change[:, 0] / change[:, 1].clamp(min=1))
        aggregates = {name: float(rows.nanmean()) for name, (_, rows) in values.items()}
        aggregates["max_violation_worst"] = float(measures["max_violation"].max())
        aggregates["dead_experts"] = float(measures["dead_experts"].sum())
        assert self._throughput is not None
        active = sums["computed"] / sums["tokens"].clamp(min=1)
        speed = self._throughput.measures(trainer, pl_module, float(sums["tokens"][0]), active, self._sequence_length)
        logged = {f"moe/{name}": value for name, value in (aggregates | speed).items()}
        pl_module.log_dict(logged, on_step=True, on_epoch=False, batch_size=1)
        if self._logs_layers():
            log_scalars(
                trainer,
                {
                    f"moe_{name}/{label}": value
                    for name, (labels, rows) in values.items()
                    for label, value in zip(labels, rows.tolist(), strict=True)
                    if not math.isnan(value)
                },
                step,
            )
        self._last_load = load
        if self.images_every_n_logs and self._num_logs % self.images_every_n_logs == 0:
            self._draw(trainer, load, step)
        self._num_logs += 1

    def _draw(self, trainer: Trainer, load: Float[Tensor, "L E"], step: int) -> None:
        self._last_drawn = step
        labels = {name: _short(name, index) for index, name in enumerate(self._layers)}
        log_image(trainer, "moe/expert_load", load_heatmap(load, list(labels.values())), step)
        relative = load / load.nanmean(-1, keepdim=True).clamp(min=1e-30)
        log_histogram(trainer, "moe/relative_load", relative[~relative.isnan()], step)
        together = self._coactivation.shares(trainer, load.device)
        if together:
            pictures = {labels[name]: share for name, share in together.items()}
            log_image(trainer, "moe/coactivation", coactivation_heatmaps(pictures), step)


def _logs_now(trainer: Trainer) -> bool:
    # with accumulation, the last micro-batch of a step, when Lightning writes its own logs too
    loop = trainer.fit_loop.epoch_loop
    return bool(trainer._logger_connector.should_update_logs) and not loop._should_accumulate()


def _short(name: str, index: int) -> str:
    # "model.layers.12.mlp" -> "12"
    numbers = [part for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else str(index)
