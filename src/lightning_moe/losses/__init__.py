"""Balance losses: a `Routing` to a scalar, each a function or a thin module."""

from lightning_moe.losses.base import BalanceLoss
from lightning_moe.losses.entropy import MutualInformationLoss, TokenEntropyLoss
from lightning_moe.losses.importance import ImportanceLoss, LoadLoss
from lightning_moe.losses.load_balancing import (
    HeterogeneousLoadBalancingLoss,
    LoadBalancingLoss,
    load_balancing_loss,
    sequence_load_balancing_loss,
)
from lightning_moe.losses.orthogonality import ExpertOrthogonalityLoss, RouterOrthogonalityLoss
from lightning_moe.losses.sparsity import AdaptiveL1Loss, NullRewardLoss
from lightning_moe.losses.z import ZLoss, z_loss

BALANCE_LOSSES: tuple[type[BalanceLoss], ...] = (
    LoadBalancingLoss,
    ZLoss,
    HeterogeneousLoadBalancingLoss,
    ImportanceLoss,
    LoadLoss,
    MutualInformationLoss,
    TokenEntropyLoss,
    ExpertOrthogonalityLoss,
    RouterOrthogonalityLoss,
    AdaptiveL1Loss,
    NullRewardLoss,
)

__all__ = [
    "BALANCE_LOSSES",
    "AdaptiveL1Loss",
    "BalanceLoss",
    "ExpertOrthogonalityLoss",
    "HeterogeneousLoadBalancingLoss",
    "ImportanceLoss",
    "LoadBalancingLoss",
    "LoadLoss",
    "MutualInformationLoss",
    "NullRewardLoss",
    "RouterOrthogonalityLoss",
    "TokenEntropyLoss",
    "ZLoss",
    "load_balancing_loss",
    "sequence_load_balancing_loss",
    "z_loss",
]
