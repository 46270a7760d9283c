"""How evenly a load is shared out: functions of a load of any shape (..., E), so that one call serves all layers."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def max_violation(load: Float[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """MaxVio: ``max_e load_e / mean(load) - 1``. 0 is perfect balance, E - 1 all tokens on one expert.

    Reference: Wang et al., *Auxiliary-Loss-Free Load Balancing*, 2024, equation 4, https://arxiv.org/abs/2408.15664.

    Example:
        >>> max_violation(torch.tensor([4.0, 2.0, 1.0, 1.0]))
        tensor(1.)
    """
    return load_imbalance(load) - 1


def min_violation(load: Float[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """MinVio: ``1 - min_e load_e / mean(load)``. 0 is perfect balance, 1 an expert without a token.

    Example:
        >>> min_violation(torch.tensor([4.0, 2.0, 1.0, 1.0]))
        tensor(0.5000)
    """
    return 1 - load.amin(-1) / _mean(load)


def average_violation(load: Float[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """AvgVio: ``mean_e |load_e / mean(load) - 1|``. 0 is perfect balance, 2 - 2 / E all tokens on one expert.

    Example:
        >>> average_violation(torch.tensor([4.0, 2.0, 1.0, 1.0]))
        tensor(0.5000)
    """
    return (_ratio(load) - 1).abs().mean(-1)


def load_imbalance(load: Float[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """How many times its fair share the busiest expert gets: ``max_e load_e / mean(load)``, `max_violation` + 1.

    Example:
        >>> load_imbalance(torch.tensor([4.0, 2.0, 1.0, 1.0]))
        tensor(2.)
    """
    return load.amax(-1) / _mean(load)


def utilization_quantiles(load: Float[Tensor, "*L E"], quantiles: Sequence[float]) -> Float[Tensor, "*L Q"]:
    """Quantiles over the experts of ``load_e / mean(load)``, linear between two experts. All 1 is perfect balance.

    Args:
        load: tokens per expert.
        quantiles: Q fractions between 0 (the least used expert) and 1 (the busiest).

    Example:
        >>> utilization_quantiles(torch.tensor([4.0, 2.0, 1.0, 1.0]), (0.0, 0.5, 1.0))
        tensor([0.5000, 0.7500, 2.0000])
    """
    points = torch.tensor(quantiles, dtype=load.dtype, device=load.device)
    return torch.quantile(_ratio(load), points, dim=-1).movedim(0, -1)


def coefficient_of_variation(load: Float[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """``std(load) / mean(load)``. 0 is perfect balance, ``sqrt(E - 1)`` all tokens on one expert.

    The standard deviation is that of the E experts, without Bessel's correction. Its square is the quantity in the
    losses of Shazeer et al., *Outrageously Large Neural Networks*, 2017, https://arxiv.org/abs/1701.06538.

    Example:
        >>> coefficient_of_variation(torch.tensor([4.0, 0.0]))
        tensor(1.)
    """
    return _ratio(load).std(-1, correction=0)


def gini_coefficient(load: Float[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """``sum_i sum_j |load_i - load_j| / (2 E^2 mean(load))``. 0 is perfect balance, 1 - 1 / E all on one expert.

    Example:
        >>> gini_coefficient(torch.tensor([0.0, 4.0, 0.0, 0.0]))
        tensor(0.7500)
    """
    num_experts = load.shape[-1]
    # in ascending order expert i is the larger one in i pairs, and the smaller one in E - 1 - i
    signs = 2 * torch.arange(num_experts, dtype=load.dtype, device=load.device) - (num_experts - 1)
    return (signs * _ratio(load).sort(-1).values).sum(-1) / num_experts**2


def num_dead_experts(load: Float[Tensor, "*L E"], threshold: float = 0.0) -> Float[Tensor, "*L"]:
    """Experts with a load of at most ``threshold`` times the mean load.

    Args:
        load: tokens per expert.
        threshold: fraction of the mean load; 0 counts the experts that got no token at all.

    Example:
        >>> num_dead_experts(torch.tensor([4.0, 0.0, 1.0]))
        tensor(1.)
    """
    return (load <= threshold * _mean(load).unsqueeze(-1)).sum(-1).to(load.dtype)


def load_entropy(load: Float[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """Entropy of the load as a fraction of its maximum: ``-sum_e f_e log f_e / log E``. 1 is perfect balance.

    Example:
        >>> load_entropy(torch.tensor([2.0, 2.0, 0.0, 0.0]))
        tensor(0.5000)
    """
    return _entropy(load) / torch.log(torch.tensor(float(max(load.shape[-1], 2)), device=load.device, dtype=load.dtype))


def effective_experts(load: Float[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """The number of equally used experts that would have this load's entropy: ``exp(-sum_e f_e log f_e)``, 1 to E.

    Example:
        >>> effective_experts(torch.tensor([2.0, 2.0, 0.0, 0.0]))
        tensor(2.)
    """
    return _entropy(load).exp()


def _mean(load: Tensor) -> Tensor:
    return load.mean(-1).clamp(min=torch.finfo(load.dtype).tiny)


def _ratio(load: Tensor) -> Tensor:
    return load / _mean(load).unsqueeze(-1)


def _entropy(load: Tensor) -> Tensor:
    fraction = load / load.sum(-1, keepdim=True).clamp(min=torch.finfo(load.dtype).tiny)
    return -torch.xlogy(fraction, fraction).sum(-1)
