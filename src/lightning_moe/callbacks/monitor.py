"""Shows in the Trainer's loggers how the experts are used."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_moe.callbacks.base import RoutingCallback, require_moe_layers
from lightning_moe.callbacks.heatmap import load_heatmap
from lightning_moe.metrics import load_entropy, max_violation, num_dead_experts, token_entropy
from lightning_moe.routing import MoEWarning, Routing, expert_load

_MAX_LAYER_SCALARS = 64


class ExpertUtilizationCallback(RoutingCallback):
    """Logs how the experts are used, in training.

    Everything is counted from selections, once per token, padding left out, over all ranks and over all steps since the
    last log. Logged to every logger, at the Trainer's ``log_every_n_steps``:

    - ``moe/max_violation`` (mean over the layers) and ``moe/max_violation_worst`` (worst layer), ``moe/dead_experts``
      (experts without a token, of all layers), ``moe/load_entropy``, ``moe/routing_entropy``, and each balance loss;
      these can be monitored by ``ModelCheckpoint`` and ``EarlyStopping``;
    - per layer, up to 64 layers: ``moe_max_violation/<layer>``, ``moe_dead_experts/<layer>``,
      ``moe_load_entropy/<layer>``, ``moe_<loss>/<layer>``;
    - TensorBoard also gets a heatmap of layers x experts and a histogram of the relative load.

    Args:
        per_layer: whether to log the scalars of each layer.
        images_every_n_logs: a heatmap and a histogram with every n-th log, and at the end; 0 turns them off.

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
        self._load: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._num_logs = 0
        self._last_step = -1
        self._last_load: Tensor | None = None
        self._last_drawn = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares the counters."""
        self._layers = {layer.name: layer for layer in require_moe_layers(self, pl_module).values()}
        self._reset()
        if not trainer.loggers:
            rank_zero_warn(
                "ExpertUtilizationCallback has no logger to write to: pass `logger=` to the Trainer, or leave the "
                "callback out. Its aggregates still reach `trainer.callback_metrics`.",
                category=MoEWarning,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops counting and logs, if it is time."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        loop = trainer.fit_loop.epoch_loop
        # with accumulation, the last micro-batch of a step, when Lightning writes its own logs too
        if trainer._logger_connector.should_update_logs and not loop._should_accumulate():
            self._last_step = int(loop._batches_that_stepped)
            self._log(trainer, pl_module, self._last_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the last load once more, so that the final picture is never missing."""
        if self._last_load is not None and self.images_every_n_logs and self._last_drawn != self._last_step:
            self._draw(trainer, self._last_load, self._last_step)

    def state_dict(self) -> dict[str, Any]:
        """The counts since the last log. With several ranks the checkpoint holds those of rank 0."""
        return {
            "load": {name: tensor.cpu() for name, tensor in self._load.items()},
            "sums": {name: tensor.cpu() for name, tensor in self._sums.items()},
            "num_logs": self._num_logs,
            "last_step": self._last_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting where the checkpoint was written."""
        self._restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes up the counts of a checkpoint."""
        restored = self.__dict__.pop("_restored", None)
        if restored is None:
            return
        self._num_logs, self._last_step = restored["num_logs"], restored["last_step"]
        num_sums = 3 + len(self._loss_names())
        # counts of other losses do not add up with those to come
        if trainer.is_global_zero and all(tensor.numel() == num_sums for tensor in restored["sums"].values()):
            for counts, saved in ((self._load, restored["load"]), (self._sums, restored["sums"])):
                for name, tensor in saved.items():
                    counts[name] = tensor.to(pl_module.device)

    def _loss_names(self) -> list[str]:
        return list(next(iter(self._layers.values())).balance_losses)

    def _reset(self) -> None:
        self._load, self._sums = {}, {}

    def _count(self, name: str, routing: Routing, losses: Mapping[str, Tensor]) -> None:
        total, tokens = token_entropy(routing)
        values = [torch.ones_like(total), total, tokens, *losses.values()]
        sums = torch.stack([value.detach().double() for value in values])
        load = expert_load(routing).double()
        self._load[name] = self._load[name] + load if name in self._load else load
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _log(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        load, sums = self._reduced(trainer, pl_module)
        self._reset()
        if not bool(load.sum() > 0):
            return
        names = self._loss_names()
        forwards, tokens = sums[:, :1].clamp(min=1), sums[:, 2].clamp(min=1)
        layers = {
            "max_violation": max_violation(load),
            "dead_experts": num_dead_experts(load),
            "load_entropy": load_entropy(load),
            "routing_entropy": sums[:, 1] / tokens,
            **dict(zip(names, (sums[:, 3:] / forwards).unbind(1), strict=True)),
        }
        aggregates = {f"moe/{name}": values.mean() for name, values in layers.items()}
        aggregates["moe/max_violation_worst"] = layers["max_violation"].max()
        aggregates["moe/dead_experts"] = layers["dead_experts"].sum()
        pl_module.log_dict({k: v.float() for k, v in aggregates.items()}, on_step=True, on_epoch=False, batch_size=1)
        if self.per_layer and len(self._layers) <= _MAX_LAYER_SCALARS:
            self._log_layers(trainer, layers, step)
        self._last_load = load
        if self.images_every_n_logs and self._num_logs % self.images_every_n_logs == 0:
            self._draw(trainer, load, step)
        self._num_logs += 1

    def _reduced(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Tensor, Tensor]:
        # one tensor, one all-reduce; every rank has the same layers, whatever ran on it
        num_experts = max(layer.experts.num_experts for layer in self._layers.values())
        num_sums = 3 + len(self._loss_names())
        both = torch.zeros(len(self._layers), num_experts + num_sums, dtype=torch.float64, device=pl_module.device)
        for row, name in enumerate(self._layers):
            if name in self._load:
                both[row, : self._load[name].numel()] = self._load[name]
                both[row, num_experts:] = self._sums[name]
        both = trainer.strategy.reduce(both, reduce_op="sum")
        return both[:, :num_experts], both[:, num_experts:]

    def _log_layers(self, trainer: Trainer, layers: Mapping[str, Tensor], step: int) -> None:
        scalars = {}
        for name, values in layers.items():
            for label, value in zip(self._layers, values.tolist(), strict=True):
                scalars[f"moe_{name}/{label}"] = value
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)

    def _draw(self, trainer: Trainer, load: Tensor, step: int) -> None:
        self._last_drawn = step
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            # duck typing: SummaryWriter, whichever logger wraps it
            writer: Any = getattr(logger, "experiment", None)
            if hasattr(writer, "add_image") and hasattr(writer, "add_histogram"):
                labels = [_short(name, index) for index, name in enumerate(self._layers)]
                writer.add_image("moe/expert_load", load_heatmap(load, labels), step, dataformats="HWC")
                relative = load / load.mean(-1, keepdim=True).clamp(min=1e-30)
                writer.add_histogram("moe/relative_load", relative.flatten().float().cpu(), step)


def _short(name: str, index: int) -> str:
    # "model.layers.12.mlp" -> "12"
    numbers = [part for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else str(index)
