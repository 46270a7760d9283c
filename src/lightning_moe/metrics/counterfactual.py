"""What another route would have been worth."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_moe.metrics.base import Ratio


class CounterfactualRoutingGain(Ratio):
    """Mean over tokens of ``log p'(gold) - log p(gold)``, p' with a counterfactual route and p with the router's own.

    Above 0, the other route of equal compute predicts better, and the router has missed it; below 0 the router has
    chosen well. Several sampled routes are several updates.

    Reference: Yoon et al., *When Are Experts Misrouted?*, 2026, https://arxiv.org/abs/2605.07260.

    Example:
        >>> metric = CounterfactualRoutingGain()
        >>> metric(torch.tensor([-2.0, -1.0]), torch.tensor([-1.0, -1.0]))
        tensor(0.5000)
    """

    def update(
        self,
        log_probs: Float[Tensor, "*shape"],
        counterfactual_log_probs: Float[Tensor, "*shape"],
        mask: Bool[Tensor, "*shape"] | None = None,
    ) -> None:
        """Adds a batch of tokens.

        Args:
            log_probs: log-probability of each gold token, with the router's own route.
            counterfactual_log_probs: the same with the other route.
            mask: False marks what is left out, as padding; None means that all are real.
        """
        gain = counterfactual_log_probs.double() - log_probs.double()
        real = torch.ones_like(gain, dtype=torch.bool) if mask is None else mask
        self._add(torch.where(real, gain, 0), real)
