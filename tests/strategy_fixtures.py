"""What one process and several train: a module, its batches, the callback, and a script that runs a strategy."""

import dataclasses
import functools
import os
import pickle
import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning_fixtures import VOCABULARY, ForeignModule, batches, loader, logged, run_script, small_config, trainer_of
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_moe import BalanceLossCallback, LoadBalancingLoss, LossFreeRouter, MoEUpcycleCallback, ZLoss, expert_load
from lightning_moe.callbacks.base import steps_now
from lightning_moe.routing import observe_routing

if "DS_ACCELERATOR" in os.environ:
    import deepspeed

    # gloo alone, in the place of a part in C++ that DeepSpeed would compile first, for a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

STEPS = 5
EXPERTS = 6
CLIP = 0.05


class Descending(ForeignModule):
    """By SGD, in which a gradient that is twice too large cannot hide."""

    def __init__(self):
        super().__init__(lr=0.1)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Adaptive(Descending):
    """By AdamW, which counts its steps, in two groups that are in another order than the module."""

    def configure_optimizers(self):
        named = list(self.named_parameters())
        experts, rest = ([p for name, p in named if (".mlp." in name) is chosen] for chosen in (True, False))
        return torch.optim.AdamW([{"params": experts, "lr": 0.02}, {"params": rest, "lr": 0.01, "weight_decay": 0.3}])


class Native(Descending):
    """A model that brings MoE blocks of its own."""

    def __init__(self):
        super().__init__()
        config = MixtralConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=VOCABULARY, num_local_experts=EXPERTS, initializer_range=0.5,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net.inner = MixtralForCausalLM(config)


def share(rank=0, ranks=1, accumulate=1):
    """Of the batches of five steps, or of two of two batches each, rank r of n takes r, r + n, ..."""
    steps = STEPS - STEPS % accumulate
    return loader(batches(ranks * steps, padding=True)[rank::ranks])


def callback(biased=False, scope="micro_batch", native=False, recompute=False):
    """Two balance losses, with a scope; and maybe a bias that moves with every optimizer step."""
    losses = [LoadBalancingLoss(0.3, scope), ZLoss(0.05)]
    if native:
        return BalanceLossCallback(losses)
    router = {"router": functools.partial(LossFreeRouter, top_k=2, bias_rate=0.05, init_std=0.5)} if biased else {}
    config = dataclasses.replace(small_config(num_experts=EXPERTS), **router)
    return MoEUpcycleCallback(config, balance_losses=losses, activation_checkpointing=recompute)


class FirstGradients(Callback):
    """Keeps the whole gradients of the first optimizer step."""

    def __init__(self):
        self.gradients = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.gradients or not steps_now(trainer):
            return
        model = trainer.strategy.model
        is_fsdp1 = isinstance(model, FullyShardedDataParallel)
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True) if is_fsdp1 else nullcontext():
            for name, parameter in pl_module.named_parameters():
                name = name.replace("_fsdp_wrapped_module.", "")
                self.gradients[name] = _whole_gradient(trainer, parameter)


def _whole_gradient(trainer, parameter):
    if "DeepSpeed" in type(trainer.strategy).__name__:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter).clone()
    gradient = parameter.grad
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).clone()


def fit(folder, strategy, *, epochs=1, ckpt_path=None, clip=None, accumulate=1, ranks=2, kind=None, **options):
    """Trains on this rank's share; returns the trainer, the module and the first step's gradients."""
    first = FirstGradients()
    trainer = trainer_of(
        folder, [callback(**options), first], strategy=strategy, devices=ranks, use_distributed_sampler=False,
        max_epochs=epochs, gradient_clip_val=clip, accumulate_grad_batches=accumulate, log_every_n_steps=1,
    )  # fmt: skip
    module = (kind or (Native if options.get("native") else Descending))()
    trainer.fit(module, share(int(os.environ.get("LOCAL_RANK", 0)), ranks, accumulate), ckpt_path=ckpt_path)
    return trainer, module, first.gradients


def one_process(folder, *, ranks=2, accumulate=1, clip=None, kind=None, **options):
    """The same on one process, which takes as many micro-batches for a step as there would be ranks."""
    first = FirstGradients()
    trainer = trainer_of(
        folder, [callback(**options), first], accumulate_grad_batches=ranks * accumulate, gradient_clip_val=clip,
        log_every_n_steps=1,
    )  # fmt: skip
    module = (kind or (Native if options.get("native") else Descending))()
    steps = STEPS - STEPS % accumulate
    trainer.fit(module, loader(batches(ranks * steps, padding=True)))
    trainer.save_checkpoint(Path(folder, "single.ckpt"))
    return {
        "weights": module.state_dict(),
        "losses": module.losses,
        "gradients": first.gradients,
        "logged": logged(trainer.logger.log_dir),
    }


