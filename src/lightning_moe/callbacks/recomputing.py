"""Activation checkpointing of the blocks around MoE layers, in a LightningModule of anybody's."""

from collections.abc import Callable, Iterator

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightning_moe.blocks import loose_layers, moe_blocks


def checkpoint_activations(module: nn.Module) -> Callable[[], None]:
    """Lets each block around a MoE layer, and its siblings, recompute its activations in the backward.

    Hugging Face models do it themselves, without reentrance; other blocks, and MoE layers that no list of blocks is
    around, are wrapped.

    Args:
        module: holds the model, upcycled.

    Returns:
        What undoes it.
    """
    undo: list[Callable[[], None]] = []
    for model in _outermost_models(module):
        if not model.is_gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            undo.append(model.gradient_checkpointing_disable)
    own = {id(part) for model in _outermost_models(module) for part in model.modules()}
    wrapped = {id(part) for part in (*moe_blocks(module), *loose_layers(module)) if id(part) not in own}
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in wrapped:
                setattr(parent, name, checkpoint_wrapper(child))
                undo.append(_setter(parent, name, child))

    def restore() -> None:
        for each in undo:
            each()

    return restore


def check_recomputing(module: nn.Module) -> None:
    """Makes sure that the Hugging Face blocks of a module recompute, which they do in training mode only.

    Raises:
        MisconfigurationException: if a block is in evaluation mode, as ``from_pretrained`` leaves it.
    """
    for path, block in module.named_modules():
        if isinstance(block, GradientCheckpointingLayer) and block.gradient_checkpointing and not block.training:
            raise MisconfigurationException(
                f"activation_checkpointing: {path} is in evaluation mode, as from_pretrained leaves a model, and "
                "transformers recomputes in training mode only. Call .train() on the model in __init__."
            )


def _outermost_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    inside: set[int] = set()
    for part in module.modules():
        if isinstance(part, PreTrainedModel) and id(part) not in inside and part.supports_gradient_checkpointing:
            inside.update(id(inner) for inner in part.modules())
            yield part


def _setter(parent: nn.Module, name: str, child: nn.Module) -> Callable[[], None]:
    return lambda: setattr(parent, name, child)
