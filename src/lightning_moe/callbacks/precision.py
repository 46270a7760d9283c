"""What must not stand beside 4-bit weights, or beside MoE layers that something else is to quantise."""

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_moe.callbacks.base import callbacks_of, uses_deepspeed


def check_quantization(trainer: Any, quantize: str | None) -> None:
    """Raises if something in the Trainer would quantise routers and pass over experts, or spoil 4-bit weights.

    Args:
        trainer: knows the precision plugin, the strategy and the callbacks.
        quantize: what the upcycling callback was given.

    Raises:
        MisconfigurationException: in these cases.
    """
    if "BitsandbytesPrecision" in _kinds(trainer.precision_plugin):
        raise MisconfigurationException(
            "BitsandbytesPrecision quantises every nn.Linear, also those of the head and of routers, and passes over "
            "the experts, which are 3-D tensors and nearly all of the weights. Leave the plugin out, and give "
            "MoEUpcycleCallback(..., quantize='nf4'), or call quantize_frozen(model) yourself."
        )
    if quantize is None:
        return
    for callback in callbacks_of(trainer):
        if "WeightAveraging" in _kinds(callback) or "StochasticWeightAveraging" in _kinds(callback):
            raise MisconfigurationException(
                f"{type(callback).__name__} averages all parameters, and the bytes of 4-bit weights are no numbers to "
                f"average. Leave it out, or quantize={quantize!r}."
            )
    if uses_deepspeed(trainer):
        raise MisconfigurationException(
            f"quantize={quantize!r}: DeepSpeed casts and flattens all parameters, 4-bit weights among them. Use "
            "another strategy, as 'ddp' or 'moe_fsdp2'."
        )


def _kinds(thing: Any) -> set[str]:
    return {cls.__name__ for cls in type(thing).__mro__}
