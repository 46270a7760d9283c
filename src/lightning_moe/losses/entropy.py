"""Losses on the entropy of the scores: of a token's, and of their mean."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_moe.losses.base import BalanceLoss, masked_mean, token_scores
from lightning_moe.routing import Routing


def _entropy(probabilities: Float[Tensor, "*T choices"]) -> Float[Tensor, "*T"]:
    # as a fraction of the largest possible; the gradient of p log p at 0 is infinite
    tiny = torch.finfo(probabilities.dtype).tiny
    entropy = -(probabilities * probabilities.clamp(min=tiny).log()).sum(-1)
    return entropy / math.log(max(probabilities.shape[-1], 2))


class TokenEntropyLoss(BalanceLoss):
    """How undecided the router is: the mean over the tokens of ``H(scores) / log E``, scores scaled to sum to one.

    0 when every token is sure of one expert, 1 when all experts score the same. It keeps a top-p router from spreading
    each token over many experts.

    Reference: Huang et al., *Harder Tasks Need More Experts*, 2024, equation 7, https://arxiv.org/abs/2403.07652.
    Differs from it by the division by log E.

    Args:
        coefficient: factor before the loss; 1e-4 in the paper.

    Example:
        >>> equal = torch.full((2, 4), 0.25)
        >>> TokenEntropyLoss()(Routing(torch.arange(2), torch.arange(2), torch.ones(2), equal, equal))
        tensor(1.)
    """

    name = "token_entropy_loss"

    def __init__(self, coefficient: float = 1e-4) -> None:
        super().__init__(coefficient)

    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """Computes the loss of one layer."""
        return masked_mean(_entropy(token_scores(routing)).unsqueeze(-1), routing.token_mask).squeeze()


class MutualInformationLoss(BalanceLoss):
    """How little the experts tell about the tokens: ``1 - (H(mean scores) - token_weight * mean H(scores)) / log E``.

    With ``token_weight=1`` the bracket is the mutual information of expert and token: 0, the best, when every token is
    sure and the experts are used alike; 1 when the scores say nothing of the token. With ``token_weight=0`` only the
    mean is kept even, which is sigma-MoE's regulariser.

    Reference: Chen et al., *Mod-Squad*, 2022, https://arxiv.org/abs/2212.08066; Csordás et al., *Approximating
    Two-Layer Feedforward Networks for Efficient Transformers*, 2023, equation 21, https://arxiv.org/abs/2310.10837.
    Differs from both by the scale, and from Mod-Squad in that the tasks are the tokens.

    Args:
        coefficient: factor before the loss; 1e-3 in sigma-MoE.
        token_weight: how much a sure choice of each token counts, from 0 to 1.

    Raises:
        ValueError: if ``token_weight`` is not from 0 to 1.

    Example:
        >>> sure = torch.eye(2)
        >>> MutualInformationLoss()(Routing(torch.arange(2), torch.arange(2), torch.ones(2), sure, sure))
        tensor(0.)
    """

    name = "mutual_information_loss"

    def __init__(self, coefficient: float = 1e-3, token_weight: float = 1.0) -> None:
        super().__init__(coefficient)
        if not 0 <= token_weight <= 1:
            raise ValueError(f"MutualInformationLoss: token_weight={token_weight}, wanted a number from 0 to 1.")
        self.token_weight = token_weight

    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """Computes the loss of one layer."""
        scores = token_scores(routing)
        of_mean = _entropy(masked_mean(scores, routing.token_mask))
        mean_of = masked_mean(_entropy(scores).unsqueeze(-1), routing.token_mask).squeeze()
        return 1 - of_mean + self.token_weight * mean_of
