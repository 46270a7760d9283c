"""Which parts of an upcycled model train, and which are frozen."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import nn

from lightning_moe.checks import check_choice
from lightning_moe.layer import MoELayer, moe_layers
from lightning_moe.low_rank import LowRankExperts
from lightning_moe.native import native_blocks

TrainedPart = Literal["router", "low_rank", "shared_experts", "experts", "adapters"]
QLORA: tuple[TrainedPart, ...] = ("router", "low_rank", "shared_experts", "adapters")


def train_only(model: nn.Module, train: Sequence[TrainedPart] = QLORA, *, skip: Sequence[str] = ()) -> None:
    """Lets some parts of an upcycled model train and freezes all else, in full precision or in 4 bit.

    `quantize_frozen` does so itself. After peft's ``get_peft_model``, which freezes everything but its adapters, this
    makes routers and low-rank experts train again.

    Args:
        model: an upcycled model.
        train: the parts, see `quantize_frozen`.
        skip: patterns of names; what matches is left as it is.

    Raises:
        ValueError: if nothing would train, or if a part or a pattern is none.

    Example:
        >>> from lightning_moe import UpcycleConfig, upcycle
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)))
        >>> receipt = upcycle(model, UpcycleConfig(num_experts=4))
        >>> train_only(model, ["router"])
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.router.gate']
    """
    trained = trained_names(model, require_layers(model), train)
    set_trained(model, trained, matching(model, skip))


def require_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The MoE layers of a model.

    Raises:
        ValueError: if it has none.
    """
    layers = moe_layers(model)
    if not layers:
        own = ", and the MoE blocks of its own are not known here" if native_blocks(model) else ""
        raise ValueError(f"{type(model).__name__} has no MoE layer of ours{own}. Call upcycle(model, config) first.")
    return layers


def trained_names(model: nn.Module, layers: Mapping[str, MoELayer], train: Sequence[str] | None) -> set[str]:
    """The names of the parameters that are to train.

    Args:
        model: an upcycled model.
        layers: its MoE layers.
        train: the parts; None is what trains now.

    Raises:
        ValueError: if nothing would train, though ``train`` names a part, or if a part is none.
    """
    if train is None:
        return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in train:
        check_choice("train", part, get_args(TrainedPart))
    found: set[int] = set()
    for name, layer in layers.items():
        experts = layer.plain_experts
        low_rank = isinstance(experts, LowRankExperts)
        if low_rank and "experts" in train:
            raise ValueError(
                f'train: {name} has low-rank experts, which share one frozen FFN; what trains of them is "low_rank".'
            )
        parts: dict[TrainedPart, Sequence[nn.Parameter]] = {
            "router": list(layer.router.parameters()),
            "low_rank": experts.changes() if isinstance(experts, LowRankExperts) else (),
            "experts": () if low_rank else list(experts.parameters()),
            "shared_experts": [] if layer.shared_experts is None else list(layer.shared_experts.parameters()),
        }
        found.update(id(p) for part, own in parts.items() if part in train for p in own if p.is_floating_point())
    if "adapters" in train:
        found.update(id(p) for p in adapters(model) if p.requires_grad)
    if train and not found:
        raise ValueError(
            f"train={tuple(train)}: the model has no such parameters, so nothing would train. Upcycle with "
            'init=LowRankInit(rank=8), or with a router that learns. Or give train=("experts",), or () for nothing.'
        )
    return {name for name, parameter in model.named_parameters() if id(parameter) in found}


def set_trained(model: nn.Module, trained: set[str], skipped: set[str]) -> None:
    """Lets the parameters of these names train and freezes all others, but for those skipped."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and name not in skipped:
            parameter.requires_grad_(name in trained)


def adapters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of peft's adapters."""
    # told by what peft's layers have, so that this file needs no peft
    for module in model.modules():
        if hasattr(module, "base_layer"):
            for name in getattr(module, "adapter_layer_names", ()):
                part = getattr(module, name, None)
                if isinstance(part, nn.Module):
                    yield from part.parameters()


def matching(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The names of the parameters that a pattern matches, or that of the module that holds them.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if any(fnmatchcase(n, pattern) for n in (name, name.rpartition(".")[0]))}
        if not matched:
            raise ValueError(f'skip: {pattern!r} matches no parameter. Give a name or a pattern, as "*score*".')
        found |= matched
    return found
