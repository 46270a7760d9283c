"""Which experts are chosen together."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from lightning_moe.metrics.selection import chosen_experts
from lightning_moe.routing import Routing


def coactivation(together: Float[Tensor, "E E"]) -> Float[Tensor, "E E"]:
    """How often expert j comes with expert i, from counts of pairs, see `ExpertCoactivation`.

    Args:
        together: number of tokens that chose both i and j; on the diagonal, that chose i.

    Example:
        >>> coactivation(torch.tensor([[4.0, 1.0], [1.0, 2.0]]))
        tensor([[0.0000, 0.2500],
                [0.5000, 0.0000]])
    """
    share = together / together.diagonal().clamp(min=1).unsqueeze(1)
    return share.fill_diagonal_(0).to(torch.float32)


class ExpertCoactivation(Metric):
    """How often expert j comes with expert i: ``N_ij / N_i``, an (E, E) matrix with rows i.

    N_i is the number of tokens that chose i, N_ij that of tokens that chose both, over all pairs of a token's experts.
    The diagonal is 0: an expert is no company to itself. So is the row of an expert without a token.

    Reference: Muennighoff et al., *OLMoE*, 2024, section 5.2, https://arxiv.org/abs/2409.02060. Their released script
    counts neighbouring ranks of the top-k list only; the formula, and this class, count all pairs.

    Args:
        num_experts: number of experts E.

    Example:
        >>> rows = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 2, 2]), torch.ones(4)
        >>> metric = ExpertCoactivation(num_experts=3)
        >>> metric(Routing(*rows, *torch.zeros(2, 3, 3)))
        tensor([[0.0000, 0.0000, 1.0000],
                [0.0000, 0.0000, 0.0000],
                [0.3333, 0.0000, 0.0000]])
    """

    full_state_update = False
    together: Tensor

    def __init__(self, num_experts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.add_state("together", torch.zeros(num_experts, num_experts, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, routing: Routing) -> None:
        """Adds the selections of one forward of one layer."""
        chosen = chosen_experts(routing).to(torch.float64)
        self.together += chosen.T @ chosen

    def compute(self) -> Tensor:
        """Returns the matrix in float32."""
        return coactivation(self.together)
