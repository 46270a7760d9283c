"""QLoRA for Mixtures of Experts: frozen experts and linear layers in 4 bit, and what trains beside them.

Everything of a model but a few parts is frozen, and the frozen weights go into 4 bit: the experts' 3-D tensors, or the
FFN that low-rank experts share, and the ``nn.Linear`` layers. Routers, norms, embeddings, the output head, tied weights
and whatever trains stay as they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.checks import check_choice
from lightning_moe.experts import Experts
from lightning_moe.four_bit import BLOCK_SIZES, QUANT_TYPES, Linear4bit, Weight4bit, bitsandbytes_functional
from lightning_moe.freezing import QLORA, TrainedPart, adapters, matching, require_layers, set_trained, trained_names
from lightning_moe.layer import MoELayer
from lightning_moe.receipt import by_reason, human, human_bytes, lines, num_bytes, num_parameters


@dataclass(frozen=True)
class Quantization:
    """What `quantize_frozen` did.

    Args:
        quant_type: ``"nf4"`` or ``"fp4"``.
        block_size: weights that share one scale.
        experts: names of the experts' tensors that are in 4 bit.
        linears: names of the linear layers' weights that are.
        kept: why, for each other weight with two dimensions or more: its name to the reason.
        num_weights: in 4 bit, over all tensors.
        trainable_parameters: those that training changes, before and after.
        memory: bytes of the parameters and buffers as they are stored, before and after.
    """

    quant_type: str
    block_size: int
    experts: tuple[str, ...]
    linears: tuple[str, ...]
    kept: Mapping[str, str]
    num_weights: int
    trainable_parameters: tuple[int, int]
    memory: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {**asdict(self), "kept": dict(self.kept)}

    def __str__(self) -> str:
        rows = [
            ("in 4 bit", f"{len(self.experts)} tensors of experts, {len(self.linears)} linear layers"),
            ("weights", f"{human(self.num_weights)}, at {4 + 32 / self.block_size:g} bits"),
            ("memory", " -> ".join(map(human_bytes, self.memory))),
            ("trainable", " -> ".join(map(human, self.trainable_parameters))),
            *(("kept", line) for line in by_reason(self.kept)),
        ]
        return lines(f"Quantised to {self.quant_type}, in blocks of {self.block_size}.", rows)


def quantize_frozen(
    model: nn.Module,
    *,
    quant_type: str = "nf4",
    block_size: int = 64,
    train: Sequence[TrainedPart] | None = QLORA,
    skip: Sequence[str] = (),
) -> Quantization:
    """Freezes an upcycled model but for some parts, and puts what is frozen into 4 bit, in place.

    To be called before the optimizer is made. Biases, norms and embeddings are frozen too, in full precision. A weight
    is dequantised when it is used; between forward and backward only its 4 bits are kept.

    Args:
        model: an upcycled model, not yet sharded.
        quant_type: ``"nf4"`` or ``"fp4"``.
        block_size: weights that share one float32 scale; ``4 + 32 / block_size`` bits per weight.
        train: the parts that train: ``"router"``; ``"low_rank"``, what `LowRankExperts` have for themselves;
            ``"shared_experts"``; ``"experts"``, all of ordinary ones; ``"adapters"``, those of peft that do. All else
            is frozen. None freezes nothing: what is frozen already goes into 4 bit.
        skip: patterns of names, as ``"*score*"``: what matches is neither frozen nor quantised.

    Returns:
        What was done.

    Raises:
        ImportError: if bitsandbytes is not installed.
        ValueError: if there is nothing to quantise, if nothing would train, if a weight is sharded or of a dtype that
            bitsandbytes does not take, or if a part, a pattern or another argument is none.

    Example:
        >>> from lightning_moe import LowRankInit, UpcycleConfig, upcycle
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)), nn.Linear(64, 64))
        >>> receipt = upcycle(model, UpcycleConfig(num_experts=4, init=LowRankInit(rank=4)))
        >>> quantize_frozen(model).experts
        ('0.experts.up_proj', '0.experts.down_proj')
    """
    check_choice("quant_type", quant_type, QUANT_TYPES)
    check_choice("block_size", block_size, BLOCK_SIZES)
    bitsandbytes_functional()
    layers = require_layers(model)
    for name, layer in layers.items():
        if layer.experts is not layer.plain_experts:
            raise ValueError(
                f"{name}.experts: an adapter of peft stands on the experts, and it needs them in full precision. "
                "Upcycle with init=LowRankInit(rank=8) instead: LoRA experts, whose shared FFN goes into 4 bit."
            )
    trained, skipped = trained_names(model, layers, train), matching(model, skip)
    chosen, kept = _choose(model, layers, trained, skipped)
    before = num_parameters(model, trainable=True), num_bytes(model)
    set_trained(model, trained, skipped)
    num_weights = 0
    for name in chosen:
        weight = Weight4bit.of(_tensor(model, name), quant_type=quant_type, block_size=block_size)
        _put_in(model, name, weight)
        num_weights += weight.numel()
    experts = {name for name in chosen if isinstance(_owner(model, name), Experts)}
    return Quantization(
        quant_type=quant_type,
        block_size=block_size,
        experts=tuple(name for name in chosen if name in experts),
        linears=tuple(name for name in chosen if name not in experts),
        kept=kept,
        num_weights=num_weights,
        trainable_parameters=(before[0], num_parameters(model, trainable=True)),
        memory=(before[1], num_bytes(model)),
    )


def dequantize(model: nn.Module) -> None:
    """Puts all 4-bit weights of a model back into full precision, in place and frozen; what was rounded stays rounded.

    Example:
        >>> from lightning_moe import UpcycleConfig, upcycle
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)))
        >>> receipt, done = upcycle(model, UpcycleConfig(num_experts=4)), quantize_frozen(model)
        >>> dequantize(model)
        >>> model[0].experts.up_proj.shape
        torch.Size([4, 256, 64])
    """
    for name, weight in four_bit_weights(model).items():
        owner = _owner(model, name)
        if isinstance(owner, Linear4bit):
            owner.revert()
        else:
            key = name.rpartition(".")[2]
            delattr(owner, key)
            owner.register_parameter(key, nn.Parameter(weight.dequantize(), requires_grad=False))


def four_bit_weights(model: nn.Module) -> dict[str, Weight4bit]:
    """The weights of a model that are in 4 bit, by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Weight4bit)}


