"""Finds MoE layers that nothing trains, because what they compute does not reach the loss."""

from collections.abc import Mapping

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_moe.layer import MoELayer
from lightning_moe.routing import MoEWarning


def check_reached(module: nn.Module, layers: Mapping[str, MoELayer], optimizer: Optimizer) -> dict[str, MoELayer]:
    """Warns of MoE layers to which the loss gave no gradient, as the last one of a vision tower that ends before it.

    Exact, and without a look at any number: the backward gives every expert a gradient, be it zero, if it comes by the
    layer, and none if not. The router's would not tell: a loss on the routing may reach that alone.

    Args:
        module: what is trained; while nothing of it has a gradient, as after a skipped batch, nothing is told.
        layers: by name, not checked yet.
        optimizer: the one about to step; layers are told of that it trains.

    Returns:
        The layers that are still to be checked.
    """
    if all(parameter.grad is None for parameter in module.parameters()):
        return dict(layers)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    unreached, unchecked = [], {}
    for name, layer in layers.items():
        trained = _trained(layer)
        if trained and not any(id(parameter) in held for parameter in trained):
            unchecked[name] = layer
        elif trained and all(parameter.grad is None for parameter in trained):
            unreached.append(name)
    if unreached:
        rank_zero_warn(
            f"{len(unreached)} MoE layer{'s' if len(unreached) > 1 else ''} got no gradient in the first step: "
            f"{', '.join(unreached[:3])}{', ...' if len(unreached) > 3 else ''}. What they compute does not reach the "
            "loss, so neither their experts nor their routers learn, and balance losses have no effect there. Leave "
            "them dense, with `layers=` of UpcycleConfig, or let the loss use the hidden states behind them. If only "
            "later batches use them, all is well.",
            category=MoEWarning,
        )
    return unchecked


def _trained(layer: MoELayer) -> list[nn.Parameter]:
    # the experts that the router sends to; the router itself, where these are frozen
    for part in (layer.experts, layer.router):
        if found := [parameter for parameter in part.parameters() if parameter.requires_grad]:
            return found
    return []
