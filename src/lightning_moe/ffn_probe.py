"""Compares a module with what its family says it computes, and finds the family that would fit."""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import partial
from itertools import permutations, product

import torch
from torch import Tensor, nn

from lightning_moe.ffn import INLINE_ACTIVATIONS, FFNFamily, FFNWeights, is_linear


@torch.no_grad()
def probe(module: nn.Module, weights: FFNWeights) -> tuple[float, float]:
    """How far a module is from its canonical form on a probe, and how far it may be."""
    # a fixed, deterministic input that excites every channel; drawing it would move the global generator
    rows = torch.arange(3 * weights.hidden_size, device=weights.up.device, dtype=torch.float32)
    x = torch.sin(rows).view(3, 1, -1).to(weights.up.dtype)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        dense = module(x)
    finally:
        for part, training in modes:
            part.training = training
    canonical = weights(x).float()
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2
    return float((dense.float() - canonical).abs().max()), tolerance * float(canonical.abs().max())


def no_family_message(model: nn.Module, families: Iterable[FFNFamily]) -> str:
    """What to tell where no FFN is found: what was looked for, what was seen, and the one line that would fit."""
    kinds = {
        f"{type(module).__name__}({', '.join(name for name, _ in module.named_children())})": module
        for module in model.modules()
        if sum(is_linear(child) for child in module.children()) >= 2
    }
    known = "; ".join(", ".join(family.parts) for family in families)
    fitting = [(type(module).__name__, family) for module in kinds.values() if (family := _fitting_family(module))]
    advice = [f"This one fits {name}: UpcycleConfig(family={_in_one_line(family)})." for name, family in fitting]
    return (
        f"{type(model).__name__}: no FFN of a known family. Looked for modules with the parts: {known}. "
        f"Modules with two linear layers or more: {', '.join(sorted(kinds)) or 'none'}. "
        + (
            " ".join(advice)
            or "Describe yours in one line and pass it: "
            'UpcycleConfig(family=FFNFamily(up="fc_in", down="fc_out", activation="act")).'
        )
    )


def _fitting_family(module: nn.Module) -> FFNFamily | None:
    # the first description made of a module's own parts that computes what the module does
    for family in _possible_families(module):
        if not family.matches(module):
            continue
        weights = family.read(module)
        if weights.up.is_meta:
            continue
        # the width of what goes through a dropout tells where it stands
        widths: dict[str, int] = {}
        hooks = [
            module.get_submodule(name).register_forward_pre_hook(partial(_note_width, widths, name))
            for name in (family.dropout, family.inner_dropout)
            if name is not None
        ]
        try:
            difference, tolerance = probe(module, weights)
        except Exception:
            # a forward that takes something else raises whatever it likes
            continue
        finally:
            for hook in hooks:
                hook.remove()
        wanted = {family.dropout: weights.hidden_size, family.inner_dropout: weights.expert_size}
        if difference <= tolerance and all(wanted[name] == width for name, width in widths.items()):
            return family
    return None


def _note_width(widths: dict[str, int], name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
    widths[name] = given[0].shape[-1]


def _possible_families(module: nn.Module) -> Iterator[FFNFamily]:
    children = dict(module.named_children())
    linears = [name for name, child in children.items() if is_linear(child)]
    dropouts = [name for name, child in children.items() if getattr(child, "p", 0) != 0]
    if len(linears) not in (2, 3) or len(dropouts) > 2:
        return
    own = [name for name, value in {**children, **vars(module)}.items() if callable(value) and name[0] != "_"]
    activations = [name for name in own if name not in (*linears, *dropouts)]
    ends = set(permutations([*dropouts, *[None] * (2 - len(dropouts))]))
    for activation, order, fused, (dropout, inner) in product(
        (*activations, *INLINE_ACTIVATIONS), permutations(linears), (False, True), sorted(ends, key=str)
    ):
        gate = order[0] if len(order) == 3 else None
        sizes = [_sizes(children[name]) for name in order]
        in_size, width = sizes[-1][::-1]
        if (fused and gate) or any(size != (in_size, width * (2 if fused else 1)) for size in sizes[:-1]):
            continue
        yield FFNFamily(
            gate=gate,
            up=order[-2],
            down=order[-1],
            activation=activation,
            fused_gate=fused,
            dropout=dropout,
            inner_dropout=inner,
        )


def _in_one_line(family: FFNFamily) -> str:
    given = {field.name: getattr(family, field.name) for field in fields(family)}
    texts = [
        f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}" for name, value in given.items() if value
    ]
    return f"FFNFamily({', '.join(texts)})"


def _sizes(linear: nn.Module) -> tuple[int, ...]:
    # in and out
    weight = getattr(linear, "base_layer", linear).weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape) if type(linear).__name__ == "Conv1D" else tuple(weight.shape[::-1])
