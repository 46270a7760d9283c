"""How alike the experts of a layer are: in their weights, in what they compute, in their rows of the router.

Every mean over pairs of k experts is one over the k (k - 1) / 2 pairs of different experts.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_moe.metrics.base import Ratio


def pair_cosines(gram: Float[Tensor, "*B E E"]) -> tuple[Float[Tensor, "*B"], Float[Tensor, "*B"]]:
    """Sums the cosines of all pairs i < j of E vectors.

    Args:
        gram: their inner products.

    Returns:
        The sum, in which a vector of zeros has a cosine of 0 with all others, and the number of pairs.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
        >>> pair_cosines(vectors @ vectors.T)
        (tensor(1.), tensor(3.))
    """
    num_experts = gram.shape[-1]
    norm = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    norms = norm.unsqueeze(-1) * norm.unsqueeze(-2)
    total = (gram / norms.clamp(min=torch.finfo(gram.dtype).tiny)).triu(1).sum((-2, -1))
    return total, torch.full_like(total, num_experts * (num_experts - 1) / 2)


class ExpertWeightCosine(Ratio):
    """Mean over pairs of experts of the cosine of their weights: ``cos(vec W_i, vec W_j)``, i < j.

    1 are copies, 0 are strangers. Several matrices count as one long vector; for one matrix, give that alone. Each
    update is one layer or one checkpoint, and all pairs of all updates count alike.

    Example:
        >>> metric = ExpertWeightCosine()
        >>> metric([torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])])
        tensor(0.3333)
    """

    def update(self, weights: Sequence[Float[Tensor, "E ..."]]) -> None:
        """Adds the experts of one layer.

        Args:
            weights: whole tensors (not shards) with the experts in the first dimension, as `Experts` has them.
        """
        # a sum of Gram matrices: the long vectors are never copied into one
        flat = (weight.detach().flatten(1).float() for weight in weights)
        self._add(*pair_cosines(torch.stack([rows @ rows.T for rows in flat]).sum(0)))


class ExpertWeightDistance(Ratio):
    """Mean over experts of how far they have come: ``||W_i - W_i^0|| / ||W_i^0||``, W^0 the initial weights.

    Several matrices count as one long vector. An expert that was all zeros has no such distance and is left out.

    Example:
        >>> metric = ExpertWeightDistance()
        >>> metric([torch.tensor([[1.0, 1.0], [2.0, 0.0]])], [torch.tensor([[1.0, 0.0], [2.0, 0.0]])])
        tensor(0.5000)
    """

    def update(self, weights: Sequence[Float[Tensor, "E ..."]], initial: Sequence[Float[Tensor, "E ..."]]) -> None:
        """Adds the experts of one layer.

        Args:
            weights: whole tensors (not shards) with the experts in the first dimension, as `Experts` has them.
            initial: the same tensors as they were at the start.

        Raises:
            ValueError: if there are not as many initial tensors.
        """
        moved = _squared_norms([w.detach().float() - w0.float() for w, w0 in zip(weights, initial, strict=True)])
        before = _squared_norms(initial)
        counts = before > 0
        self._add(torch.where(counts, (moved / before).sqrt(), 0), counts)


class OutputSimilarity(Ratio):
    """Mean over tokens and pairs of experts of the cosine of what they compute: ``cos(f_i(x), f_j(x))``, i < j.

    1 are experts that do the same; 1 minus this is their diversity. An output of zeros has a cosine of 0.

    Example:
        >>> metric = OutputSimilarity()
        >>> metric(torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[0.0, 3.0]]]))
        tensor(0.3333)
    """

    def update(self, outputs: Float[Tensor, "E T D"], token_mask: Bool[Tensor, " T"] | None = None) -> None:
        """Adds the outputs for a batch of tokens.

        Args:
            outputs: what each expert (all, or each token's chosen ones) computes for the same tokens, unweighted.
            token_mask: False marks padding; None means that all tokens are real.
        """
        values = outputs.detach().float()
        total, pairs = pair_cosines(torch.einsum("itd,jtd->tij", values, values))
        real = torch.ones_like(total, dtype=torch.bool) if token_mask is None else token_mask
        self._add(torch.where(real, total, 0), pairs * real)


class OutputCKA(Ratio):
    """Mean over pairs of experts of the linear CKA of what they compute for the same tokens, i < j.

    ``||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)`` for the outputs X and Y of two experts, (T, D) each, less their means
    over the tokens. 1 are outputs that are the same but for a rotation and a scale. This is no mean over tokens: each
    update has its own CKA, larger the fewer the tokens, and the updates are averaged; give them equal numbers of
    tokens, many more than D. It takes 4 * E * T^2 bytes. An update of fewer than two tokens does not count.

    Reference: Kornblith et al., *Similarity of Neural Network Representations Revisited*, 2019,
    https://arxiv.org/abs/1905.00414.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])
        >>> metric = OutputCKA()
        >>> round(float(metric(torch.stack([x, 3 * x.flip(1)]))), 5)
        1.0
    """

    def update(self, outputs: Float[Tensor, "E T D"], token_mask: Bool[Tensor, " T"] | None = None) -> None:
        """Adds the outputs for a batch of tokens.

        Args:
            outputs: what each expert computes for the same tokens, unweighted.
            token_mask: False marks padding; None means that all tokens are real.
        """
        values = outputs.detach().float()
        real = values.new_ones(values.shape[1], dtype=torch.bool) if token_mask is None else token_mask
        values = torch.where(real.unsqueeze(-1), values, 0)
        mean = values.sum(1, keepdim=True) / real.sum().clamp(min=1)
        values = torch.where(real.unsqueeze(-1), values - mean, 0)
        # ||Y^T X||_F^2 is the inner product of X X^T and Y Y^T: CKA is a cosine of Gram matrices
        grams = (values @ values.mT).flatten(1)
        total, pairs = pair_cosines(grams @ grams.T)
        counts = real.sum() > 1
        self._add(torch.where(counts, total, 0), pairs * counts)


class RouterRowCosine(Ratio):
    """Mean over pairs of the router's rows of their cosine: ``cos(W_r,i, W_r,j)``, i < j.

    0 are rows that look at different directions. Each update is one layer or one checkpoint.

    Reference: Ahrac et al., *Routers Learn the Geometry of Their Experts*, 2026, https://arxiv.org/abs/2605.12476,
    which finds the rows nearly three times as alike under an auxiliary balance loss.

    Example:
        >>> RouterRowCosine()(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]))
        tensor(0.3333)
    """

    def update(self, gate: Float[Tensor, "choices _"]) -> None:
        """Adds the gate of one layer, a row for each of its columns of logits."""
        rows = gate.detach().float()
        self._add(*pair_cosines(rows @ rows.T))


def _squared_norms(weights: Sequence[Float[Tensor, "E ..."]]) -> Float[Tensor, " E"]:
    return torch.stack([weight.detach().flatten(1).float().square().sum(1) for weight in weights]).sum(0)
