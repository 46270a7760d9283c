"""Reads an upcycled model for the export: each router as a gate, and what all MoE layers have in common."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_moe.layer import MoELayer
from lightning_moe.routers import LossFreeRouter, Router, SigmoidRouter, TopKRouter

Routed = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Gate:
    """What a native router is made of.

    Args:
        kind: what becomes of the logits.
        weight: the gate's rows, (E, D); a temperature is folded into them.
        bias: added to the scores for the choice alone, (E,), float32; None with a softmax.
        top_k: experts per token.
        normalize: whether a token's weights sum to one.
        scaling: factor of the weights.
    """

    kind: Routed
    weight: Float[Tensor, "E D"]
    bias: Float[Tensor, " E"] | None
    top_k: int
    normalize: bool
    scaling: float


def read_gate(router: Router) -> Gate | None:
    """Reads a router as a `Gate`; None if it routes in a way that no architecture of the table knows.

    By its very class: a subclass may route otherwise. Noise, jitter and dropout of experts act in training only.
    """
    if type(router) is TopKRouter:
        gate = router.gate.detach() / router.temperature if router.temperature != 1 else router.gate.detach()
        return Gate("softmax", gate, None, router.top_k, bool(router.normalize), 1.0)
    if type(router) is SigmoidRouter:
        bias = torch.zeros(router.num_experts, device=router.gate.device)
        return Gate("sigmoid", router.gate.detach(), bias, router.top_k, bool(router.normalize), 1.0)
    if type(router) is LossFreeRouter and router.num_groups == 1:
        gate, bias = router.gate.detach(), router.expert_bias.float()
        return Gate("sigmoid", gate, bias, router.top_k, bool(router.normalize), float(router.routed_scaling))
    return None


@dataclass(frozen=True)
class Upcycled:
    """What all MoE layers of a model have in common.

    Args:
        config: the dense model's configuration.
        gates: each layer's gate, by the number of its block.
        layers: the layers, by the number of their block.
        dense: numbers of the blocks that are dense still.
    """

    config: Any
    gates: Mapping[int, Gate]
    layers: Mapping[int, MoELayer]
    dense: tuple[int, ...]

    @property
    def gate(self) -> Gate:
        """That of the first layer."""
        return next(iter(self.gates.values()))

    @property
    def layer(self) -> MoELayer:
        """The first layer."""
        return next(iter(self.layers.values()))

    @property
    def num_shared(self) -> int:
        """How many shared experts a layer has."""
        return 0 if self.layer.shared_experts is None else self.layer.shared_experts.num_experts

    @property
    def shared_size(self) -> int:
        """The width of all shared experts of a layer together."""
        shared = self.layer.shared_experts
        return 0 if shared is None else shared.num_experts * shared.expert_size

    @property
    def head_dim(self) -> int:
        """The width of an attention head."""
        own: int | None = getattr(self.config, "head_dim", None)
        return own or int(self.config.hidden_size // self.config.num_attention_heads)
