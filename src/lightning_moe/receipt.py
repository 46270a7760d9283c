"""What an upcycling did: in words, in plain Python, and measured."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from lightning_moe.experts import Experts
from lightning_moe.metrics.similarity import pair_cosines

# Of the experts' weights this many are looked at together: 4 MB in float32, whatever the layer's size.
_CHUNK = 2**20
_MAX_REASONS = 4
_BYTES = ("GB", "MB", "kB", "bytes")


@dataclass(frozen=True)
class Receipt:
    """What `upcycle` did.

    Args:
        layers: names of the modules that were replaced.
        kept: names of the dense FFNs that were left.
        left_dense: why, for each of these, and for what only looks like an FFN: its name to the reason.
        num_experts: experts per layer, shared ones left out.
        experts_per_token: experts that compute for one token, shared ones left out.
        num_shared_experts: experts that compute for every token.
        parameters: total before and after.
        trainable_parameters: those that training changes, before and after; low-rank experts share a frozen FFN.
        active_parameters: parameters that compute for one token, before and after.
        memory: bytes of the parameters and buffers as they are stored, before and after.
        expert_similarity: mean cosine of the weights of two experts of a layer, shared ones left out, over all pairs
            and layers: 1 are copies, 0 are strangers; None with one expert, or without weights (on the meta device).
        preserved: whether step 0 computes exactly the dense model.
        reason: why, or why not.
        measured_difference: max |logit difference| to the dense model on the batch given; None without one.
        seed: what the random numbers derive from.
    """

    layers: tuple[str, ...]
    kept: tuple[str, ...]
    left_dense: Mapping[str, str]
    num_experts: int
    experts_per_token: float
    num_shared_experts: int
    parameters: tuple[int, int]
    trainable_parameters: tuple[int, int]
    active_parameters: tuple[int, int]
    memory: tuple[int, int]
    expert_similarity: float | None
    preserved: bool
    reason: str
    measured_difference: float | None
    seed: int

    @property
    def parameters_added(self) -> int:
        """How many more parameters there are."""
        return self.parameters[1] - self.parameters[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {**asdict(self), "left_dense": dict(self.left_dense), "parameters_added": self.parameters_added}

    def __str__(self) -> str:
        total, active, memory = self.parameters, self.active_parameters, self.memory
        trainable = self.trainable_parameters
        shared = f", and {self.num_shared_experts} shared" if self.num_shared_experts else ""
        added = f"{'+' if self.parameters_added >= 0 else '-'}{human(abs(self.parameters_added))}"
        rows = [
            ("parameters", f"{human(total[0])} -> {human(total[1])} ({added})"),
            ("active", f"{human(active[0])} -> {human(active[1])} per token"),
            ("memory", f"{human_bytes(memory[0])} -> {human_bytes(memory[1])}"),
        ]
        if trainable != total:
            rows.insert(1, ("trainable", f"{human(trainable[0])} -> {human(trainable[1])}"))
        if self.expert_similarity is not None:
            rows.append(("similarity", f"{self.expert_similarity:.3f}, mean cosine of two experts' weights"))
        rows += _step_zero(self, "the dense model")
        rows += [("left dense", line) for line in by_reason(self.left_dense)]
        title = (
            f"Upcycled {len(self.layers)} of {len(self.layers) + len(self.kept)} FFNs to {self.num_experts} experts, "
            f"{self.experts_per_token:g} per token{shared}."
        )
        return lines(title, rows)


@dataclass(frozen=True)
class Expansion:
    """What `expand` did.

    Args:
        layers: names of the MoE layers.
        num_experts: experts per layer before and after, shared ones left out.
        copies: of each layer, how many of the new experts come from each old one; they stand side by side.
        parameters: total before and after.
        preserved: whether step 0 computes exactly the model before, as seen in evaluation.
        reason: why, or why not.
        measured_difference: max |logit difference| to the model before on the batch given; None without one.
        seed: what the noise derives from.
    """

    layers: tuple[str, ...]
    num_experts: tuple[int, int]
    copies: Mapping[str, tuple[int, ...]]
    parameters: tuple[int, int]
    preserved: bool
    reason: str
    measured_difference: float | None
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return {**asdict(self), "copies": {name: list(counts) for name, counts in self.copies.items()}}

    def __str__(self) -> str:
        counts = sorted({count for counts in self.copies.values() for count in counts})
        rows = [
            ("copies", f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} of each expert"),
            ("parameters", " -> ".join(map(human, self.parameters))),
        ]
        rows += _step_zero(self, "the model before")
        title = "Expanded {} MoE layers from {} to {} experts.".format(len(self.layers), *self.num_experts)
        return lines(title, rows)


@torch.no_grad()
def expert_similarity(experts: Experts) -> float | None:
    """Mean cosine of the weights of two experts, biases included: `ExpertWeightCosine`, in constant memory.

    Args:
        experts: of one layer.

    Returns:
        The mean over all pairs; None with one expert, or on the meta device.

    Example:
        >>> from lightning_moe.experts import Experts
        >>> experts = Experts(2, 4, 8)
        >>> for parameter in experts.parameters():
        ...     parameter.data.fill_(1.0)[0] *= 2
        >>> f"{expert_similarity(experts):.3f}"
        '1.000'
    """
    weights = experts.weights()
    num_experts = experts.num_experts
    if num_experts < 2 or any(weight.is_meta for weight in weights):
        return None
    gram = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=weights[0].device)
    for weight in weights:
        for part in weight.detach().flatten(1).split(max(1, _CHUNK // num_experts), dim=1):
            rows = part.to(torch.promote_types(part.dtype, torch.float32))
            gram += rows @ rows.T
    total, pairs = pair_cosines(gram)
    return float(total / pairs)


def num_parameters(model: nn.Module, *, trainable: bool = False) -> int:
    """The number of a model's parameters, or of the trainable ones alone, each counted once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def num_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters and buffers, each counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in chain(model.parameters(), model.buffers()))


def lines(title: str, rows: list[tuple[str, str]]) -> str:
    """A title and, under it, a line for each name and text."""
    return "\n".join([title, *(f"  {name:<12} {text}" for name, text in rows)])


def _step_zero(receipt: Receipt | Expansion, before: str) -> list[tuple[str, str]]:
    rows = [("step 0", f"{before if receipt.preserved else f'NOT {before}'}: {receipt.reason}")]
    if receipt.measured_difference is not None:
        text = f"max |logit difference| = {receipt.measured_difference:.1e}"
        rows.append(
            ("measured", "nan: not all outputs are numbers" if math.isnan(receipt.measured_difference) else text)
        )
    return rows


def by_reason(left: Mapping[str, str]) -> list[str]:
    """One line for each reason, of a name to its reason: it stays on one screen, however many names there are."""
    names: dict[str, list[str]] = {}
    for name, reason in left.items():
        names.setdefault(reason, []).append(name)
    lines = [
        f"{', '.join(group) if len(group) <= 2 else f'{group[0]}, ... ({len(group)} in all)'}: {reason}"
        for reason, group in names.items()
    ]
    hidden = len(lines) - _MAX_REASONS
    return lines if hidden <= 0 else [*lines[:_MAX_REASONS], f"and more, for {hidden} other reasons: see to_dict()"]


def human(number: int, units: tuple[str, ...] = ("B", "M", "K", "")) -> str:
    """A number with a unit of thousands."""
    for unit, size in zip(units, (1e9, 1e6, 1e3), strict=False):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number} {units[-1]}".rstrip()


def human_bytes(number: int) -> str:
    """A number of bytes with its unit."""
    return human(number, _BYTES)
