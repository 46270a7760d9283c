"""The bytes of a training step on each of several devices, by what a strategy divides among them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil

import torch
from torch import nn

from lightning_moe.layer import RoutedLayer
from lightning_moe.step_trace import Moment

# nf4 of bitsandbytes: four bits, and a float32 maximum for each 64 parameters
_NF4_BYTES = 0.5 + 4 / 64
# its 8-bit states: a byte, and a float32 maximum for each 256; tensors of less than 4096 keep float32
_EIGHT_BIT_BYTES, _EIGHT_BIT_MINIMUM = 1 + 4 / 256, 4096
# elements, as Lightning's DeepSpeedStrategy sets it
_ZERO_BUCKET = 200_000_000
_SINGLE = "single GPU"


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a training step.

    Args:
        strategy: what divides the parts among the devices.
        weights: parameters and buffers.
        gradients: as far as they exist at that moment.
        optimizer: the states, and with ZeRO in half precision the float32 weights.
        activations: what the backward needs, and what is being computed.
        logits: of these, what has one number for each word of the vocabulary.
        weight_copies: of parameters, in the dtype of autocast.
        gathered: parameters and gradients that are whole for a while, 4-bit ones written out, and communication.
    """

    strategy: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    weight_copies: int
    gathered: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(value for value in asdict(self).values() if isinstance(value, int))


