"""Loss-free balancing: a bias on the choice, moved by the load and not by a gradient."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_moe.checks import check_not_negative, check_positive
from lightning_moe.losses import BalanceLoss, LoadBalancingLoss
from lightning_moe.routers.base import Normalize, TokenChoiceRouter, gate_logits, token_choice, unit_sum
from lightning_moe.routing import Routing
from lightning_moe.tokens import Tokens


class LossFreeRouter(TokenChoiceRouter):
    """Balances experts by a bias on the choice instead of a loss; sigmoid scores, as in DeepSeek-V3.

    ``scores = sigmoid(gate x)``, ``chosen = top_k(scores + expert_bias)``; the combine weights come from ``scores``
    alone, ``routed_scaling * scores[chosen] / sum(scores[chosen])``, so the bias needs no gradient. After each
    optimizer step `adapt` moves it: ``expert_bias += bias_rate * sign(mean(load) - load)``, with the load of all ranks
    and accumulated micro-batches; `ExpertBiasCallback` calls it.

    Group-limited choice: the experts stand in ``num_groups`` groups; a token chooses among those of the
    ``top_k_groups`` groups with the highest sum of their two best biased scores, so that it goes to few devices.

    Reference: Wang et al., *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*, 2024,
    https://arxiv.org/abs/2408.15664; DeepSeek-AI, *DeepSeek-V3 Technical Report*, 2024, equations 12 to 16,
    https://arxiv.org/abs/2412.19437. Differs from the first: weights are normalised, as in the second.

    Args:
        hidden_size: width D of the incoming hidden states.
        num_experts: number of experts E.
        top_k: experts per token K, 1 <= K <= E.
        normalize: whether a token's weights sum to one before they are scaled; see `TopKRouter`.
        bias_rate: step of the bias, in score units per optimizer step; 1e-3 in the paper.
        num_groups: number of groups; 8 in DeepSeek-V3, 1 is no grouping.
        top_k_groups: groups a token may choose from; 4 in DeepSeek-V3.
        routed_scaling: factor of the combine weights; 2.5 in DeepSeek-V3. Upcycling folds it into the experts, so that
            step 0 stays the dense model.
        init_std: standard deviation of the gate's initial weights.

    Raises:
        ValueError: if ``top_k`` exceeds ``num_experts`` or what the chosen groups hold, if ``top_k=1`` with
            ``normalize=True``, if the groups do not divide the experts, or if a number is out of its range.

    Example:
        >>> router = LossFreeRouter(hidden_size=8, num_experts=4, bias_rate=0.1)
        >>> router.adapt(torch.tensor([9.0, 1.0, 1.0, 1.0]))
        >>> router.expert_bias
        tensor([-0.1000,  0.1000,  0.1000,  0.1000])
    """

    adapts_to_load = True
    expert_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        top_k: int = 2,
        normalize: Normalize = True,
        bias_rate: float = 1e-3,
        num_groups: int = 1,
        top_k_groups: int = 1,
        routed_scaling: float = 1.0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, normalize)
        check_not_negative(bias_rate=bias_rate, init_std=init_std)
        check_positive(num_groups=num_groups, top_k_groups=top_k_groups, routed_scaling=routed_scaling)
        if num_experts % num_groups or (num_groups > 1 and num_experts // num_groups < 2):
            raise ValueError(
                f"num_groups={num_groups} with num_experts={num_experts}: the groups must hold the same number of "
                "experts, two or more. Choose a divisor."
            )
        if not top_k_groups <= num_groups or top_k > top_k_groups * (num_experts // num_groups):
            raise ValueError(
                f"top_k_groups={top_k_groups} of num_groups={num_groups} hold "
                f"{top_k_groups * (num_experts // num_groups)} experts, of which a token is to choose top_k={top_k}. "
                "Raise top_k_groups, up to num_groups, or lower top_k."
            )
        self.bias_rate = bias_rate
        self.num_groups = num_groups
        self.top_k_groups = top_k_groups
        self.routed_scaling = routed_scaling
        self.init_std = init_std
        self.gate = nn.Parameter(torch.randn(num_experts, hidden_size) * init_std)
        self.register_buffer("expert_bias", torch.zeros(num_experts))

    @property
    def weights_sum_to_one(self) -> bool:
        """True with ``normalize``, if they are not scaled after it."""
        return bool(self.normalize) and self.routed_scaling == 1

    @property
    def weights_sum(self) -> float | None:
        """``routed_scaling``, with ``normalize``."""
        return self.routed_scaling if self.normalize else None

    def balance_losses(self) -> list[BalanceLoss]:
        """The small loss per sequence that DeepSeek-V3 has beside the bias."""
        return [LoadBalancingLoss(1e-4, scope="sequence")]

    def adapt(self, load: Float[Tensor, " choices"], scale: int | float = 1.0) -> None:
        """Moves the bias towards the experts with a load below the mean."""
        step = torch.sign(load.mean() - load) * (self.bias_rate * scale)
        self.expert_bias += step.to(self.expert_bias.dtype)

    def forward(self, x: Float[Tensor, "T D"], tokens: Tokens | None = None) -> Routing:
        """Routes each token to its K best experts; N = T·K, in token order."""
        logits = gate_logits(x, self.gate)
        scores = logits.sigmoid()
        chooser = self._within_groups(scores.detach() + self.expert_bias)
        expert_ids = chooser.topk(self.top_k, dim=-1).indices
        weights = unit_sum(scores.gather(1, expert_ids), self.normalize) * self.routed_scaling
        return token_choice(logits, scores, expert_ids, weights, tokens)

    def _within_groups(self, chooser: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        if self.num_groups == 1:
            return chooser
        grouped = chooser.view(-1, self.num_groups, self.num_experts // self.num_groups)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.top_k_groups, dim=-1).indices
        allowed = torch.zeros_like(grouped[..., 0]).scatter(1, best, 1).bool().unsqueeze(-1)
        # not 0 as elsewhere: a biased score may be negative
        return grouped.masked_fill(~allowed, float("-inf")).view_as(chooser)
