"""MoE++: experts that compute nothing beside the FFNs, and a router that remembers."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_choice, check_not_negative
from lightning_moe.losses import BalanceLoss, HeterogeneousLoadBalancingLoss
from lightning_moe.routers.base import Normalize, Router, gate_logits, token_choice, unit_sum
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class MoEPlusPlusRouter(Router):
    """Puts zero, copy and constant experts beside the FFN experts: easy tokens take these and cost no GEMM.

    ``logits = gate x + residual_gate logits_before``, with the logits of the MoE layer before for the same token (none
    in the first layer); ``scores = softmax(logits)`` over the E FFNs, then Z zero, C copy and V constant experts;
    ``chosen = top_k(scores)``. A zero expert's weight becomes 0, then the weights are divided by their sum. A copy
    expert gives x, a constant expert ``a1 * x + a2 * v`` with ``(a1, a2) = softmax(constant_gate x)`` and a learnt v.

    Zero, copy and constant experts do not compute the dense FFN, so an upcycled model does not start as the dense one
    for the tokens that choose them. Reentrant activation checkpointing cuts the gradient through ``logits_before``; the
    other kind (``use_reentrant=False``) does not.

    Reference: Jin et al., *MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts*, 2024,
    equations 3 to 6, https://arxiv.org/abs/2410.07348. Differs from it: the zero expert's weight is left out before
    normalising, as in the authors' code, and ``constant_std`` is smaller, as pretrained activations are.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of FFN experts E.
        top_k: experts per token K, of all kinds, 1 <= K <= E + Z + C + V.
        num_zero_experts: Z, experts that give 0.
        num_copy_experts: C, experts that give x.
        num_constant_experts: V, experts that give a learnt vector, mixed with x.
        zero_computation_weight: how much an expert without computation counts in the balance loss, against 1 of an
            FFN, in (0, 1]; the smaller, the more tokens these experts take. 0.75 in the paper.
        normalize: whether a token's weights sum to one, its zero experts left out; see `unit_sum`.
        constant_std: standard deviation of the constant experts' initial vectors; 1 in the authors' code.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: if ``top_k`` exceeds the number of all experts, or a number is out of its range.

    Example:
        >>> router = MoEPlusPlusRouter(hidden_size=8, num_experts=4)
        >>> routing = router(torch.randn(6, 8))
        >>> routing.num_experts, routing.num_choices
        (4, 8)
    """

    static_shapes = False
    uses_previous_logits = True
    weights_sum_to_one = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        num_zero_experts: int = 1,
        num_copy_experts: int = 1,
        num_constant_experts: int = 2,
        zero_computation_weight: float = 0.75,
        normalize: Normalize = True,
        constant_std: float = 0.02,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts)
        check_not_negative(
            num_zero_experts=num_zero_experts,
            num_copy_experts=num_copy_experts,
            num_constant_experts=num_constant_experts,
            constant_std=constant_std,
            init_std=init_std,
        )
        check_choice("normalize", normalize, (True, False, "straight_through"))
        num_choices = num_experts + num_zero_experts + num_copy_experts + num_constant_experts
        if not 1 <= top_k <= num_choices:
            raise ValueError(
                f"top_k={top_k} with num_experts={num_experts} and {num_choices - num_experts} experts without "
                "computation: a token chooses at least 1 and at most all of them. Set top_k between 1 and "
                f"{num_choices}."
            )
        self.top_k = top_k
        self.num_zero_experts = num_zero_experts
        self.num_copy_experts = num_copy_experts
        self.num_constant_experts = num_constant_experts
        self.zero_computation_weight = HeterogeneousLoadBalancingLoss(
            zero_computation_weight=zero_computation_weight
        ).zero_computation_weight
        self.normalize = normalize
        self.constant_std = constant_std
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(num_choices, hidden_size) * init_std)
        bound = 1 / math.sqrt(num_choices)
        self.residual_gate = nn.Parameter(torch.empty(num_choices, num_choices).uniform_(-bound, bound))
        if num_constant_experts:
            self.constants = nn.Parameter(torch.randn(num_constant_experts, hidden_size) * constant_std)
            self.constant_gate = nn.Parameter(torch.randn(2 * num_constant_experts, hidden_size) * init_std)

    @property
    def experts_per_token(self) -> float:
        """FFNs per token at the balance that the loss aims at."""
        free = self.gate.shape[0] - self.num_experts
        return self.top_k * self.num_experts / (self.num_experts + free / self.zero_computation_weight)

    def balance_losses(self) -> list[BalanceLoss]:
        """The paper's heterogeneous loss."""
        return [HeterogeneousLoadBalancingLoss(zero_computation_weight=self.zero_computation_weight)]

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best experts of all kinds; N = T·K, in token order."""
        logits = gate_logits(x, self.gate)
        before = None if tokens is None else tokens.previous_logits
        # zeros and not nothing: a parameter without a gradient stops DistributedDataParallel
        logits = logits + gate_logits(torch.zeros_like(logits) if before is None else before, self.residual_gate)
        scores = F.softmax(logits, dim=-1)
        expert_ids = logits.topk(self.top_k, dim=-1).indices
        is_zero = (expert_ids >= self.num_experts) & (expert_ids < self.num_experts + self.num_zero_experts)
        weights = unit_sum(scores.gather(1, expert_ids).masked_fill(is_zero, 0), self.normalize)
        return replace(token_choice(logits, scores, expert_ids, weights, tokens), num_ffn_experts=self.num_experts)

    def zero_computation(self, x: Float[Tensor, "T D"], routing: Routing) -> Float[Tensor, "T D"]:
        """Adds up, weighted, what a token's copy and constant experts give; in float32."""
        shape = (routing.num_tokens, self.top_k)
        weights = routing.weights.new_zeros(routing.logits.shape)
        weights = weights.scatter(1, routing.expert_ids.view(shape), routing.weights.view(shape))  # (T, choices)
        first_copy = self.num_experts + self.num_zero_experts
        copies, constants = weights[:, first_copy:].split([self.num_copy_experts, self.num_constant_experts], dim=1)
        of_x = copies.sum(1, keepdim=True)  # (T, 1)
        if self.num_constant_experts == 0:
            return torch.mul(of_x, x)
        parts = gate_logits(x, self.constant_gate).view(-1, self.num_constant_experts, 2).softmax(-1)
        of_x = of_x + (constants * parts[..., 0]).sum(1, keepdim=True)
        return torch.addcmul(gate_logits(constants * parts[..., 1], self.constants.t()), of_x, x)
