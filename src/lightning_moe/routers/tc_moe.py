"""TC-MoE: each expert adds, subtracts, or stays away."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.checks import check_not_negative, check_positive
from lightning_moe.losses import BalanceLoss, LoadBalancingLoss, NullRewardLoss
from lightning_moe.routers.base import Router, gate_logits, token_choice
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class TCMoERouter(Router):
    """Lets a token choose each expert with the sign +1 or -1, or a null choice that computes nothing.

    ``scores = softmax(gate x - offsets)`` over 2E + M columns: E experts with +1, the same E with -1, M null choices;
    ``chosen = top_k(scores)``; the weight is ``sign * score / (sum of the chosen scores that are not null + sum of all
    null scores)``. A token that chooses an expert with both signs gets the sum of both contributions.

    The offsets, ``negative_offset`` and ``null_offset``, make the -1 and the null choices rare at the start, when the
    router knows nothing yet. Still, weights of both signs do not sum to one: an upcycled model starts close to the
    dense one and not as it.

    Reference: Yan et al., *TC-MoE: Augmenting Mixture of Experts with Ternary Choice*, 2025,
    https://openreview.net/forum?id=dsP91M4hDL, and the authors' code. Differs from the code: there, a line computed the
    -1 experts without their sign.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: choices per token K, 1 <= K <= 2E + M.
        num_null_choices: M; None takes ``top_k``, as the authors do.
        negative_offset: what is subtracted from the logits of the -1 columns.
        null_offset: what is subtracted from the logits of the null columns.
        init_std: standard deviation of the gate's initial weights; 0.006 in the authors' code.

    Raises:
        ValueError: if ``top_k`` exceeds the number of all choices, or a number is out of its range.

    Example:
        >>> router = TCMoERouter(hidden_size=1, num_experts=2, top_k=2, num_null_choices=1, negative_offset=0.0)
        >>> router.gate.data = torch.tensor([[1.0], [4.0], [3.0], [1.0], [0.1]]).log()
        >>> routing = router(torch.ones(1, 1))
        >>> routing.choice_ids.tolist(), routing.expert_ids.tolist(), routing.weights.sign().tolist()
        ([1, 2], [1, 0], [1.0, -1.0])
    """

    static_shapes = False
    weights_sum_to_one = False

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        num_null_choices: int | None = None,
        negative_offset: float = 1.0,
        null_offset: float = 10.0,
        init_std: float = 0.006,
    ) -> None:
        super().__init__(hidden_size, num_experts)
        num_null = top_k if num_null_choices is None else num_null_choices
        check_positive(num_null_choices=num_null)
        check_not_negative(negative_offset=negative_offset, null_offset=null_offset, init_std=init_std)
        if not 1 <= top_k <= 2 * num_experts + num_null:
            raise ValueError(
                f"top_k={top_k} with num_experts={num_experts}: a token chooses at least 1 and at most all of the "
                f"{2 * num_experts + num_null} choices."
            )
        self.top_k = top_k
        self.num_null_choices = num_null_choices
        self.negative_offset = negative_offset
        self.null_offset = null_offset
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(2 * num_experts + num_null, hidden_size) * init_std)

    @property
    def experts_per_token(self) -> float:
        """At most K; null choices make it fewer."""
        return float(min(self.top_k, self.num_experts))

    def balance_losses(self) -> list[BalanceLoss]:
        """Load balancing over the experts, and the reward of null choices."""
        return [LoadBalancingLoss(0.01), NullRewardLoss(1e-5)]

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best choices; N = T·K, in token order."""
        E = self.num_experts
        columns = torch.arange(self.gate.shape[0], device=x.device)
        offsets = (columns >= E) * self.negative_offset
        logits = gate_logits(x, self.gate) - torch.where(columns >= 2 * E, self.null_offset, offsets)
        scores = F.softmax(logits, dim=-1)
        choice_ids = logits.topk(self.top_k, dim=-1).indices
        is_null = choice_ids >= 2 * E
        chosen = scores.gather(1, choice_ids).masked_fill(is_null, 0)
        total = chosen.sum(-1, keepdim=True) + scores[:, 2 * E :].sum(-1, keepdim=True)
        weights = torch.where(choice_ids < E, chosen, -chosen) / total.clamp(min=torch.finfo(total.dtype).tiny)
        # null choices get the number of no expert
        choice_experts = torch.where(columns >= 2 * E, columns - E, columns % E)
        routing = token_choice(logits, scores, choice_experts[choice_ids], weights, tokens)
        return replace(routing, num_ffn_experts=E, choice_ids=choice_ids.reshape(-1), choice_experts=choice_experts)
