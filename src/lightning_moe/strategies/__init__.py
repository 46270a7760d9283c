"""Strategies that know what to shard of a Mixture of Experts, by class and by name: ``Trainer(strategy="moe_fsdp2")``.

The names are known once this package is imported after Lightning, or a part of it that needs Lightning, as
`MoEUpcycleCallback`.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_moe.strategies.ddp import MoEDDPStrategy
from lightning_moe.strategies.deepspeed import MoEDeepSpeedStrategy
from lightning_moe.strategies.fsdp import MoEFSDPStrategy
from lightning_moe.strategies.fsdp2 import MoEFSDP2Strategy

__all__ = ["STRATEGIES", "MoEDDPStrategy", "MoEDeepSpeedStrategy", "MoEFSDP2Strategy", "MoEFSDPStrategy"]

STRATEGIES = {
    "moe_ddp": (MoEDDPStrategy, "DDP for a Mixture of Experts"),
    "moe_fsdp": (MoEFSDPStrategy, "FSDP1 that wraps each MoE layer and each block around one"),
    "moe_fsdp2": (MoEFSDP2Strategy, "FSDP2 that shards a Mixture of Experts block by block"),
    "moe_deepspeed": (MoEDeepSpeedStrategy, "DeepSpeed ZeRO with MoE layers as leaves"),
}


def register_strategies() -> None:
    """Makes the strategies known to Trainers by their names."""
    for name, (strategy, description) in STRATEGIES.items():
        if name not in StrategyRegistry.available_strategies():
            StrategyRegistry.register(name, strategy, description=description)


register_strategies()
