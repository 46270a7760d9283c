"""Callbacks for any Trainer."""

from lightning_moe.callbacks.balancing import BalanceLossCallback
from lightning_moe.callbacks.expert_bias import ExpertBiasCallback
from lightning_moe.callbacks.monitor import ExpertUtilizationCallback
from lightning_moe.callbacks.schedule import Freeze, RouterScheduleCallback
from lightning_moe.callbacks.upcycle import MoEUpcycleCallback
from lightning_moe.callbacks.zero_shot import ZeroShotEvalCallback

__all__ = [
    "BalanceLossCallback",
    "ExpertBiasCallback",
    "ExpertUtilizationCallback",
    "Freeze",
    "MoEUpcycleCallback",
    "RouterScheduleCallback",
    "ZeroShotEvalCallback",
]
