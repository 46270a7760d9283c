"""Turn the dense FFNs of a pretrained model into Mixture-of-Experts layers, in any Lightning Trainer.

The torch world is imported at once; what needs Lightning, or `datasets`, is imported when it is first used, but for the
strategies where Lightning is there already.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_moe.__about__ import __version__
from lightning_moe.config import UpcycleConfig
from lightning_moe.consolidation import Consolidated, consolidate
from lightning_moe.expansion import expand
from lightning_moe.expert_parallel import parallelize_experts
from lightning_moe.experts import Experts, combine, dispatch
from lightning_moe.export import Exported, export_to_hf
from lightning_moe.ffn import FFN_FAMILIES, FFNFamily, FFNWeights
from lightning_moe.ffn_search import find_ffns
from lightning_moe.footprint import Footprint, plan_training
from lightning_moe.freezing import train_only
from lightning_moe.initializers import (
    INITIALIZERS,
    ROUTER_INITIALIZERS,
    BranchTrainMixInit,
    CentroidRouterInit,
    CopyInit,
    DropInit,
    ExpertInit,
    FFNStates,
    GranularInit,
    KMeansRouterInit,
    LowRankInit,
    NoiseInit,
    NormalRouterInit,
    OrthogonalRouterInit,
    RouterInit,
    SplitInit,
    ZeroOutputInit,
    ZeroRouterInit,
)
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
from lightning_moe.low_rank import LowRankExperts
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
from lightning_moe.native import attach_native, detach_native, routed_layers
from lightning_moe.native_import import import_native
from lightning_moe.quantization import Quantization, dequantize, quantize_frozen
from lightning_moe.receipt import Expansion, Receipt
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
from lightning_moe.schedules import CosineSchedule, LinearSchedule, Schedule, StepSchedule
from lightning_moe.tokens import Tokens
from lightning_moe.upcycle import upcycle

if TYPE_CHECKING:
    from lightning_moe.analysis import Analysis, analyze, write_report
    from lightning_moe.atomic import AtomicCheckpointIO, AtomicSave
    from lightning_moe.callbacks import (
        BalanceLossCallback,
        ExpertBiasCallback,
        ExpertUtilizationCallback,
        Freeze,
        MoEUpcycleCallback,
        RouterScheduleCallback,
        ZeroShotEvalCallback,
    )
    from lightning_moe.data import TextDataModule
    from lightning_moe.loading import load_from_checkpoint
    from lightning_moe.module import MoEModule
    from lightning_moe.strategies import MoEDDPStrategy, MoEDeepSpeedStrategy, MoEFSDP2Strategy, MoEFSDPStrategy

_ON_FIRST_USE = {
    "Analysis": "lightning_moe.analysis",
    "analyze": "lightning_moe.analysis",
    "write_report": "lightning_moe.analysis",
    "AtomicCheckpointIO": "lightning_moe.atomic",
    "AtomicSave": "lightning_moe.atomic",
    "BalanceLossCallback": "lightning_moe.callbacks",
    "ExpertBiasCallback": "lightning_moe.callbacks",
    "ExpertUtilizationCallback": "lightning_moe.callbacks",
    "Freeze": "lightning_moe.callbacks",
    "RouterScheduleCallback": "lightning_moe.callbacks",
    "MoEUpcycleCallback": "lightning_moe.callbacks",
    "ZeroShotEvalCallback": "lightning_moe.callbacks",
    "MoEDDPStrategy": "lightning_moe.strategies",
    "MoEDeepSpeedStrategy": "lightning_moe.strategies",
    "MoEFSDP2Strategy": "lightning_moe.strategies",
    "MoEFSDPStrategy": "lightning_moe.strategies",
    "MoEModule": "lightning_moe.module",
    "load_from_checkpoint": "lightning_moe.loading",
    "TextDataModule": "lightning_moe.data",
}


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        if _ON_FIRST_USE[name] != "lightning_moe.analysis":
            # who uses a part that needs Lightning may name our strategies to its Trainer
            import_module("lightning_moe.strategies")
        return getattr(import_module(_ON_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})


__all__ = [
    "BALANCE_LOSSES",
    "FFN_FAMILIES",
    "INITIALIZERS",
    "ROUTERS",
    "ROUTER_INITIALIZERS",
    "ROUTING_METRICS",
    "ActiveExperts",
    "AdaptiveL1Loss",
    "Analysis",
    "AtomicCheckpointIO",
    "AtomicSave",
    "AverageViolation",
    "BASERouter",
    "BalanceLoss",
    "BalanceLossCallback",
    "BatchMaxViolation",
    "BranchTrainMixInit",
    "CentroidRouterInit",
    "CoefficientOfVariation",
    "Consolidated",
    "CopyInit",
    "CosineRouter",
    "CosineSchedule",
    "CounterfactualRoutingGain",
    "DeadExperts",
    "DenseMixerRouter",
    "DomainMutualInformation",
    "DomainSpecialization",
    "DomainTotalVariation",
    "DropInit",
    "DropRate",
    "EffectiveExperts",
    "Expansion",
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
    "Exported",
    "FFNFamily",
    "FFNStates",
    "FFNWeights",
    "Footprint",
    "Freeze",
    "GShardRouter",
    "GiniCoefficient",
    "GranularInit",
    "HashRouter",
    "HeterogeneousLoadBalancingLoss",
    "HyperRouter",
    "ImportanceLoss",
    "KMeansRouterInit",
    "LinearSchedule",
    "LoadBalancingLoss",
    "LoadEntropy",
    "LoadImbalance",
    "LoadLoss",
    "LossFreeRouter",
    "LowRankExperts",
    "LowRankInit",
    "MaxRouterLogit",
    "MaxViolation",
    "MinViolation",
    "MoEDDPStrategy",
    "MoEDeepSpeedStrategy",
    "MoEFSDP2Strategy",
    "MoEFSDPStrategy",
    "MoELayer",
    "MoEModule",
    "MoEPlusPlusRouter",
    "MoEUpcycleCallback",
    "MoEWarning",
    "MutualInformationLoss",
    "NoiseInit",
    "NoisyTopKRouter",
    "NormalRouterInit",
    "NullExpertsRouter",
    "NullRewardLoss",
    "OrthogonalRouterInit",
    "OutputCKA",
    "OutputSimilarity",
    "PerturbedCosineRouter",
    "Quantization",
    "ReMoERouter",
    "Receipt",
    "Router",
    "RouterInit",
    "RouterLogitNorm",
    "RouterMargin",
    "RouterOrthogonalityLoss",
    "RouterRowCosine",
    "RouterSaturation",
    "RouterScheduleCallback",
    "Routing",
    "RoutingChangeRate",
    "RoutingConfidence",
    "RoutingEntropy",
    "Schedule",
    "SigmoidRouter",
    "SinkhornRouter",
    "SparseMixerRouter",
    "SplitInit",
    "SquaredCoefficientOfVariation",
    "StepSchedule",
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
    "ZeroOutputInit",
    "ZeroRouterInit",
    "ZeroShotEvalCallback",
    "__version__",
    "analyze",
    "attach_native",
    "combine",
    "consolidate",
    "dequantize",
    "detach_native",
    "dispatch",
    "expand",
    "expert_load",
    "export_to_hf",
    "find_ffns",
    "import_native",
    "limit_capacity",
    "load_balancing_loss",
    "load_from_checkpoint",
    "load_moe",
    "moe_layers",
    "parallelize_experts",
    "plan_training",
    "quantize_frozen",
    "record_routing",
    "routed_layers",
    "save_moe",
    "train_only",
    "upcycle",
    "write_report",
    "z_loss",
]

if "lightning.pytorch" in sys.modules:
    # Trainers that are made from now on know our strategies by their names
    import_module("lightning_moe.strategies")
