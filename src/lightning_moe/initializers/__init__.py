"""The catalogues of initialisers: dense FFN weights to expert weights, and the router's rows."""

from lightning_moe.initializers.base import ExpertInit
from lightning_moe.initializers.copy import CopyInit
from lightning_moe.initializers.drop import DropInit
from lightning_moe.initializers.granular import GranularInit
from lightning_moe.initializers.noise import NoiseInit
from lightning_moe.initializers.routers import (
    ROUTER_INITIALIZERS,
    CentroidRouterInit,
    KMeansRouterInit,
    NormalRouterInit,
    OrthogonalRouterInit,
    RouterInit,
)
from lightning_moe.initializers.split import SplitInit

INITIALIZERS: tuple[type[ExpertInit], ...] = (CopyInit, NoiseInit, DropInit, GranularInit, SplitInit)

__all__ = [
    "INITIALIZERS",
    "ROUTER_INITIALIZERS",
    "CentroidRouterInit",
    "CopyInit",
    "DropInit",
    "ExpertInit",
    "GranularInit",
    "KMeansRouterInit",
    "NoiseInit",
    "NormalRouterInit",
    "OrthogonalRouterInit",
    "RouterInit",
    "SplitInit",
]
