"""Spreads the experts of every layer over the ranks of a mesh: all-to-all around dispatch and combine."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lightning_moe.experts import Dispatched
from lightning_moe.four_bit import Weight4bit
from lightning_moe.layer import MoELayer, moe_layers
from lightning_moe.low_rank import LowRankExperts
from lightning_moe.native import native_blocks


def parallelize_experts(model: nn.Module, mesh: DeviceMesh) -> dict[str, MoELayer]:
    """Leaves each rank of a mesh its share of every layer's experts, in place: rank r of R the experts from r·E/R on.

    Their weights become `DTensor` parameters, sharded over the experts, so that optimizers and distributed checkpoints
    know them. In the forward each rank routes its own tokens, sends them to the ranks of their experts and gets the
    outputs back; every rank must run each layer equally often. The gradient of an expert is the mean over the ranks, as
    that of any other parameter in data parallelism. Shared experts, routers and all else stay as they are.

    Reference: Lepikhin et al., *GShard*, 2020, https://arxiv.org/abs/2006.16668. Differs from it: no capacity,
    the ranks exchange as many rows as were routed.

    Args:
        model: an upcycled model, the same on each rank.
        mesh: a mesh of one dimension.

    Returns:
        The layers, by name.

    Raises:
        ValueError: if the model has no MoE layer, if the number of experts of one is not divisible by the mesh's size,
            or if a layer cannot be spread: low-rank experts, experts in 4 bit, and MoE blocks that a Hugging Face model
            brings itself. Nothing is changed then.
    """
    layers = _layers_to_spread(model, mesh.size())
    for layer in layers.values():
        for name, weight in list(layer.experts.named_parameters(recurse=False)):
            # a copy: a view would keep all experts in memory
            own = weight.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
            spread = DTensor.from_local(own, mesh, [Shard(0)], run_check=False)
            layer.experts.register_parameter(name, nn.Parameter(spread, requires_grad=weight.requires_grad))
        layer.experts.exchange = AllToAll(mesh)
    return layers


def _layers_to_spread(model: nn.Module, ranks: int) -> dict[str, MoELayer]:
    if native := native_blocks(model):
        raise ValueError(
            f"{native[0]}: expert parallelism spreads the experts of a MoELayer, and this block is the model's own. "
            "Leave expert_parallel_size at 1: the block is sharded as any other."
        )
    layers = moe_layers(model)
    for name, layer in layers.items():
        if isinstance(layer.experts, LowRankExperts):
            raise ValueError(
                f"{name}: low-rank experts share one FFN, and expert parallelism has nothing to spread that is worth "
                "the exchange. Leave expert_parallel_size at 1."
            )
        if any(isinstance(weight, Weight4bit) for weight in layer.experts.projections.values()):
            raise ValueError(
                f"{name}: the experts are in 4 bit, and expert parallelism spreads them in full precision only. Leave "
                "expert_parallel_size at 1, or quantize out."
            )
        if layer.num_experts % ranks:
            raise ValueError(
                f"{name}: num_experts={layer.num_experts} is not divisible by expert_parallel_size={ranks}; choose a "
                "divisor."
            )
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer whose experts could be spread. Upcycle it first.")
    return layers


class AllToAll:
    """Exchanges rows between the ranks of a mesh; an `Exchange`.

    Args:
        mesh: a mesh of one dimension, over which the experts are spread.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def local(self, weight: Tensor) -> Tensor:
        """This rank's part, whose gradient is divided by the number of ranks: it comes as the sum over all of them."""
        part = weight.to_local() if isinstance(weight, DTensor) else weight
        return _ScaleGradient.apply(part, 1 / self.mesh.size())  # type: ignore[no-any-return]

    def send(self, rows: Dispatched) -> tuple[Dispatched, Callable[[Tensor], Tensor]]:
        """Brings the rows of all ranks to their experts; waits for the device to learn how many these are."""
        group, ranks = self.mesh.get_group(), self.mesh.size()
        counts = rows.offsets.long().diff(prepend=rows.offsets.new_zeros(1).long()).view(ranks, -1)  # (ranks, E/ranks)
        coming = torch.empty_like(counts)
        dist.all_to_all_single(coming, counts, group=group)
        given, taken = torch.stack([counts.sum(1), coming.sum(1)]).tolist()
        x = _Exchanged.apply(rows.x, taken, given, group)
        # they come by rank, and by expert within one
        experts = torch.arange(counts.shape[1], device=x.device).repeat(ranks)
        expert_ids, order = torch.sort(experts.repeat_interleave(coming.flatten(), output_size=len(x)), stable=True)
        here = Dispatched(x.index_select(0, order), order, expert_ids, coming.sum(0).cumsum(0).to(torch.int32))

        def give_back(y: Tensor) -> Tensor:
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(len(order), device=order.device)
            return _Exchanged.apply(y.index_select(0, inverse), given, taken, group)  # type: ignore[no-any-return]

        return here, give_back


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _Exchanged(torch.autograd.Function):
    # the gradient goes the same way back
    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: list[int], given: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (given, taken), group
        return _all_to_all(x, taken, given, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        taken, given = ctx.splits
        return _all_to_all(grad, taken, given, ctx.group), None, None, None


def _all_to_all(x: Tensor, taken: list[int], given: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(taken), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), taken, given, group=group)
    return out