def four_bit_recipe(model: nn.Module) -> dict[str, Any] | None:
    """Which weights are in 4 bit and what trains beside them, in plain Python; None where none is."""
    weights = four_bit_weights(model)
    if not weights:
        return None
    return {
        "weights": {name: [weight.quant_type, weight.block_size] for name, weight in weights.items()},
        "trainable": [name for name, parameter in model.named_parameters() if parameter.requires_grad],
    }


def apply_four_bit(model: nn.Module, recipe: Mapping[str, Any]) -> None:
    """Puts zeros in 4 bit, for a checkpoint to fill, in the place of a recipe's weights, and freezes as it says.

    Args:
        model: upcycled, with weights in full precision.
        recipe: what `four_bit_recipe` returned.
    """
    bitsandbytes_functional()
    for name, (quant_type, block_size) in recipe["weights"].items():
        weight = _tensor(model, name)
        options = {"quant_type": quant_type, "block_size": block_size, "device": weight.device}
        _put_in(model, name, Weight4bit(weight.shape, weight.dtype, **options))
    set_trained(model, set(recipe["trainable"]), set())


def _choose(
    model: nn.Module, layers: Mapping[str, MoELayer], trained: set[str], skipped: set[str]
) -> tuple[list[str], dict[str, str]]:
    # the names of the weights to quantise, and why each other one is kept
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    routers = {id(p) for layer in layers.values() for p in layer.router.parameters()}
    special = {id(p): "an adapter" for p in adapters(model)} | dict.fromkeys(routers, "the router")
    special |= {id(head.weight): "the output head" for head in _heads(model)}
    chosen, kept = [], {}
    for name, parameter in model.named_parameters():
        owner = _owner(model, name)
        if parameter.dim() < 2 or not parameter.is_floating_point():
            continue
        if isinstance(owner, Experts) and name.rpartition(".")[2].endswith("_bias"):
            continue
        if name in skipped:
            kept[name] = "skipped"
        elif name in trained:
            kept[name] = "it trains"
        elif id(parameter) in special:
            kept[name] = special[id(parameter)]
        elif holders[id(parameter)] > 1:
            kept[name] = "tied to another layer"
        elif not _can_be_quantized(owner, name):
            kept[name] = f"of {type(owner).__name__}"
        else:
            _check_weight(name, parameter)
            chosen.append(name)
    if not chosen:
        raise ValueError(_nothing(model, kept))
    return chosen, kept


def _can_be_quantized(owner: nn.Module, name: str) -> bool:
    # exactly nn.Linear: what derives from it may use its weight elsewhere, as torch's MultiheadAttention
    if isinstance(owner, Experts):
        return name.rpartition(".")[2] in owner.projections
    return type(owner) is nn.Linear


def _check_weight(name: str, weight: Tensor) -> None:
    if hasattr(weight, "device_mesh"):
        raise ValueError(f"{name} is sharded already. Quantise before the strategy or fully_shard wraps the model.")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name} is {weight.dtype}, and bitsandbytes takes float32, bfloat16 or float16. Cast the model first."
        )


def _nothing(model: nn.Module, kept: Mapping[str, str]) -> str:
    if four_bit_weights(model):
        return f"{type(model).__name__} is in 4 bit already; dequantize(model) takes it back."
    first = next((f"{name}: {reason}" for name, reason in kept.items() if reason == "it trains"), None)
    why = first or "no frozen weight of experts or linear layers"
    way_out = 'Freeze it, by train=("router", "low_rank") or requires_grad_(False).' if first else "Is skip too wide?"
    return f"{type(model).__name__} has nothing to quantise ({why}). {way_out}"


def _heads(model: nn.Module) -> Iterator[nn.Linear]:
    for module in model.modules():
        # a method of transformers' models
        get: Any = getattr(module, "get_output_embeddings", None)
        if callable(get):
            head = get()
            if isinstance(head, nn.Linear):
                yield head


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _tensor(model: nn.Module, name: str) -> nn.Parameter:
    try:
        return model.get_parameter(name)
    except AttributeError as error:
        raise ValueError(
            f"The model was saved with {name} in 4 bit, and this model has no such weight ({error}). Build the dense "
            "model as it was when the MoE was saved."
        ) from error


def _put_in(model: nn.Module, name: str, weight: Weight4bit) -> None:
    owner = _owner(model, name)
    if isinstance(owner, nn.Linear):
        Linear4bit.convert(owner, weight)
    else:
        key = name.rpartition(".")[2]
        delattr(owner, key)
        owner.add_module(key, weight)
