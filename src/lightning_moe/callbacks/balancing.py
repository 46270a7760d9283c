"""Trains with balance losses, in any Trainer."""

from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_moe.callbacks.base import require_moe_layers, set_loss_scale
from lightning_moe.layer import MoELayer
from lightning_moe.losses import BalanceLoss, LoadBalancingLoss, ZLoss


class BalanceLossCallback(Callback):
    """Adds balance losses to the training of every MoE layer of a module.

    The gradient is that of ``loss + sum over layers and losses of coefficient * balance_loss``, exactly, under
    accumulation, loss scaling, activation checkpointing, manual optimisation and any strategy. The module's own loss,
    and what it logs, stays as it is; the balance losses are logged beside it by `ExpertUtilizationCallback`.

    Args:
        losses: which losses, with their coefficients; each applies to each layer.
        manual_accumulation: in manual optimisation, the number by which the module divides its loss before
            ``manual_backward``; it cannot be seen from outside.

    Example:
        >>> BalanceLossCallback([LoadBalancingLoss(0.01), ZLoss(0.001)]).manual_accumulation
        1
    """

    def __init__(
        self, losses: Sequence[BalanceLoss] | BalanceLoss | None = None, *, manual_accumulation: int = 1
    ) -> None:
        if losses is None:
            losses = (LoadBalancingLoss(), ZLoss())
        if manual_accumulation < 1:
            raise ValueError(f"manual_accumulation={manual_accumulation}: wanted the divisor of the loss, 1 or more.")
        self.losses = (losses,) if isinstance(losses, BalanceLoss) else tuple(losses)
        self.manual_accumulation = manual_accumulation
        self._layers: list[MoELayer] = []
        names = [loss.name for loss in self.losses]
        if len(set(names)) != len(names):
            raise ValueError(f"losses: {names} names a loss twice; give each once, with its whole coefficient.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches the losses to the layers."""
        self._layers = list(require_moe_layers(self, pl_module).values())
        for layer in self._layers:
            for loss in self.losses:
                layer.balance_losses[loss.name] = loss

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Tells the layers what to scale the injected gradient by."""
        set_loss_scale(trainer, pl_module, self._layers, loss, self.manual_accumulation)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Does what `teardown` does, which Lightning does not call after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the losses off the layers again, so that the model is used without this callback as it was."""
        for layer in self._layers:
            for loss in self.losses:
                if loss.name in layer.balance_losses:
                    del layer.balance_losses[loss.name]
            layer.loss_scale = torch.ones_like(layer.loss_scale)
        self._layers = []
