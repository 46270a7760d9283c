"""Turn the dense FFNs of a pretrained model into Mixture-of-Experts layers, in any Lightning Trainer.

The torch world is imported at once; what needs Lightning is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_moe.__about__ import __version__
from lightning_moe.experts import Experts, combine, dispatch
from lightning_moe.ffn import FFN_FAMILIES, FFNFamily, FFNWeights, find_ffns
from lightning_moe.initializers import INITIALIZERS, CopyInit, ExpertInit
from lightning_moe.layer import MoELayer, moe_layers
from lightning_moe.losses import (
    BALANCE_LOSSES,
    AdaptiveL1Loss,
    BalanceLoss,
    ExpertOrthogonalityLoss,
    HeterogeneousLoadBalancingLoss,
    ImportanceLoss,
    LoadBalancingLoss,
    LoadLoss,
    MutualInformationLoss,
    NullRewardLoss,
    RouterOrthogonalityLoss,
    TokenEntropyLoss,
    ZLoss,
    load_balancing_loss,
    z_loss,
)
from lightning_moe.metrics import (
    ROUTING_METRICS,
    ActiveExperts,
    AverageViolation,
    BatchMaxViolation,
    CoefficientOfVariation,
    CounterfactualRoutingGain,
    DeadExperts,
    DomainMutualInformation,
    DomainSpecialization,
    DomainTotalVariation,
    DropRate,
    EffectiveExperts,
    ExpertCoactivation,
    ExpertLoad,
    ExpertWeightCosine,
    ExpertWeightDistance,
    GiniCoefficient,
    LoadEntropy,
    LoadImbalance,
    MaxRouterLogit,
    MaxViolation,
    MinViolation,
    OutputCKA,
    OutputSimilarity,
    RouterLogitNorm,
    RouterMargin,
    RouterRowCosine,
    RouterSaturation,
    RoutingChangeRate,
    RoutingConfidence,
    RoutingEntropy,
    SquaredCoefficientOfVariation,
    UtilizationQuantiles,
    VocabularySpecialization,
)
from lightning_moe.routers import (
    ROUTERS,
    BASERouter,
    CosineRouter,
    DenseMixerRouter,
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    HyperRouter,
    LossFreeRouter,
    MoEPlusPlusRouter,
    NoisyTopKRouter,
    NullExpertsRouter,
    PerturbedCosineRouter,
    ReMoERouter,
    Router,
    SigmoidRouter,
    SinkhornRouter,
    SparseMixerRouter,
    TCMoERouter,
    TokenChoiceRouter,
    TopKRouter,
    TopPRouter,
    UniformRouter,
    XMoERouter,
)
from lightning_moe.routing import MoEWarning, Routing, expert_load, limit_capacity, record_routing
from lightning_moe.saving import load_moe, save_moe
from lightning_moe.tokens import Tokens
from lightning_moe.upcycle import Receipt, UpcycleConfig, upcycle

if TYPE_CHECKING:
    from lightning_moe.callbacks import (
        BalanceLossCallback,
        ExpertBiasCallback,
        ExpertUtilizationCallback,
        MoEUpcycleCallback,
    )
    from lightning_moe.data import TextDataModule
    from lightning_moe.module import MoEModule

_NEEDS_LIGHTNING = {
    "BalanceLossCallback": "lightning_moe.callbacks",
    "ExpertBiasCallback": "lightning_moe.callbacks",
    "ExpertUtilizationCallback": "lightning_moe.callbacks",
    "MoEUpcycleCallback": "lightning_moe.callbacks",
    "MoEModule": "lightning_moe.module",
    "TextDataModule": "lightning_moe.data",
}


def __getattr__(name: str) -> Any:
    if name in _NEEDS_LIGHTNING:
        return getattr(import_module(_NEEDS_LIGHTNING[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NEEDS_LIGHTNING})


__all__ = [
    "BALANCE_LOSSES",
    "FFN_FAMILIES",
    "INITIALIZERS",
    "ROUTERS",
    "ROUTING_METRICS",
    "ActiveExperts",
    "AdaptiveL1Loss",
    "AverageViolation",
    "BASERouter",
    "BalanceLoss",
    "BalanceLossCallback",
    "BatchMaxViolation",
    "CoefficientOfVariation",
    "CopyInit",
    "CosineRouter",
    "CounterfactualRoutingGain",
    "DeadExperts",
    "DenseMixerRouter",
    "DomainMutualInformation",
    "DomainSpecialization",
    "DomainTotalVariation",
    "DropRate",
    "EffectiveExperts",
    "ExpertBiasCallback",
    "ExpertChoiceRouter",
    "ExpertCoactivation",
    "ExpertInit",
    "ExpertLoad",
    "ExpertOrthogonalityLoss",
    "ExpertUtilizationCallback",
    "ExpertWeightCosine",
    "ExpertWeightDistance",
    "Experts",
    "FFNFamily",
    "FFNWeights",
    "GShardRouter",
    "GiniCoefficient",
    "HashRouter",
    "HeterogeneousLoadBalancingLoss",
    "HyperRouter",
    "ImportanceLoss",
    "LoadBalancingLoss",
    "LoadEntropy",
    "LoadImbalance",
    "LoadLoss",
    "LossFreeRouter",
    "MaxRouterLogit",
    "MaxViolation",
    "MinViolation",
    "MoELayer",
    "MoEModule",
    "MoEPlusPlusRouter",
    "MoEUpcycleCallback",
    "MoEWarning",
    "MutualInformationLoss",
    "NoisyTopKRouter",
    "NullExpertsRouter",
    "NullRewardLoss",
    "OutputCKA",
    "OutputSimilarity",
    "PerturbedCosineRouter",
    "ReMoERouter",
    "Receipt",
    "Router",
    "RouterLogitNorm",
    "RouterMargin",
    "RouterOrthogonalityLoss",
    "RouterRowCosine",
    "RouterSaturation",
    "Routing",
    "RoutingChangeRate",
    "RoutingConfidence",
    "RoutingEntropy",
    "SigmoidRouter",
    "SinkhornRouter",
    "SparseMixerRouter",
    "SquaredCoefficientOfVariation",
    "TCMoERouter",
    "TextDataModule",
    "TokenChoiceRouter",
    "TokenEntropyLoss",
    "Tokens",
    "TopKRouter",
    "TopPRouter",
    "UniformRouter",
    "UpcycleConfig",
    "UtilizationQuantiles",
    "VocabularySpecialization",
    "XMoERouter",
    "ZLoss",
    "__version__",
    "combine",
    "dispatch",
    "expert_load",
    "find_ffns",
    "limit_capacity",
    "load_balancing_loss",
    "load_moe",
    "moe_layers",
    "record_routing",
    "save_moe",
    "upcycle",
    "z_loss",
]
