"""Balances experts without a loss, in any Trainer."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_moe.callbacks.base import RoutingCallback, require_routed_layers, steps_done, steps_now
from lightning_moe.checks import check_not_negative
from lightning_moe.losses.base import sum_over_ranks
from lightning_moe.native import NativeMoE, attach_native
from lightning_moe.routing import MoEWarning, Routing, choice_load
from lightning_moe.schedules import AnySchedule


class ExpertBiasCallback(RoutingCallback):
    """Tells the routers that balance by a bias, as `LossFreeRouter`, how the experts were used.

    Once per optimizer step each router gets the number of assignments of each expert since the last one, counted from
    selections over all ranks and accumulated micro-batches, padding left out. MoE blocks that a Hugging Face model
    brings itself have their ``e_score_correction_bias`` moved by the same rule, and kept in float32.
    `MoEUpcycleCallback` brings this callback with it.

    Reference: Wang et al., *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*, 2024,
    https://arxiv.org/abs/2408.15664.

    Args:
        bias_rate: step of the bias of models that have one themselves (DeepSeek-V3, GLM-4-MoE), in score units per
            optimizer step; `LossFreeRouter` has a ``bias_rate`` of its own.
        schedule: what every such rate is multiplied by: any function of the number of optimizer steps done.
        warn: whether to warn where no router of the model adapts to its load.

    Raises:
        ValueError: if ``bias_rate`` is negative.

    Example:
        >>> from lightning_moe import StepSchedule
        >>> ExpertBiasCallback(schedule=StepSchedule({0: 1, 10_000: 0})).bias_rate  # still at the end, as DeepSeek-V3
        0.001
    """

    def __init__(
        self, *, bias_rate: int | float = 1e-3, schedule: AnySchedule | None = None, warn: bool = True
    ) -> None:
        super().__init__()
        check_not_negative(bias_rate=bias_rate)
        self.bias_rate = bias_rate
        self.schedule = schedule
        self.warn = warn
        self._load: dict[str, Tensor] = {}
        self._biases: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes the biases of native blocks, before the precision plugin rounds them."""
        self._biases = {
            native.name: native.expert_bias.detach().clone()
            for native in attach_native(pl_module).values()
            if native.adapts_to_load
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the routers."""
        layers = require_routed_layers(self, pl_module)
        self._layers = {layer.name: layer for layer in layers.values() if layer.adapts_to_load}
        self._load = {}
        for name, layer in self._native().items():
            layer.bias_rate = self.bias_rate
            layer.set_expert_bias(_unrounded(layer.expert_bias, self._biases.get(name)))
        self._biases = {}
        if not self._layers and self.warn:
            rank_zero_warn(
                "ExpertBiasCallback has no effect: no router of the model adapts to its load. Take LossFreeRouter, or "
                "leave the callback out.",
                category=MoEWarning,
            )

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Tells the routers their load; with several optimizers, those of the forwards since the last step."""
        # every rank has run the same layers, or none: the module's forward is the same code
        if not self._load or not steps_now(trainer):
            return
        names = [name for name in self._layers if name in self._load]
        scale = 1.0 if self.schedule is None else self.schedule(steps_done(trainer))
        loads = torch.cat([self._load[name] for name in names])
        sum_over_ranks(loads)
        for name, load in zip(names, loads.split([len(self._load[name]) for name in names]), strict=True):
            self._layers[name].adapt(load.float(), scale)
        self._load = {}
        if self._before is not None:
            # what was counted before this batch is used up too
            self._before = {}

    def state_dict(self) -> dict[str, Any]:
        """The counts since the last optimizer step. With several ranks the checkpoint holds those of rank 0.

        And the biases of native blocks: the model's state dict is rounded when the precision plugin casts the model.
        """
        biases = {name: layer.expert_bias.detach().cpu().clone() for name, layer in self._native().items()}
        return {"load": {name: load.cpu() for name, load in self._finished_counts().items()}, "biases": biases}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps them until training starts."""
        self._restored: dict[str, Any] | None = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on counting where the checkpoint was written."""
        restored = self.__dict__.pop("_restored", None) or {}
        if trainer.is_global_zero:
            loads = restored.get("load", {}).items()
            self._load = {name: load.to(pl_module.device) for name, load in loads if name in self._layers}
        biases = restored.get("biases", {})
        for name, layer in self._native().items():
            if name in biases:
                layer.set_expert_bias(biases[name])

    def _count(self, name: str, routing: Routing, losses: Mapping[str, Tensor]) -> None:
        load = choice_load(routing).double()
        self._load[name] = self._load[name] + load if name in self._load else load

    def _counts(self) -> dict[str, Tensor]:
        return dict(self._load)

    def _set_counts(self, counts: dict[str, Tensor]) -> None:
        self._load = dict(counts)

    def _native(self) -> dict[str, NativeMoE]:
        return {name: layer for name, layer in self._layers.items() if isinstance(layer, NativeMoE)}


def _unrounded(bias: Tensor, noted: Tensor | None) -> Tensor:
    # what was noted, if the bias is that but for its dtype: a checkpoint may have come between
    return noted if noted is not None and torch.equal(noted.to(bias), bias) else bias
