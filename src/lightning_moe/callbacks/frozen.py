"""Finds MoE layers that cannot learn, because of what is frozen."""

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_moe.layer import MoELayer
from lightning_moe.receipt import Receipt
from lightning_moe.routers import Router
from lightning_moe.routing import MoEWarning

# of two experts' weights, rounding apart
_COPIES = 1 - 1e-6


def check_frozen(layers: Mapping[str, MoELayer], receipt: Receipt | None) -> None:
    """Warns if nothing of the MoE layers trains, or if their experts are copies that stay copies.

    Args:
        layers: by name.
        receipt: of the upcycling, if it was done in this run.

    Raises:
        MisconfigurationException: if peft has put a copy of its own in the place of a router.
    """
    for name, layer in layers.items():
        if not isinstance(layer.router, Router):
            raise MisconfigurationException(
                f"{name}.router: a {type(layer.router).__name__} stands in its place. Leave it out of modules_to_save, "
                "and let the router train by train_only(model) after get_peft_model(...)."
            )
    learning = [name for name, layer in layers.items() if _trains(layer)]
    if layers and not learning:
        rank_zero_warn(
            "Nothing of the MoE layers trains: all their parameters have requires_grad=False. peft's get_peft_model "
            "freezes everything but its adapters: call train_only(model) after it.",
            category=MoEWarning,
        )
    elif receipt is not None and (receipt.expert_similarity or 0.0) > _COPIES:
        frozen = [name for name, layer in layers.items() if _trains(layer.router) and not _trains(layer.experts)]
        if frozen:
            rank_zero_warn(
                f"The experts of {frozen[0]} are copies and frozen, so they stay copies, and the router has nothing to "
                "learn. Upcycle with init=LowRankInit(rank=8), whose experts train beside a frozen FFN, or with an "
                "initialiser that makes them different.",
                category=MoEWarning,
            )


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
