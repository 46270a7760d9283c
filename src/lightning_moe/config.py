"""The one configuration: what to make of a dense model."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lightning_moe.ffn import FFNFamily
from lightning_moe.initializers import ExpertInit, RouterInit
from lightning_moe.routers import Router, TopKRouter

_SLICE = re.compile(r"-?\d*:-?\d*(:-?\d*)?")


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """What to make of a dense model.

    Args:
        num_experts: experts E per layer.
        router: called as ``router(hidden_size, num_experts)`` for each layer: a `Router` class, or one with arguments
            bound, as ``functools.partial(TopKRouter, top_k=4)``.
        init: fills the experts from the dense FFN; None is ``CopyInit()``.
        router_init: fills the router's rows; None leaves them as the router made them.
        num_shared_experts: experts that every token goes through, beside those that it is routed to (SharedE). All are
            scaled so that step 0 stays the dense model: S shared experts and routed weights that sum to w are divided
            by S + w.
        capacity_factor: in training each expert takes at most ``ceil(capacity_factor * N / E)`` of the N assignments of
            a batch, and drops the others; None takes all, as evaluation does. See `limit_capacity`.
        layers: which of the model's dense FFNs, counted from 0 in the order of its modules, without those that are
            upcycled already: ``"all"``; a slice such as ``"1::2"``; a number or a list of them; a name pattern such as
            ``"model.layers.1?.*"``; or a list of all these.
        family: the parts of the model's FFNs, where `FFN_FAMILIES` does not know them.
        seed: what each layer's own random numbers derive from, with its name; None takes the seed of
            ``seed_everything``.

    Example:
        >>> UpcycleConfig(num_experts=8).layers
        'all'
    """

    num_experts: int
    router: Callable[[int, int], Router] = TopKRouter
    init: ExpertInit | None = None
    router_init: RouterInit | None = None
    num_shared_experts: int = 0
    capacity_factor: float | None = None
    layers: str | int | Sequence[int | str] = "all"
    family: FFNFamily | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.num_experts, int) or isinstance(self.num_experts, bool) or self.num_experts < 1:
            raise ValueError(f"num_experts={self.num_experts!r}: wanted a whole number of experts, 1 or more.")
        if not isinstance(self.num_shared_experts, int) or self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts={self.num_shared_experts!r}: wanted a whole number, 0 or more.")
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise ValueError(
                f"capacity_factor={self.capacity_factor!r}: wanted a number > 0, as 1.25, or None for no limit."
            )
        if self.family is not None and not isinstance(self.family, FFNFamily):
            raise TypeError(f'family={self.family!r}: wanted FFNFamily(up="w_in", activation="act", down="w_out").')
        for name, kind, example in (
            ("init", ExpertInit, "DropInit(0.5)"),
            ("router_init", RouterInit, "ZeroRouterInit()"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name}={value!r}: wanted an initialiser, not its class or name, as {name}={example}.")
        if isinstance(self.router, Router) or not callable(self.router):
            raise TypeError(
                f"router={self.router!r}: wanted what makes a router for each layer, as TopKRouter or "
                "functools.partial(TopKRouter, top_k=2), not a router or its name."
            )


def check_config(config: Any) -> None:
    """Raises a `TypeError` if ``config`` is no `UpcycleConfig`."""
    if not isinstance(config, UpcycleConfig):
        raise TypeError(f"config is a {type(config).__name__}; wanted UpcycleConfig(num_experts=8, ...).")


def select_layers(names: Sequence[str], layers: str | int | Sequence[int | str]) -> list[str]:
    """Chooses among the names of a model's FFNs.

    Args:
        names: in the order of the model.
        layers: see `UpcycleConfig`.

    Returns:
        The chosen names in the order of the model.

    Raises:
        ValueError: if any entry matches nothing.

    Example:
        >>> select_layers(["h.0.mlp", "h.1.mlp", "h.2.mlp"], "1::2")
        ['h.1.mlp']
        >>> select_layers(["h.0.mlp", "h.1.mlp", "h.2.mlp"], ["h.0*", -1])
        ['h.0.mlp', 'h.2.mlp']
    """
    chosen: set[str] = set()
    for entry in [layers] if isinstance(layers, (str, int)) else layers:
        if isinstance(entry, str) and entry.lstrip("-").isdigit():
            entry = int(entry)
        if entry == "all":
            matched = list(names)
        elif isinstance(entry, int):
            matched = list(names)[entry:][:1] if -len(names) <= entry < len(names) else []
        elif _SLICE.fullmatch(entry):
            matched = list(names)[slice(*(int(part) if part else None for part in entry.split(":")))]
        else:
            matched = [name for name in names if fnmatchcase(name, entry)]
        if not matched:
            raise ValueError(
                f"layers={layers!r}: {entry!r} matches none of the model's {len(names)} FFNs, which are "
                f'{_abridge(names)}. Give numbers from 0 to {len(names) - 1}, a slice such as "1::2", or a name '
                f'pattern such as "{names[-1]}".'
            )
        chosen.update(matched)
    if not chosen:
        raise ValueError(f"layers={layers!r} chooses no FFN. Give at least one, or leave it at 'all'.")
    return [name for name in names if name in chosen]


def _abridge(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
