"""The catalogue of routers."""

from lightning_moe.routers.base import Router, TokenChoiceRouter, top_k_assignment
from lightning_moe.routers.base_layer import BASERouter
from lightning_moe.routers.cosine import CosineRouter
from lightning_moe.routers.dense_mixer import DenseMixerRouter
from lightning_moe.routers.expert_choice import ExpertChoiceRouter
from lightning_moe.routers.gshard import GShardRouter
from lightning_moe.routers.hash import HashRouter
from lightning_moe.routers.hyper import HyperRouter
from lightning_moe.routers.loss_free import LossFreeRouter
from lightning_moe.routers.moe_plus_plus import MoEPlusPlusRouter
from lightning_moe.routers.noisy_top_k import NoisyTopKRouter
from lightning_moe.routers.null_experts import NullExpertsRouter
from lightning_moe.routers.perturbed_cosine import PerturbedCosineRouter
from lightning_moe.routers.remoe import ReMoERouter
from lightning_moe.routers.sigmoid import SigmoidRouter
from lightning_moe.routers.sinkhorn import SinkhornRouter
from lightning_moe.routers.sparse_mixer import SparseMixerRouter
from lightning_moe.routers.tc_moe import TCMoERouter
from lightning_moe.routers.top_k import TopKRouter
from lightning_moe.routers.top_p import TopPRouter
from lightning_moe.routers.uniform import UniformRouter
from lightning_moe.routers.xmoe import XMoERouter

ROUTERS: tuple[type[Router], ...] = (
    TopKRouter,
    CosineRouter,
    SigmoidRouter,
    HyperRouter,
    PerturbedCosineRouter,
    XMoERouter,
    LossFreeRouter,
    MoEPlusPlusRouter,
    TCMoERouter,
    ReMoERouter,
    NoisyTopKRouter,
    GShardRouter,
    ExpertChoiceRouter,
    SinkhornRouter,
    BASERouter,
    HashRouter,
    TopPRouter,
    NullExpertsRouter,
    SparseMixerRouter,
    DenseMixerRouter,
    UniformRouter,
)

__all__ = [cls.__name__ for cls in ROUTERS] + ["ROUTERS", "Router", "TokenChoiceRouter", "top_k_assignment"]
