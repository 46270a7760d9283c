"""The seam into a foreign LightningModule: public hooks only.

Nothing here wraps ``training_step``. The balance losses live in the layers, which inject their gradient; what they must
be scaled by is known to `on_before_backward` (accumulation, loss scaler) and to a hook on the loss tensor (what the
strategy does to it later, as DeepSpeed).
"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_moe.layer import MoELayer, moe_layers


def require_moe_layers(callback: Callback, pl_module: LightningModule) -> dict[str, MoELayer]:
    """Finds the module's MoE layers by name.

    Raises:
        MisconfigurationException: if it has none.
    """
    layers = moe_layers(pl_module)
    if not layers:
        raise MisconfigurationException(
            f"{type(callback).__name__}: {type(pl_module).__name__} has no MoE layer. Upcycle the model first, or put "
            "MoEUpcycleCallback(UpcycleConfig(...)) before this callback in the Trainer's list."
        )
    return layers


def set_loss_scale(
    trainer: Trainer, pl_module: LightningModule, layers: Sequence[MoELayer], loss: Tensor, manual_accumulation: int
) -> None:
    """Makes the layers inject their balance losses as if these had been added to ``loss``.

    Args:
        trainer: knows accumulation and loss scaler.
        pl_module: knows whether optimisation is automatic.
        layers: whose ``loss_scale`` is set.
        loss: what `on_before_backward` got: already divided and scaled.
        manual_accumulation: what the user divides a manually optimised loss by.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    factor = 1.0 if scaler is None else float(scaler.get_scale())
    factor /= trainer.accumulate_grad_batches if pl_module.automatic_optimization else manual_accumulation

    def write(grad: Tensor) -> None:
        # 1, or what the strategy multiplied the loss by after this hook was set
        scale = grad.detach().float().reshape(()) * factor
        for layer in layers:
            layer.loss_scale.copy_(scale)

    if loss.requires_grad:
        loss.register_hook(write)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's own list, which Lightning sets without declaring it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def uses_deepspeed(trainer: Any) -> bool:
    """Whether the strategy is DeepSpeed's, whose optimizers hold flattened copies of the parameters."""
    return any("DeepSpeed" in cls.__name__ for cls in type(trainer.strategy).__mro__)
