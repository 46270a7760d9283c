"""The catalogues of initialisers: dense FFN weights to expert weights, and the router's rows."""

from lightning_moe.initializers.base import ExpertInit, FFNStates, experts_like, trainable_like
from lightning_moe.initializers.branch_train_mix import BranchTrainMixInit
from lightning_moe.initializers.copy import CopyInit
from lightning_moe.initializers.drop import DropInit
from lightning_moe.initializers.granular import GranularInit
from lightning_moe.initializers.low_rank import LowRankInit
from lightning_moe.initializers.noise import NoiseInit
from lightning_moe.initializers.routers import (
    ROUTER_INITIALIZERS,
    CentroidRouterInit,
    KMeansRouterInit,
    NormalRouterInit,
    OrthogonalRouterInit,
    RouterInit,
    ZeroRouterInit,
)
from lightning_moe.initializers.split import SplitInit
from lightning_moe.initializers.zero_output import ZeroOutputInit

INITIALIZERS: tuple[type[ExpertInit], ...] = (
    CopyInit,
    NoiseInit,
    DropInit,
    GranularInit,
    SplitInit,
    ZeroOutputInit,
    LowRankInit,
    BranchTrainMixInit,
)

__all__ = [
    "INITIALIZERS",
    "ROUTER_INITIALIZERS",
    "BranchTrainMixInit",
    "CentroidRouterInit",
    "CopyInit",
    "DropInit",
    "ExpertInit",
    "FFNStates",
    "GranularInit",
    "KMeansRouterInit",
    "LowRankInit",
    "NoiseInit",
    "NormalRouterInit",
    "OrthogonalRouterInit",
    "RouterInit",
    "SplitInit",
    "ZeroOutputInit",
    "ZeroRouterInit",
    "experts_like",
    "trainable_like",
]
