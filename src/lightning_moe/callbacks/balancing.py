"""Trains with balance losses, in any Trainer."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_moe.callbacks.base import require_routed_layers, set_loss_scale, steps_done, steps_now
from lightning_moe.layer import RoutedLayer, plain_name
from lightning_moe.losses import BalanceLoss, LoadBalancingLoss
from lightning_moe.native import NativeMoE, own_losses
from lightning_moe.routing import MoEWarning
from lightning_moe.schedules import AnySchedule


class BalanceLossCallback(Callback):
    """Adds balance losses to the training of every MoE layer of a module.

    The gradient is that of ``loss + sum over layers and losses of coefficient * balance_loss``, exactly, under
    accumulation, loss scaling, activation checkpointing, manual optimisation and any strategy. The module's own loss,
    and what it logs, stays as it is; the balance losses are logged beside it by `ExpertUtilizationCallback`. Each
    forward of a layer brings its own with the backward; two backwards through one forward would bring them twice.

    Args:
        losses: which losses, with their coefficients; each applies to each layer, with a state of its own there if it
            has any. None takes those of each layer's router, see `Router.balance_losses`; of a MoE block that the model
            brings itself, `LoadBalancingLoss` with the coefficient in the model's configuration.
        schedules: name of a loss, as ``"load_balancing_loss"``, to what its coefficient is multiplied by: any function
            of the number of optimizer steps done.
        layer_weights: what the coefficients are multiplied by in each MoE layer, in the order of the model.
        manual_accumulation: in manual optimisation, the number by which the module divides its loss before
            ``manual_backward``; it cannot be seen from outside.

    Example:
        >>> from lightning_moe import ZLoss
        >>> BalanceLossCallback([LoadBalancingLoss(0.01), ZLoss(0.001)]).manual_accumulation
        1
    """

    def __init__(
        self,
        losses: Sequence[BalanceLoss] | BalanceLoss | None = None,
        *,
        schedules: Mapping[str, AnySchedule] | None = None,
        layer_weights: Sequence[int | float] | None = None,
        manual_accumulation: int = 1,
    ) -> None:
        if manual_accumulation < 1:
            raise ValueError(f"manual_accumulation={manual_accumulation}: wanted the divisor of the loss, 1 or more.")
        self.losses: tuple[BalanceLoss, ...] | None = None
        if losses is not None:
            self.losses = (losses,) if isinstance(losses, BalanceLoss) else tuple(losses)
        self.schedules = schedules
        self.layer_weights = layer_weights
        self.manual_accumulation = manual_accumulation
        self._coefficients: dict[int, float] = {}
        self._layers: dict[str, RoutedLayer] = {}
        self._attached: dict[str, list[BalanceLoss]] = {}
        self._own: list[tuple[Any, int | float]] = []
        self._learnt: dict[str, dict[str, Tensor]] = {}
        self._restored: dict[str, dict[str, Tensor]] | None = None
        names = [loss.name for loss in self.losses or ()]
        if len(set(names)) != len(names):
            raise ValueError(f"losses: {names} names a loss twice; give each once, with its whole coefficient.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches the losses to the layers."""
        self._layers = require_routed_layers(self, pl_module)
        shared: dict[str, BalanceLoss] = {}
        for name, layer in self._layers.items():
            losses = layer.default_losses() if self.losses is None else self.losses
            # a copy, unless one object is to serve all layers: a loss may keep a state of its layer
            attached = [
                shared.setdefault(loss.name, copy.deepcopy(loss)) if loss.shared else copy.deepcopy(loss)
                for loss in losses
            ]
            self._attached[name] = attached
            for loss in attached:
                if loss.needs_outputs and isinstance(layer, NativeMoE):
                    raise MisconfigurationException(
                        f"{type(loss).__name__} looks at the experts' outputs, which {name}, a block of the model's "
                        "own, does not show. Leave the loss out."
                    )
                layer.balance_losses[loss.name] = loss
        self._weigh()
        self._turn_off_own_losses(pl_module)

    def _turn_off_own_losses(self, pl_module: LightningModule) -> None:
        # those of models with MoE blocks of their own, which their forward adds to the loss
        if not any(losses and isinstance(self._layers[name], NativeMoE) for name, losses in self._attached.items()):
            return
        for owner, is_on in own_losses(pl_module):
            self._own.append((owner, owner.router_aux_loss_coef))
            owner.router_aux_loss_coef = 0.0
            if is_on:
                rank_zero_warn(
                    f"{type(owner).__name__} has a balance loss of its own (output_router_logits=True), which is off "
                    "while BalanceLossCallback trains it: it would count twice. Set output_router_logits=False in the "
                    "model's configuration, or leave this callback out.",
                    category=MoEWarning,
                )

    def _weigh(self) -> None:
        # what each loss counts where nothing is scheduled
        weights = [1.0] * len(self._layers) if self.layer_weights is None else list(self.layer_weights)
        if len(weights) != len(self._layers):
            raise MisconfigurationException(
                f"layer_weights: {len(weights)} numbers for {len(self._layers)} MoE layers; wanted one for each."
            )
        names = {loss.name for _, loss in self._by_key()}
        if unknown := sorted(set(self.schedules or {}) - names):
            raise MisconfigurationException(
                f"schedules: no loss {unknown[0]!r} here; there are {', '.join(sorted(names))}."
            )
        self._coefficients = {}
        for weight, losses in zip(weights, self._attached.values(), strict=True):
            for loss in losses:
                if loss.shared and self.layer_weights is not None:
                    raise MisconfigurationException(
                        f"layer_weights: {type(loss).__name__} is one loss for all layers. Give it to a "
                        "BalanceLossCallback of its own, or leave layer_weights out."
                    )
                self._coefficients[id(loss)] = loss.coefficient * weight
                loss.coefficient *= weight

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the coefficients for this step, and how many micro-batches it has: a callback may change that."""
        window = trainer.accumulate_grad_batches if pl_module.automatic_optimization else self.manual_accumulation
        for _, loss in self._by_key():
            if isinstance(loss, LoadBalancingLoss):
                loss.window = window
        for _, loss in self._by_key() if self.schedules else ():
            if schedule := self.schedules.get(loss.name):  # type: ignore[union-attr]
                loss.coefficient = self._coefficients[id(loss)] * schedule(steps_done(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the losses the state that a checkpoint holds."""
        for key, loss in self._by_key():
            if self._restored and key in self._restored:
                loss.load_training_state(self._restored[key])
        self._restored = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Tells the layers what to scale the injected gradient by."""
        set_loss_scale(trainer, pl_module, list(self._layers.values()), loss, self.manual_accumulation)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Lets the losses adapt, once per optimizer step."""
        if not steps_now(trainer):
            return
        for loss in {id(loss): loss for _, loss in self._by_key()}.values():
            loss.step()

    def state_dict(self) -> dict[str, Any]:
        """What the losses have learnt."""
        # after the run, or an exception, the losses are gone from the layers
        learnt = {key: state for key, loss in self._by_key() if (state := loss.training_state())}
        return {"losses": learnt if self._attached else self._learnt}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps it until the losses are attached."""
        self._restored = state_dict.get("losses")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Does what `teardown` does, which Lightning does not call after an exception."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the losses off the layers again, so that the model is used without this callback as it was."""
        if self._attached:
            self._learnt = self.state_dict()["losses"]
        for name, layer in self._layers.items():
            for loss in self._attached.get(name, []):
                if loss.name in layer.balance_losses:
                    del layer.balance_losses[loss.name]
            layer.loss_scale = torch.ones_like(layer.loss_scale)
        for owner, coefficient in self._own:
            owner.router_aux_loss_coef = coefficient
        self._layers, self._attached, self._own = {}, {}, []

    def _by_key(self) -> Iterator[tuple[str, BalanceLoss]]:
        for name, losses in self._attached.items():
            for loss in losses:
                yield f"{plain_name(name)}/{loss.name}", loss
