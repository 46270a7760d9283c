"""Runs layers whole and spread over two ranks, and writes how far they differ."""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from catalogue import ROUTER_ROWS
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_moe import Experts, MoELayer, parallelize_experts

HIDDEN, WIDTH, EXPERTS = 16, 24, 4


def layer_of(make_router, **options):
    """One and the same layer on every rank."""
    torch.manual_seed(2)
    experts = Experts(EXPERTS, HIDDEN, WIDTH, **options)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    router = make_router(HIDDEN, EXPERTS)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return MoELayer(router, experts).train()


def run(layer, x, *, checkpointed=False):
    """The output and the gradients of its mean square for the states, the experts and the router."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    out = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    out.float().square().mean().backward() if out.numel() else out.sum().backward()
    found = {"out": out.detach(), "x": x.grad}
    # a rank's mean over the ranks, as data parallelism has it
    for name, parameter in layer.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if isinstance(gradient, torch.distributed.tensor.DTensor):
            found[name] = gradient.full_tensor()
        else:
            gradient = gradient.clone()
            dist.all_reduce(gradient)
            found[name] = gradient / dist.get_world_size()
    return found


def differences(mesh, make_router, shapes, dtype=torch.float32, checkpointed=False, **options):
    """The largest difference of each thing, relative to its largest number, over the ranks."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(*shapes[dist.get_rank()], HIDDEN, generator=generator).to(dtype)
    whole = layer_of(make_router, **options).to(dtype)
    spread = layer_of(make_router, **options).to(dtype)
    parallelize_experts(spread, mesh)
    expected, found = run(whole, x), run(spread, x, checkpointed=checkpointed)
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, {k: _apart(found[k], v) for k, v in expected.items()})
    return {k: max(rank[k] for rank in told) for k in expected}


def _apart(found, expected):
    if not expected.numel():
        return float(found.shape != expected.shape)
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def main(folder):
    """Every router, and what may be special about a batch or about experts."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("expert",))["expert"]
    even, first = ((2, 5), (2, 5)), ROUTER_ROWS["top_k"]
    # what hashes token ids gets none here
    rows = {name: row for name, row in ROUTER_ROWS.items() if not row.cls.uses_token_ids}
    found = {name: differences(mesh, row, even) for name, row in rows.items()}
    found |= {
        "uneven": differences(mesh, first, ((3, 7), (1, 2))),
        "one rank empty": differences(mesh, first, ((2, 5), (0, 5))),
        "bfloat16": differences(mesh, ROUTER_ROWS["top_k_3"], even, torch.bfloat16),
        "float64": differences(mesh, first, even, torch.float64),
        "biases": differences(mesh, first, even, activation=F.gelu, gated=False, up_bias=True, down_bias=True),
        "checkpointed": differences(mesh, first, even, checkpointed=True),
    }
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
