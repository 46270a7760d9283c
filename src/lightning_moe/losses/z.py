"""The z-loss: logits that stay small."""

from jaxtyping import Float
from torch import Tensor

from lightning_moe.losses.base import BalanceLoss, masked_mean, without_padding
from lightning_moe.routing import Routing


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """Keeps the router's logits small: the mean over the tokens of ``logsumexp(logits)^2``.

    Reference: Zoph et al., *ST-MoE*, 2022, equation 5, https://arxiv.org/abs/2202.08906. It is no balance measure: its
    value with zero logits is ``log(E)^2``.

    Args:
        routing: the routing of one layer.

    Example:
        >>> import torch
        >>> logits = torch.zeros(4, 1)
        >>> z_loss(Routing(torch.arange(4), torch.zeros(4, dtype=torch.int64), torch.ones(4), logits, logits + 1))
        tensor(0.)
    """
    logits = without_padding(routing.logits, routing.token_mask)
    return masked_mean(logits.logsumexp(dim=-1).square().unsqueeze(-1), routing.token_mask).squeeze()


class ZLoss(BalanceLoss):
    """`z_loss` with a coefficient.

    Args:
        coefficient: factor before the loss; 1e-3 in ST-MoE.
    """

    name = "z_loss"

    def __init__(self, coefficient: float = 0.001) -> None:
        super().__init__(coefficient)

    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """See `z_loss`."""
        return z_loss(routing)
