"""Fills a DeepSpeed engine, whose ranks hold pieces, from a checkpoint that any other strategy wrote."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fill_weights(module: nn.Module, weights: Mapping[str, Tensor], rank: int) -> None:
    """Puts whole weights and buffers into a module that `deepspeed.initialize` has partitioned.

    Args:
        module: inside the engine.
        weights: a state dict; every process gives the same.
        rank: of this process.
    """
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    parameters: Iterable[tuple[str, Any]] = module.named_parameters()
    for name, parameter in parameters:
        value = weights[name].to(parameter.device)
        if not hasattr(parameter, "ds_id"):
            parameter.data.copy_(value)
            if parameter.requires_grad:
                safe_set_full_fp32_param(parameter, value.float())
            continue
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if rank == 0:
                parameter.data.copy_(value)
        if parameter.requires_grad:
            piece = _piece(value.flatten(), parameter.ds_tensor.ds_numel, rank)
            safe_set_local_fp32_param(parameter, piece.to(parameter.device))
    for name, buffer in module.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])


def fill_optimizer(
    optimizer: Any, module: nn.Module, saved: Mapping[str, Any], names: Sequence[Sequence[str]], rank: int
) -> None:
    """Puts whole optimizer states into the ranks' pieces.

    Args:
        optimizer: what DeepSpeed made of the user's.
        module: inside the engine, its weights filled.
        saved: an optimizer's state dict, which names its parameters or counts them.
        names: of the parameters of each group of the user's optimizer, as it was given them.
        rank: of this process.
    """
    labels = [label for group in saved["param_groups"] for label in group["params"]]
    counted = dict(zip((name for group in names for name in group), labels, strict=True))
    parameters = dict(module.named_parameters())
    trained = [[name for name in group if parameters[name].requires_grad] for group in names]
    # a checkpoint that names its parameters may have them in another order
    states = {name: saved["state"].get(name, saved["state"].get(counted[name], {})) for name in counted}
    base = optimizer.optimizer
    if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        _fill_parts(optimizer, {parameters[n]: states[n] for group in trained for n in group}, rank)
        flats = optimizer.fp32_partitioned_groups_flat
    else:
        flats = [group["params"][0] for group in base.param_groups]
        for flat, group in zip(flats, trained, strict=True):
            _fill_group(base.state[flat], flat, [states[name] for name in group], rank)
    counts = {key: value for state in states.values() for key, value in state.items() if not _is_whole(value)}
    for flat in flats:
        # numbers of steps, one for all
        base.state[flat].update({k: v.clone() if isinstance(v, Tensor) else v for k, v in counts.items()})
    for own, told in zip(base.param_groups, saved["param_groups"], strict=True):
        own.update({key: value for key, value in told.items() if key != "params"})


def _fill_group(state: dict[str, Any], flat: Tensor, saved: Sequence[Mapping[str, Any]], rank: int) -> None:
    # of all parameters of the group, one after the other, each rank has a piece
    for key in {key for one in saved for key, value in one.items() if _is_whole(value)}:
        whole = torch.cat([one[key].flatten() for one in saved])
        state[key] = _piece(whole, flat.numel(), rank).to(flat.device)


def _fill_parts(optimizer: Any, saved: Mapping[Any, Mapping[str, Any]], rank: int) -> None:
    # of each parameter each rank has a piece
    from deepspeed.utils import safe_set_local_optimizer_state

    keys = {key for one in saved.values() for key, value in one.items() if _is_whole(value)}
    for flat in optimizer.fp32_partitioned_groups_flat:
        for key in keys:
            optimizer.optimizer.state[flat].setdefault(key, torch.zeros_like(flat))
    for parameter, one in saved.items():
        for key in keys & one.keys():
            piece = _piece(one[key].flatten(), parameter.ds_tensor.ds_numel, rank).to(parameter.device)
            safe_set_local_optimizer_state(parameter, piece, key)


def _piece(whole: Tensor, size: int, rank: int) -> Tensor:
    # the last one is padded
    piece = whole[rank * size : (rank + 1) * size].float()
    return F.pad(piece, (0, size - piece.numel()))


def _is_whole(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
