"""Which strategies write checkpoints, and one script in which each of two processes goes on from all of them."""

import os
from pathlib import Path

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning_fixtures import small_config, trainer_of
from strategy_fixtures import Descending, share
from torch.distributed.tensor import DTensor

from lightning_moe import LoadBalancingLoss, MoEFSDP2Strategy, MoEUpcycleCallback, ZLoss
from lightning_moe.atomic import AtomicSave


class Atomic(AtomicSave, MoEFSDP2Strategy):
    """The strategy with the mixin."""


# Two processes each, on the CPU. A row meets every other one in test_checkpoint_pairs.py, and one process.
STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "moe_fsdp2": Atomic,
    "moe_fsdp2_file": lambda: Atomic(save_distributed_checkpoint=False),
}


class Grouped(Descending):
    """Two groups of parameters, in another order than the module has them."""

    def configure_optimizers(self):
        named = list(self.named_parameters())
        groups = [[p for name, p in named if (".mlp." in name) is ffn] for ffn in (True, False)]
        settings = ({"lr": 0.05, "weight_decay": 0.0}, {"lr": 0.1, "weight_decay": 0.1})
        return torch.optim.SGD(
            [{"params": group, **options} for group, options in zip(groups, settings, strict=True)], momentum=0.9
        )


# saves after the first of two epochs
SINGLE = "single"


def run(folder, strategy=None, *, config=None, epochs=1, ckpt_path=None, save=None, callbacks=(), **options):
    """Trains, on two processes if a strategy is given, on the same ten batches an epoch; returns module and Trainer."""
    ranks, rank = (1, 0) if strategy is None else (2, int(os.environ.get("LOCAL_RANK", 0)))
    several = {"accumulate_grad_batches": 2} if strategy is None else {"strategy": strategy, "devices": 2}
    upcycling = MoEUpcycleCallback(config or small_config(), balance_losses=[LoadBalancingLoss(0.3), ZLoss(0.05)])
    trainer = trainer_of(
        folder, [upcycling, *callbacks], use_distributed_sampler=False, max_epochs=epochs, **several, **options
    )
    module = Grouped()
    trainer.fit(module, share(rank, ranks), ckpt_path=ckpt_path)
    if save is not None:
        trainer.save_checkpoint(save)
    return module, trainer


def whole(module):
    """All weights, of all ranks."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
    }


CHANGES = {"experts": {"num_experts": 4}, "layers": {"layers": "1:"}}


def refusal(folder, name, change):
    """What a sharded run with another configuration says to a checkpoint."""
    try:
        run(folder, Atomic(), config=small_config(**CHANGES[change]), epochs=2, ckpt_path=folder / name)
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
            module, _ = run(folder, strategy(), epochs=2, ckpt_path=folder / f"{writer}.ckpt")
            found[writer, reader] = whole(module)
    told = {(writer, change): refusal(folder, f"{writer}.ckpt", change) for writer in STRATEGIES for change in CHANGES}
    told["dense"] = refusal(folder, "dense.ckpt", "layers")
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        torch.save((found, told), folder / "found.pt")
    torch.distributed.barrier()
