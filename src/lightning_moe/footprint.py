"""What training a model costs before anything is trained: parameters, operations, and memory by part and by strategy.

The bytes of a training step are those of `trace_step`; what a strategy keeps a part of on each device is divided.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from lightning_moe.checks import check_choice, check_positive, check_whole
from lightning_moe.layer import RoutedLayer
from lightning_moe.native import attached, routed_layers
from lightning_moe.operations import TokenOperations, active_parameters, experts_per_token
from lightning_moe.receipt import num_parameters
from lightning_moe.sharded_memory import Kept, Memory, kept, on_one, on_several, with_zero
from lightning_moe.step_trace import Moment, trace_step

Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
OptimizerKind = Literal["adamw", "adamw-8bit", "sgd"]
PRECISIONS: tuple[Precision, ...] = ("32-true", "bf16-mixed", "bf16-true")
OPTIMIZERS: tuple[OptimizerKind, ...] = ("adamw", "adamw-8bit", "sgd")


@dataclass(frozen=True)
class Footprint:
    """What training a model takes, by `plan_training`.

    Args:
        parameters: total, each counted once.
        active_parameters: those that one token uses.
        trainable_parameters: those that training changes.
        forward_flops: floating-point operations per token of a forward.
        training_flops: the same of a forward and a backward.
        memory: on one device, for each strategy.
        limit: bytes that one device has.
    """

    parameters: int
    active_parameters: int
    trainable_parameters: int
    forward_flops: float
    training_flops: float
    memory: tuple[Memory, ...]
    limit: float

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        rows = [{**asdict(row), "total": row.total, "fits": row.total <= self.limit} for row in self.memory]
        return {**asdict(self), "memory": rows}

    def __str__(self) -> str:
        """Two Markdown tables."""
        unit, size = _unit(self.parameters, "B", "M")
        counts = self.parameters, self.active_parameters, self.trainable_parameters
        head = [f"parameters, {unit}", "active per token", "trainable", "FLOPs a token, forward", "training"]
        facts = [
            *(f"{count / size:.3f}" for count in counts),
            f"{self.forward_flops:.3e}",
            f"{self.training_flops:.3e}",
        ]
        lines = [_row(head), _row(["---:"] * len(head)), _row(facts), ""]
        unit, size = _unit(max(row.total for row in self.memory), "GB", "MB")
        parts = [name.replace("_", " ") for name in asdict(self.memory[0]) if name != "strategy"]
        lines += [_row([f"{unit} on each GPU", *parts, "total", "fits"]), _row([":---", *["---:"] * (len(parts) + 2)])]
        for row in self.memory:
            strategy, *held = asdict(row).values()
            fits = "yes" if row.total <= self.limit else "no"
            lines.append(_row([strategy, *(f"{number / size:.2f}" for number in (*held, row.total)), fits]))
        return "\n".join(lines)


def plan_training(
    model: nn.Module,
    *,
    gpus: int = 1,
    memory: int | float = 80.0,
    precision: Precision = "bf16-mixed",
    optimizer: OptimizerKind = "adamw",
    activation_checkpointing: bool = False,
    batch_size: int = 1,
    sequence_length: int = 2048,
    expert_parallel_size: int = 1,
    quantize_frozen: bool = False,
) -> Footprint:
    """Computes what a language model takes to train, from its shapes alone.

    What is frozen in the model is frozen in the plan. Memory is counted in GB of 1e9 bytes, and without the CUDA
    context, fragmentation and the buffers of NCCL: see docs/plan.md for what is counted, and how.

    Args:
        model: dense, upcycled, or a native Mixture of Experts of Hugging Face; on the meta device or with memory.
        gpus: devices N.
        memory: GB of one device.
        precision: of the Trainer.
        optimizer: AdamW, AdamW with the 8-bit states of bitsandbytes, or SGD with momentum.
        activation_checkpointing: whether to recompute the activations of each block in the backward.
        batch_size: sequences on each device, B.
        sequence_length: tokens of each, S.
        expert_parallel_size: devices that share out the experts, which divides both N and the number of experts.
        quantize_frozen: whether the frozen matrices are kept in 4 bits (nf4), routers and embeddings excepted.

    Raises:
        ValueError: if a number is none that can be, or if the model's memory depends on the numbers that it computes.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=11,
        ... )
        >>> with torch.device("meta"):
        ...     model = LlamaForCausalLM(config)
        >>> footprint = plan_training(model, gpus=2, precision="32-true", sequence_length=16)
        >>> [row.strategy for row in footprint.memory]
        ['single GPU', 'ddp', 'moe_ddp', 'fsdp, fsdp2', 'ZeRO 1', 'ZeRO 2', 'ZeRO 3']
        >>> footprint.memory[0].weights == 4 * footprint.parameters + 4 * 4  # the rotary embedding's two buffers
        True
    """
    check_whole(
        gpus=gpus, batch_size=batch_size, sequence_length=sequence_length, expert_parallel_size=expert_parallel_size
    )
    check_choice("precision", precision, PRECISIONS)
    check_choice("optimizer", optimizer, OPTIMIZERS)
    check_positive(memory=memory)
    _check_model(model)
    with attached(model):
        layers = routed_layers(model)
        _check_expert_parallel(layers, gpus, expert_parallel_size)
        operations = TokenOperations(model, layers)
        active = [experts_per_token(layer) for layer in layers.values()]
        counts = num_parameters(model), active_parameters(model, layers), num_parameters(model, trainable=True)
        flops = operations.forward(active, sequence_length), operations.training(active, sequence_length)
    quantized = _quantized(model, layers.values()) if quantize_frozen else []

    def step(precision: Precision) -> tuple[Kept, list[Moment]]:
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        moments = trace_step(
            model,
            batch_size,
            sequence_length,
            dtype=dtype,
            autocast=torch.bfloat16 if precision == "bf16-mixed" else None,
            activation_checkpointing=activation_checkpointing,
            recast=quantized,
        )
        return kept(model, tuple(layers.values()), dtype, optimizer, set(map(id, quantized))), moments

    stays, moments = step(precision)
    rows = [on_one(stays, moments)]
    if gpus > 1:
        computed = 4 if precision == "32-true" else 2
        config: Any = getattr(model, "config")  # noqa: B009
        width = batch_size * sequence_length * config.get_text_config().hidden_size * computed
        rows += on_several(stays, moments, gpus, expert_parallel_size, round(max([0, *active]) * width))
        # DeepSpeed knows no autocast: its half precision is that of the weights
        half: Precision = "32-true" if precision == "32-true" else "bf16-true"
        dtype = torch.float32 if precision == "32-true" else torch.bfloat16
        rows += with_zero(*((stays, moments) if half == precision else step(half)), gpus, dtype)
    return Footprint(*counts, *flops, tuple(rows), memory * 1e9)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise TypeError(f"{type(model).__name__}: wanted a language model of transformers, as LlamaForCausalLM.")
    known = model.config.get_text_config()
    if not isinstance(getattr(known, "hidden_size", None), int) or not isinstance(known.vocab_size, int):
        raise TypeError(f"{type(model).__name__}: its configuration has no hidden_size and vocab_size to plan with.")


def _check_expert_parallel(layers: Mapping[str, RoutedLayer], gpus: int, size: int) -> None:
    if size == 1:
        return
    if not layers:
        raise ValueError(f"expert_parallel_size={size}: the model has no experts to share out. Leave it at 1.")
    if gpus % size:
        raise ValueError(f"expert_parallel_size={size} with gpus={gpus}: wanted a divisor of the number of GPUs.")
    for name, layer in layers.items():
        if layer.num_experts % size:
            raise ValueError(
                f"expert_parallel_size={size}: {name} has {layer.num_experts} experts, which {size} devices cannot "
                "share out evenly. Give a divisor of both."
            )


def _quantized(model: nn.Module, layers: Iterable[RoutedLayer]) -> list[nn.Parameter]:
    # matrices, but for those that are looked up, those of the output, and of routers
    assert isinstance(model, PreTrainedModel)
    apart = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    apart += [part for part in (model.get_output_embeddings(), *(layer.router for layer in layers)) if part is not None]
    spared = {id(parameter) for part in apart for parameter in part.parameters()}
    found = [p for p in model.parameters() if not p.requires_grad and p.dim() > 1 and id(p) not in spared]
    if not found:
        raise ValueError(
            "quantize_frozen: the model has no frozen matrix. Freeze some, as LowRankInit does with the dense FFN, or "
            "leave it out."
        )
    return found


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _unit(largest: int, billion: str, million: str) -> tuple[str, float]:
    return (billion, 1e9) if largest >= 1e9 else (million, 1e6)