@dataclass(frozen=True)
class Kept:
    """What one device without a strategy holds from step to step, and what is gathered of it when it is sharded.

    Args:
        parameters: bytes of all parameters.
        buffers: bytes of all buffers, which no strategy divides.
        gradients: bytes of all gradients.
        optimizer: bytes of the states.
        optimizer_of_masters: bytes of float32 weights beside the model's own, and of their states.
        trainable: number of parameters that train.
        block: bytes of the parameters of the largest block.
        block_experts: of these, those of its routed experts.
        block_gradients: bytes of the largest block's gradients.
        around: bytes of the parameters around the blocks.
        written_out: bytes of the largest 4-bit matrix in the dtype that computes; 0 if there is none.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    optimizer_of_masters: int
    trainable: int
    block: int
    block_experts: int
    block_gradients: int
    around: int
    written_out: int


def kept(
    model: nn.Module, layers: Sequence[RoutedLayer], dtype: torch.dtype, optimizer: str, quantized: set[int]
) -> Kept:
    """Weighs what stays.

    Args:
        model: with its frozen parameters frozen.
        layers: its MoE layers.
        dtype: of the parameters.
        optimizer: one of `OPTIMIZERS`.
        quantized: ids of the parameters that are kept in 4 bits.
    """

    def weight(parameters: Iterator[nn.Parameter]) -> int:
        sizes = {id(p): p.numel() * (_NF4_BYTES if id(p) in quantized else dtype.itemsize) for p in parameters}
        return ceil(sum(sizes.values()))

    trainable = [p for p in model.parameters() if p.requires_grad]
    blocks = _blocks(model)
    largest = max(blocks, key=lambda block: weight(block.parameters()))
    inside = {id(p) for block in blocks for p in block.parameters()}
    experts = {id(p) for layer in layers for p in layer.experts.parameters()}
    return Kept(
        parameters=weight(model.parameters()),
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        gradients=sum(p.numel() for p in trainable) * dtype.itemsize,
        optimizer=ceil(sum(_states(p.numel(), optimizer, dtype) for p in trainable)),
        optimizer_of_masters=ceil(sum(4 * p.numel() + _states(p.numel(), optimizer, torch.float32) for p in trainable)),
        trainable=sum(p.numel() for p in trainable),
        block=weight(largest.parameters()),
        block_experts=weight(p for p in largest.parameters() if id(p) in experts),
        block_gradients=sum(p.numel() for p in largest.parameters() if p.requires_grad) * dtype.itemsize,
        around=weight(p for p in model.parameters() if id(p) not in inside),
        written_out=max((p.numel() * 2 for p in model.parameters() if id(p) in quantized), default=0),
    )


def on_one(stays: Kept, moments: Sequence[Moment]) -> Memory:
    """The memory of a single device."""
    return _at_peak(_SINGLE, stays, moments, gathered=stays.written_out)


def on_several(
    stays: Kept, moments: Sequence[Moment], num_devices: int, expert_parallel_size: int, rows_bytes: int
) -> list[Memory]:
    """The memory of each device with DDP, fully sharded, and with expert parallelism if its size is above 1.

    Args:
        stays: of the whole model.
        moments: of a device's own batch.
        num_devices: N.
        expert_parallel_size: devices that share out the experts.
        rows_bytes: what the hidden states of a device's assignments take, once.
    """
    # this block and the next, which is fetched meanwhile, the gradients of this, and what stays around all blocks
    gathered = stays.around + 2 * stays.block + stays.block_gradients + stays.written_out
    found = [
        # DDP's buckets hold all gradients a second time, by default
        _at_peak("ddp", stays, moments, gathered=stays.gradients + stays.written_out),
        # its gradients live in the buckets
        _at_peak("moe_ddp", stays, moments, gathered=stays.written_out),
        _at_peak("fsdp, fsdp2", stays, moments, *3 * (num_devices,), gathered=gathered),
    ]
    if expert_parallel_size > 1:
        ratio = stays.block_experts / max(stays.block, 1)
        spared = (2 * stays.block_experts + ratio * stays.block_gradients) * (1 - 1 / expert_parallel_size)
        # rows are sent and received on both ways
        apart = gathered - round(spared) + 2 * rows_bytes
        name = f"fsdp2, experts over {expert_parallel_size}"
        found.append(_at_peak(name, stays, moments, *3 * (num_devices,), gathered=apart))
    return found


def with_zero(stays: Kept, moments: Sequence[Moment], num_devices: int, dtype: torch.dtype) -> list[Memory]:
    """The memory of each device with DeepSpeed's ZeRO in its three stages.

    Args:
        stays: of the whole model in the dtype that DeepSpeed computes in.
        moments: of a device's own batch in this dtype.
        num_devices: N.
        dtype: in half precision the optimizer has the weights in float32 besides, and its states are theirs.
    """
    stays = replace(stays, optimizer=stays.optimizer_of_masters) if dtype.itemsize == 2 else stays
    bucket = min(stays.trainable, _ZERO_BUCKET) * dtype.itemsize + stays.written_out
    whole = stays.around + 2 * stays.block + stays.block_gradients
    found = []
    for stage in (1, 2, 3):
        parts = num_devices if stage == 3 else 1, num_devices if stage > 1 else 1, num_devices
        gathered = bucket + (whole if stage == 3 else 0)
        found.append(_at_peak(f"ZeRO {stage}", stays, moments, *parts, gathered=gathered))
    return found


def _at_peak(
    strategy: str,
    stays: Kept,
    moments: Sequence[Moment],
    over_weights: int = 1,
    over_gradients: int = 1,
    over_optimizer: int = 1,
    *,
    gathered: int,
) -> Memory:
    def gradients(moment: Moment) -> int:
        # Lightning lets go of the last step's gradients between forward and backward
        return ceil((moment.gradients if moment.backward else stays.gradients) / over_gradients)

    def alive(moment: Moment) -> int:
        return gradients(moment) + moment.weight_copies + moment.logits + moment.activations

    peak = max(moments, key=alive)
    return Memory(
        strategy=strategy,
        weights=ceil(stays.parameters / over_weights) + stays.buffers,
        gradients=gradients(peak),
        optimizer=ceil(stays.optimizer / over_optimizer),
        activations=peak.activations,
        logits=peak.logits,
        weight_copies=peak.weight_copies,
        gathered=gathered,
    )


def _states(num_elements: int, optimizer: str, dtype: torch.dtype) -> int | float:
    if optimizer == "sgd":
        return num_elements * dtype.itemsize
    if optimizer == "adamw":
        return 2 * num_elements * dtype.itemsize
    return 2 * num_elements * (4 if num_elements < _EIGHT_BIT_MINIMUM else _EIGHT_BIT_BYTES)


def _blocks(model: nn.Module) -> list[nn.Module]:
    # the list that holds most of the model; without one the model is a block itself
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    sizes = [sum(p.numel() for p in module.parameters()) for module in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else [model]
