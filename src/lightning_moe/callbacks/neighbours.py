"""What of a Trainer must not stand beside the upcycling, or beside 4-bit weights."""

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_moe.callbacks.base import callbacks_of, kinds, uses_deepspeed
from lightning_moe.layer import moe_layers


def check_launcher(trainer: Any, pl_module: nn.Module) -> None:
    """Raises if the Trainer's launcher would lose the experts.

    Raises:
        MisconfigurationException: if it spawns or forks its processes, and the module is dense.
    """
    launcher = type(getattr(trainer.strategy, "launcher", None)).__name__
    if launcher == "_MultiProcessingLauncher" and not moe_layers(pl_module):
        raise MisconfigurationException(
            "MoEUpcycleCallback cannot work with a strategy that spawns or forks its processes (ddp_spawn, ddp_fork, "
            "ddp_notebook): the trained experts would stay in the children and be lost. Use strategy='ddp', or call "
            "upcycle(model, config) before trainer.fit(...)."
        )


def check_order(trainer: Any, own: Callback) -> None:
    """Raises if a callback that stands before would work on the dense module.

    Args:
        trainer: has the callbacks.
        own: the upcycling one.

    Raises:
        MisconfigurationException: if one copies or freezes the module in its own setup.
    """
    # these copy or freeze the dense module in their own setup
    early = {"WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging", "BaseFinetuning"}
    for callback in callbacks_of(trainer)[: callbacks_of(trainer).index(own)]:
        if early & kinds(callback):
            raise MisconfigurationException(
                f"{type(callback).__name__} stands before MoEUpcycleCallback in the Trainer's callbacks and would work "
                "on the dense module. Put MoEUpcycleCallback first."
            )


def check_quantization(trainer: Any, quantize: str | None) -> None:
    """Raises if something in the Trainer would quantise routers and pass over experts, or spoil 4-bit weights.

    Args:
        trainer: knows the precision plugin, the strategy and the callbacks.
        quantize: what the upcycling callback was given.

    Raises:
        MisconfigurationException: in these cases.
    """
    if "BitsandbytesPrecision" in kinds(trainer.precision_plugin):
        raise MisconfigurationException(
            "BitsandbytesPrecision quantises every nn.Linear, also those of the head and of routers, and passes over "
            "the experts, which are 3-D tensors and nearly all of the weights. Leave the plugin out, and give "
            "MoEUpcycleCallback(..., quantize='nf4'), or call quantize_frozen(model) yourself."
        )
    if quantize is None:
        return
    for callback in callbacks_of(trainer):
        if "WeightAveraging" in kinds(callback) or "StochasticWeightAveraging" in kinds(callback):
            raise MisconfigurationException(
                f"{type(callback).__name__} averages all parameters, and the bytes of 4-bit weights are no numbers to "
                f"average. Leave it out, or quantize={quantize!r}."
            )
    if uses_deepspeed(trainer):
        raise MisconfigurationException(
            f"quantize={quantize!r}: DeepSpeed casts and flattens all parameters, 4-bit weights among them. Use "
            "another strategy, as 'ddp' or 'moe_fsdp2'."
        )
