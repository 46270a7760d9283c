"""Losses that steer how many experts compute for a token."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_moe.losses.base import BalanceLoss, masked_mean, sum_over_ranks, token_scores, without_padding
from lightning_moe.routing import Routing, choice_load, is_recomputing


class AdaptiveL1Loss(BalanceLoss):
    """ReMoE's L1 loss on the scores, whose factor follows how many experts are on.

    ``multiplier * mean_t sum_e f_e * scores_te`` with ``f_e = E * load_e / (K * T)``, 1 at an even load of K experts
    per token, so that busy experts are pushed down harder. After each optimizer step
    ``multiplier *= rate ** sign((1 - K / E) - S)``, S being the fraction of (token, expert) pairs that were off, over
    all layers, ranks and accumulated micro-batches. The paper's lambda is ``coefficient * multiplier``.

    Reference: Wang et al., *ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing*, 2024, equations 7 to 9
    and 12, https://arxiv.org/abs/2412.14711. Differs from it: the layers are summed and not averaged, which the
    multiplier makes up for.

    Args:
        coefficient: lambda at the start; 1e-8 in the paper.
        top_k: experts per token K to aim at.
        rate: factor of the multiplier per step, above 1; 1.2 in the paper.

    Raises:
        ValueError: if ``top_k`` is below 1, or ``rate`` not above 1.

    Example:
        >>> loss, scores = AdaptiveL1Loss(top_k=1), torch.ones(1, 2)
        >>> _ = loss(Routing(torch.zeros(2).long(), torch.arange(2), torch.ones(2), scores, scores))
        >>> loss.step()  # two experts are on, one was wanted
        >>> loss.multiplier
        tensor(1.2000)
    """

    name = "adaptive_l1_loss"
    shared = True

    def __init__(self, coefficient: float = 1e-8, top_k: int = 2, rate: float = 1.2) -> None:
        super().__init__(coefficient)
        if top_k < 1 or rate <= 1:
            raise ValueError(f"AdaptiveL1Loss: top_k={top_k}, rate={rate}; wanted top_k >= 1 and rate > 1.")
        self.top_k = top_k
        self.rate = rate
        # plain tensors and no buffers: precision plugins would cast them
        self.multiplier = torch.ones((), dtype=torch.float32)
        self._counts = torch.zeros(2, dtype=torch.float64)  # pairs that were on; wanted to be on

    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """Computes the loss of one layer."""
        num_tokens, load = routing.num_tokens, choice_load(routing)
        if self.multiplier.device != load.device:
            self.multiplier, self._counts = self.multiplier.to(load.device), self._counts.to(load.device)
        real = load.new_tensor(num_tokens) if routing.token_mask is None else routing.token_mask.sum()
        wanted = self.top_k * real / routing.num_choices
        mean_scores = masked_mean(without_padding(routing.scores, routing.token_mask), routing.token_mask)
        loss = self.multiplier * (load / wanted.clamp(min=1e-9) * mean_scores).sum()
        if self.in_training:
            self._count(load, self.top_k * real)
        return loss

    @property
    def counts(self) -> bool:
        """How many experts were on."""
        return True

    @torch.compiler.disable
    @torch.no_grad()
    def _count(self, load: Tensor, wanted: Tensor) -> None:
        if not is_recomputing():
            self._counts += torch.stack([load.double().sum(), wanted.double()])

    @torch.no_grad()
    def step(self) -> None:
        """Moves the multiplier."""
        sum_over_ranks(self._counts)
        on, wanted = self._counts
        # (1 - K / E) - S = (on - wanted) / (T * E)
        self.multiplier = self.multiplier * self.rate ** torch.sign(on - wanted).float()
        self._counts = torch.zeros_like(self._counts)

    def training_state(self) -> dict[str, Tensor]:
        """The multiplier, and the counts since the last step."""
        return {"multiplier": self.multiplier, "counts": self._counts}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Takes up what `training_state` returned."""
        self.multiplier, self._counts = state["multiplier"], state["counts"]


class NullRewardLoss(BalanceLoss):
    """Rewards choices that compute nothing: 1 minus the mean score that a token gives to all of them.

    Reference: Yan et al., *TC-MoE: Augmenting Mixture of Experts with Ternary Choice*, 2025,
    https://openreview.net/forum?id=dsP91M4hDL, as re-implemented by LibMoE. Differs from it by the 1, which has no
    gradient.

    Args:
        coefficient: factor before the loss; 1e-5 in LibMoE.

    Raises:
        ValueError: at the first forward, if every choice of the router computes an FFN.

    Example:
        >>> scores = torch.tensor([[0.75, 0.25]])
        >>> one = torch.ones(1).long()
        >>> NullRewardLoss()(Routing(one - 1, one, torch.ones(1), scores, scores, num_ffn_experts=1))
        tensor(0.7500)
    """

    name = "null_reward_loss"

    def __init__(self, coefficient: float = 1e-5) -> None:
        super().__init__(coefficient)

    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """Computes the loss of one layer."""
        if routing.num_ffn_experts is None:
            raise ValueError(
                "NullRewardLoss needs a router with choices that compute nothing. Take NullExpertsRouter, TCMoERouter "
                "or MoEPlusPlusRouter, or leave the loss out."
            )
        experts = routing.choice_experts
        if experts is None:
            experts = torch.arange(routing.num_choices, device=routing.scores.device)
        null_scores = token_scores(routing).masked_fill(experts < routing.num_ffn_experts, 0)
        return 1 - masked_mean(null_scores, routing.token_mask).sum()
