"""Optimizers that were made before the upcycling: what they hold instead of the dense FFNs' parameters."""

import copy
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import Optimizer

from lightning_moe.ffn import FFNFamily
from lightning_moe.ffn_search import find_ffns
from lightning_moe.layer import MoELayer, moe_layers

Sources = Mapping[int, tuple[weakref.ref[nn.Parameter], str]]
"""The id of a dense parameter, to the parameter and its place: the FFN's name, and which of its weights it is."""


def dense_sources(
    target: nn.Module, family: FFNFamily | None, prefix: str
) -> dict[int, tuple[weakref.ref[nn.Parameter], str]]:
    """Notes which parameters are those of dense FFNs, before they are replaced."""
    # weak references, and made in a function: whoever holds a dense FFN keeps its memory while the next layer is built
    return {
        id(parameter): (weakref.ref(parameter), f"{prefix}{name}/{canonical}")
        for name, weights in find_ffns(target, family).items()
        for canonical, parameter in weights.sources
    }


def repoint(module: nn.Module, made: Any, sources: Sources) -> None:
    """Gives an optimizer the MoE parameters that took the place of the dense ones that it holds, group by group.

    Args:
        module: upcycled.
        made: what ``configure_optimizers`` returned.
        sources: what `dense_sources` noted.
    """
    # LightningCLI's --optimizer, or a user, may have made the optimizer before the upcycling: it holds the dense
    # FFNs' parameters. Each group that held one gets the MoE parameters that took its place.
    layers = moe_layers(module)
    for optimizer in _optimizers(made):
        present = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for group in optimizer.param_groups:
            kept, places = [], set()
            for parameter in group["params"]:
                reference, place = sources.get(id(parameter), (None, ""))
                # an id can be reused once the dense parameter is gone; the reference tells
                if reference is not None and reference() is parameter and place.split("/")[0] in layers:
                    places.add(place)
                else:
                    kept.append(parameter)
            if places:
                new = [p for place in sorted(places) for p in _successors(layers, place) if id(p) not in present]
                unique = {id(p): p for p in new}
                present |= set(unique)
                group["params"] = kept + list(unique.values())


def check_trained(layers: Mapping[str, MoELayer], optimizers: Iterable[Optimizer]) -> None:
    """Raises if an expert or a router would never train, because no optimizer holds it.

    Args:
        layers: by name.
        optimizers: all of them, not yet wrapped by a strategy that flattens parameters.

    Raises:
        MisconfigurationException: with the names of the forgotten parameters.
    """
    trained = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    forgotten = [
        f"{name}.{key}"
        for name, layer in layers.items()
        for key, parameter in layer.named_parameters()
        if parameter.requires_grad and id(parameter) not in trained
    ]
    if forgotten:
        raise MisconfigurationException(
            f"{len(forgotten)} MoE parameters are in no optimizer and would never train: {', '.join(forgotten[:3])}"
            f"{', ...' if len(forgotten) > 3 else ''}. Build the optimizer in configure_optimizers() from "
            "self.parameters(), or set requires_grad=False on what shall stay as it is."
        )


def drop_frozen(made: Any) -> None:
    """Takes out of optimizers what does not train, so that a weight that went into 4 bit is let go of.

    Args:
        made: what ``configure_optimizers`` returned.
    """
    for optimizer in _optimizers(made):
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]


def keep_routers_in_32_bits(module: nn.Module, made: Any) -> None:
    """Lets the 8-bit optimizers of bitsandbytes keep routers' states in 32 bits, as they do those of small tensors.

    Args:
        module: upcycled.
        made: what ``configure_optimizers`` returned.
    """
    routers = {id(p) for layer in moe_layers(module).values() for p in layer.router.parameters()}
    for optimizer in _optimizers(made):
        manager: Any = getattr(optimizer, "mng", None)
        if not type(manager).__module__.startswith("bitsandbytes."):
            continue
        # The one that it has is shared by all optimizers of the process, and finds a parameter by its position.
        own = copy.copy(manager)
        own.index2config = dict(manager.index2config)
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                if id(parameter) in routers:
                    own.index2config[group_index, index] = {"optim_bits": 32}
        optimizer.mng = own  # type: ignore[attr-defined]


def _successors(layers: Mapping[str, MoELayer], place: str) -> Iterable[nn.Parameter]:
    # which MoE parameters follow one dense parameter; the router goes where the up projection was
    name, canonical = place.split("/")
    layer = layers[name]
    found = [
        p for experts in (layer.experts, layer.shared_experts) if experts for p in experts.parameters_for(canonical)
    ]
    if canonical == "up":
        found += list(layer.router.parameters())
    return [p for p in found if p.requires_grad]


def _optimizers(made: Any) -> list[Optimizer]:
    # whatever configure_optimizers may return: an optimizer, a dict with one, and lists and tuples of these
    if isinstance(made, Optimizer):
        return [made]
    if isinstance(made, dict):
        return _optimizers(made.get("optimizer"))
    if isinstance(made, (list, tuple)):
        return [optimizer for entry in made for optimizer in _optimizers(entry)]
    return []
