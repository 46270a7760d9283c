"""Balances experts without a loss, in any Trainer."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_moe.callbacks.base import RoutingCallback, require_moe_layers
from lightning_moe.losses.base import sum_over_ranks
from lightning_moe.routing import MoEWarning, Routing, choice_load


class ExpertBiasCallback(RoutingCallback):
    """Tells the routers that balance by a bias, as `LossFreeRouter`, how the experts were used.

    Once per optimizer step each router gets the number of assignments of each expert since the last one, counted from
    selections over all ranks and accumulated micro-batches, padding left out. `MoEUpcycleCallback` brings this callback
    with it.

    Reference: Wang et al., *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*, 2024,
    https://arxiv.org/abs/2408.15664.

    Args:
        warn: whether to warn where no router of the model adapts to its load.

    Example:
        >>> ExpertBiasCallback().warn
        True
    """

    def __init__(self, *, warn: bool = True) -> None:
        super().__init__()
        self.warn = warn
        self._load: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the routers."""
        layers = require_moe_layers(self, pl_module)
        self._layers = {layer.name: layer for layer in layers.values() if layer.router.adapts_to_load}
        self._load = {}
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
        if not self._load:
            return
        names = [name for name in self._layers if name in self._load]
        loads = torch.cat([self._load[name] for name in names])
        sum_over_ranks(loads)
        for name, load in zip(names, loads.split([len(self._load[name]) for name in names]), strict=True):
            self._layers[name].router.adapt(load.float())
        self._load = {}

    def state_dict(self) -> dict[str, Any]:
        """The counts since the last optimizer step. With several ranks the checkpoint holds those of rank 0."""
        return {"load": {name: load.cpu() for name, load in self._load.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the counts until training starts."""
        self._restored: dict[str, Tensor] | None = state_dict["load"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on counting where the checkpoint was written."""
        restored = self.__dict__.pop("_restored", None) or {}
        if trainer.is_global_zero:
            self._load = {name: load.to(pl_module.device) for name, load in restored.items() if name in self._layers}

    def _count(self, name: str, routing: Routing, losses: Mapping[str, Tensor]) -> None:
        load = choice_load(routing).double()
        self._load[name] = self._load[name] + load if name in self._load else load
