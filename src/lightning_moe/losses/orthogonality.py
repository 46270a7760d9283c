"""Losses that keep experts, or the router's rows, different from each other."""

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_moe.losses.base import BalanceLoss
from lightning_moe.routing import Routing


class ExpertOrthogonalityLoss(BalanceLoss):
    """How much the outputs of a token's experts overlap: the mean squared length of their projections on each other.

    For the outputs a and b of two experts of one token, ``|<a, b> / (<b, b> + eps) * b|^2``; the mean over all ordered
    pairs of a token's experts and all tokens. 0 where experts are orthogonal.

    Reference: Guo et al., *Advancing Expert Specialization for Better MoE*, 2025, equation 5,
    https://arxiv.org/abs/2505.22323. Differs from it: the mean and not the sum over tokens and pairs.

    Args:
        coefficient: factor before the loss; the default is ours.

    Example:
        >>> from dataclasses import replace
        >>> a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> logits = torch.zeros(1, 2)
        >>> routing = Routing(torch.zeros(2).long(), torch.arange(2), torch.ones(2), logits, logits, top_k=2)
        >>> ExpertOrthogonalityLoss()(replace(routing, outputs=torch.stack([a, b])))
        tensor(0.7500)
    """

    name = "expert_orthogonality_loss"
    needs_outputs = True

    def __init__(self, coefficient: float = 1e-3) -> None:
        super().__init__(coefficient)

    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """Computes the loss of one layer."""
        assert routing.outputs is not None
        computed = routing.computed()
        counted = routing.counted() if computed is None else routing.counted() * computed
        outputs = routing.outputs.to(torch.promote_types(routing.outputs.dtype, torch.float32))
        outputs, present = _by_token(routing, outputs.masked_fill(counted.unsqueeze(1) == 0, 0), counted)
        with torch.autocast(outputs.device.type, enabled=False):
            products = outputs @ outputs.transpose(1, 2)  # (T, K, K): <a, b>
        squares = products.diagonal(dim1=1, dim2=2).unsqueeze(1)  # (T, 1, K): <b, b>
        lengths = (products / (squares + 1e-9)).square() * squares
        itself = torch.eye(lengths.shape[1], dtype=torch.bool, device=lengths.device)
        num_pairs = (present.sum(1) * (present.sum(1) - 1)).sum()
        return lengths.masked_fill(itself, 0).sum() / num_pairs.clamp(min=1)


def _by_token(
    routing: Routing, outputs: Float[Tensor, "N D"], counted: Float[Tensor, " N"]
) -> tuple[Float[Tensor, "T K D"], Float[Tensor, "T K"]]:
    # each token's rows side by side, filled up with zeros
    if routing.top_k is not None:
        shape = (routing.num_tokens, routing.top_k)
        return outputs.view(*shape, outputs.shape[1]), counted.view(shape)
    token_ids, order = routing.token_ids.sort(stable=True)
    starts = torch.searchsorted(token_ids, torch.arange(routing.num_tokens, device=order.device))
    places = torch.arange(len(order), device=order.device) - starts[token_ids]
    most = int(places.max()) + 1 if len(places) else 1
    rows = token_ids * most + places
    padded = outputs.new_zeros(routing.num_tokens * most, outputs.shape[1]).index_copy(0, rows, outputs[order])
    present = counted.new_zeros(routing.num_tokens * most).index_copy(0, rows, counted[order])
    return padded.view(routing.num_tokens, most, outputs.shape[1]), present.view(routing.num_tokens, most)


class RouterOrthogonalityLoss(BalanceLoss):
    """How far the router's rows are from orthonormal: ``sum |W W^T - 1|`` over all entries.

    Orthogonal rows let similar tokens go to the same experts and different ones to different experts, without a look at
    the load. The rows are those of the gate, or the experts' embeddings of a cosine router.

    Reference: Omi et al., *Load Balancing Mixture of Experts with Similarity Preserving Routers* (SimBal), 2025,
    https://arxiv.org/abs/2506.14038.

    Args:
        coefficient: factor before the loss; the default is ours.

    Raises:
        ValueError: at the first forward, if the router has no rows.

    Example:
        >>> none = torch.zeros(0).long()
        >>> routing = Routing(none, none, torch.zeros(0), *torch.zeros(2, 0, 2), gate=torch.tensor([[1.0, 1], [0, 1]]))
        >>> RouterOrthogonalityLoss()(routing)  # W W^T is [[2, 1], [1, 1]]
        tensor(3.)
    """

    name = "router_orthogonality_loss"
    needs_gate = True

    def __init__(self, coefficient: float = 0.1) -> None:
        super().__init__(coefficient)

    def forward(self, routing: Routing) -> Float[Tensor, ""]:
        """Computes the loss of one layer."""
        if routing.gate is None:
            raise ValueError(
                "RouterOrthogonalityLoss needs a router with one vector per expert, and this one has none (it routes "
                "by hash or by chance). Leave the loss out."
            )
        gate = routing.gate.to(torch.promote_types(routing.gate.dtype, torch.float32))
        with torch.autocast(gate.device.type, enabled=False):
            products = gate @ gate.t()
        return (products - torch.eye(len(gate), dtype=gate.dtype, device=gate.device)).abs().sum()