def whole(trainer, folder):
    """All weights of a trained module, on rank 0."""
    if "DeepSpeed" in type(trainer.strategy).__name__:
        from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

        path = trainer.strategy.broadcast(tempfile.mkdtemp(dir=folder))
        trainer.save_checkpoint(path)
        dist.barrier()
        if not trainer.is_global_zero:
            return {}
        return convert_zero_checkpoint_to_fp32_state_dict(path, f"{path}/whole.pt")["state_dict"]
    state = trainer.strategy.lightning_module_state_dict()
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for k, v in state.items()}


def explore(folder, strategies):
    """Trains with each strategy, plainly, with clipping and with accumulation; rank 0 writes what came out."""
    torch.set_num_threads(1)
    found = {}
    for name, make in strategies.items():
        loads = []
        stop = observe_routing(lambda layer, routing, losses, loads=loads: loads.append(expert_load(routing)))
        trainer, module, gradients = fit(folder, make())
        stop()
        told = [None, None]
        dist.all_gather_object(told, (module.losses, torch.stack(loads)))
        found[name] = {
            "losses": [loss for step in zip(*(losses for losses, _ in told), strict=True) for loss in step],
            "loads": torch.stack([load for _, load in told]),
            "gradients": gradients,
            "logged": logged(trainer.logger.log_dir) if trainer.is_global_zero else {},
            "weights": whole(trainer, folder),
            "local": {name: tuple(p.shape) for name, p in _local(module)},
            "clipped": whole(fit(folder, make(), clip=CLIP)[0], folder),
            "accumulated": whole(fit(folder, make(), accumulate=2, biased=True)[0], folder),
            "recomputed": whole(fit(folder, make(), recompute=True)[0], folder),
            "native": None if "parallel" in name else whole(fit(folder, make(), native=True)[0], folder),
            "global": whole(fit(folder, make(), scope="global_batch")[0], folder),
        }
        dist.barrier()
    if trainer.is_global_zero:
        Path(folder, "result.pkl").write_bytes(pickle.dumps(found))
    dist.barrier()


def go_on(folder, strategies):
    """Two epochs with each strategy, and two with a checkpoint after the first, its own and that of others."""
    torch.set_num_threads(1)
    found = {}
    trainer, *_ = fit(folder, "moe_fsdp2", kind=Adaptive)
    trainer.save_checkpoint(f"{folder}/fsdp2.ckpt")
    for name, make in strategies.items():
        trainer, *_ = fit(folder, make(), kind=Adaptive)
        for _ in range(2):
            # the second time over the first
            trainer.save_checkpoint(f"{folder}/{name}.ckpt")
        found[name] = {"straight": whole(fit(folder, make(), epochs=2, kind=Adaptive)[0], folder)}
        for writer in ("single", "fsdp2", *found):
            path = f"{folder}/{writer}.ckpt"
            found[name][writer] = whole(fit(folder, make(), epochs=2, kind=Adaptive, ckpt_path=path)[0], folder)
        path = f"{folder}/{name}.ckpt"
        found[name]["read by moe_fsdp2"] = whole(
            fit(folder, "moe_fsdp2", epochs=2, kind=Adaptive, ckpt_path=path)[0], folder
        )
    if trainer.is_global_zero:
        Path(folder, "result.pkl").write_bytes(pickle.dumps(found))
    dist.barrier()


def spread(folder, strategies):
    """Trains with each strategy on four ranks, plainly and with clipping."""
    torch.set_num_threads(1)
    found = {}
    for name, make in strategies.items():
        trainer, module, gradients = fit(folder, make(), ranks=4)
        found[name] = {
            "gradients": gradients,
            "weights": whole(trainer, folder),
            "local": {name: tuple(p.shape) for name, p in _local(module)},
            "clipped": whole(fit(folder, make(), clip=CLIP, ranks=4)[0], folder),
        }
    if trainer.is_global_zero:
        Path(folder, "result.pkl").write_bytes(pickle.dumps(found))
    dist.barrier()


def _local(module):
    for name, parameter in module.named_parameters():
        yield name, parameter.to_local() if isinstance(parameter, DTensor) else parameter


def explored(folder, strategies, environment=None, function="explore"):
    """Runs `explore`, or another, in processes of its own; `strategies` is the text of a dictionary of functions."""
    text = f"import sys\nfrom lightning_moe import *\nfrom strategy_fixtures import {function}\n"
    text += f"{function}(sys.argv[1], {strategies})\n"
    run_script(text, folder, folder, timeout=240, environment=environment)
    return pickle.loads(Path(folder, "result.pkl").read_bytes())
