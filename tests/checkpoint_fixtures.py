"""Which strategies write checkpoints, and one script in which each of two processes goes on from all of them."""

import os
from contextlib import nullcontext
from pathlib import Path

import torch
from lightning_fixtures import batches, loader, small_config, trainer_of
from strategy_fixtures import STEPS, Descending
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from lightning_moe import (
    LoadBalancingLoss,
    MoEDDPStrategy,
    MoEFSDP2Strategy,
    MoEFSDPStrategy,
    MoEUpcycleCallback,
    ZLoss,
)
from lightning_moe.layer import plain_name

# Two processes each, on the CPU. A row meets every other one in test_checkpoint_pairs.py, and one process.
STRATEGIES = {
    "moe_ddp": lambda: MoEDDPStrategy(process_group_backend="gloo"),
    "moe_fsdp": MoEFSDPStrategy,
    "moe_fsdp_directory": lambda: MoEFSDPStrategy(state_dict_type="sharded"),
    "moe_fsdp2": MoEFSDP2Strategy,
    "moe_fsdp2_file": lambda: MoEFSDP2Strategy(save_distributed_checkpoint=False),
    "expert_parallel": lambda: MoEFSDP2Strategy(expert_parallel_size=2),
    "expert_parallel_file": lambda: MoEFSDP2Strategy(expert_parallel_size=2, save_distributed_checkpoint=False),
}


class Grouped(Descending):
    """Two groups of parameters, in another order than the module has them, and one in none, which does not train."""

    def __init__(self):
        super().__init__()
        self.net.inner.model.embed_tokens.weight.requires_grad_(False)

    def configure_optimizers(self):
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = [[p for name, p in named if (".mlp." in name) is ffn] for ffn in (True, False)]
        settings = ({"lr": 0.05, "weight_decay": 0.0}, {"lr": 0.1, "weight_decay": 0.1})
        return torch.optim.SGD(
            [{"params": group, **options} for group, options in zip(groups, settings, strict=True)], momentum=0.9
        )


# saves after the first of two epochs
SINGLE = "single"
# two ranks can share them
EVEN = {"num_experts": 6}


def run(folder, strategy=None, *, config=None, epochs=1, ckpt_path=None, save=None, callbacks=(), **options):
    """Trains, on two processes if a strategy is given, on the same ten batches an epoch; returns module and Trainer."""
    ranks, rank = (1, 0) if strategy is None else (2, int(os.environ.get("LOCAL_RANK", 0)))
    several = {"accumulate_grad_batches": 2} if strategy is None else {"strategy": strategy, "devices": 2}
    upcycling = MoEUpcycleCallback(
        config or small_config(num_experts=6), balance_losses=[LoadBalancingLoss(0.3), ZLoss(0.05)]
    )
    trainer = trainer_of(
        folder, [upcycling, *callbacks], use_distributed_sampler=False, max_epochs=epochs, **several, **options
    )
    module = Grouped()
    trainer.fit(module, loader(batches(2 * STEPS, padding=True)[rank::ranks]), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return module, trainer


def whole(module, trainer):
    """All weights, of all ranks."""
    model = trainer.strategy.model
    is_fsdp1 = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model) if is_fsdp1 else nullcontext():
        return {
            plain_name(name): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in module.named_parameters()
        }


CHANGES = {"experts": {"num_experts": 4}, "layers": {"layers": "1:"}}


def refusal(folder, name, change):
    """What a sharded run with another configuration says to a checkpoint."""
    try:
        run(
            folder,
            MoEFSDP2Strategy(),
            config=small_config(**EVEN | CHANGES[change]),
            epochs=2,
            ckpt_path=folder / name,
        )
    except ValueError as error:
        return str(error)
    return "nothing"


def all_pairs(folder):
    """Each row saves, then each goes on from every checkpoint in the folder; the weights go into a file."""
    torch.set_num_threads(1)
    folder = Path(folder)
    for name, strategy in STRATEGIES.items():
        run(folder, strategy(), save=folder / f"{name}.ckpt")
    torch.distributed.barrier()
    found = {}
    for writer in (SINGLE, *STRATEGIES):
        for reader, strategy in STRATEGIES.items():
            found[writer, reader] = whole(*run(folder, strategy(), epochs=2, ckpt_path=folder / f"{writer}.ckpt"))
    told = {(writer, change): refusal(folder, f"{writer}.ckpt", change) for writer in STRATEGIES for change in CHANGES}
    told["dense"] = refusal(folder, "dense.ckpt", "layers")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        torch.save((found, told), folder / "found.pt")
    torch.distributed.barrier()
