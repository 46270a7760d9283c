"""Reads the optimizer states of a DeepSpeed checkpoint, whose ranks keep flat pieces of all parameters together."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_OPTIMIZER_FILES = "*optim_states.pt"


def read_zero_optimizer(directory: Path, param_shapes: Sequence[Mapping[str, torch.Size]]) -> dict[str, Any] | None:
    """Puts the optimizer's states together, as torch would have written them on one process, by parameter name.

    With stage 1 and 2 the ranks hold consecutive pieces of each group's flattened parameters; with stage 3 a piece of
    each parameter. The last piece is padded.

    Args:
        directory: the one with the files of all ranks; what they hold is allowed to ``torch.load`` by the caller.
        param_shapes: of the parameters that train, group by group, in the optimizer's order.

    Returns:
        ``state`` and ``param_groups``; None if the ranks have written no optimizer states.
    """
    files = sorted(directory.glob(_OPTIMIZER_FILES), key=_rank)
    if not files:
        return None
    ranks = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
    held = [rank["optimizer_state_dict"] for rank in ranks]
    is_stage_3 = "optimizer_state_dict" in held[0]
    bases = [rank["optimizer_state_dict" if is_stage_3 else "base_optimizer_state"] for rank in held]
    groups = bases[0]["param_groups"]
    shapes = [{name: torch.Size(shape) for name, shape in group.items()} for group in param_shapes]
    pieces = [base["state"] for base in bases]
    state = _of_parts(pieces, shapes) if is_stage_3 else _of_groups(pieces, shapes)
    named = [{**group, "params": list(names)} for group, names in zip(groups, shapes, strict=True)]
    return {"state": state, "param_groups": named}


def _rank(file: Path) -> int:
    found = re.search(r"pp_rank_(\d+)_", file.name)
    return int(found[1]) if found else 0


def _of_groups(
    pieces: Sequence[Mapping[int, Mapping[str, Any]]], shapes: Sequence[Mapping[str, torch.Size]]
) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {}
    for number, group in enumerate(shapes):
        for key, value in pieces[0].get(number, {}).items():
            parts = [piece[number][key] for piece in pieces]
            flat = torch.cat(parts) if _is_flat(value) else None
            start = 0
            for name, shape in group.items():
                end = start + shape.numel()
                whole = _own(value) if flat is None else flat[start:end].view(shape).clone()
                state.setdefault(name, {})[key] = whole
                start = end
    return state


def _of_parts(
    pieces: Sequence[Mapping[int, Mapping[str, Any]]], shapes: Sequence[Mapping[str, torch.Size]]
) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {}
    for key, value in pieces[0][0].items():
        # a rank's flat pieces stand in sub-groups, one after the other
        flats = [torch.cat([piece[n][key] for n in sorted(piece)]) if _is_flat(value) else value for piece in pieces]
        start = 0
        for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
            size = -(-shape.numel() // len(pieces))
            if _is_flat(value):
                whole = torch.cat([flat[start : start + size] for flat in flats])[: shape.numel()].view(shape)
            else:
                whole = _own(value)
            state.setdefault(name, {})[key] = whole
            start += size
    return state


def _own(value: Any) -> Any:
    # a number of steps is counted in place, for each parameter by itself
    return value.clone() if isinstance(value, Tensor) else value


def _is_flat(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
