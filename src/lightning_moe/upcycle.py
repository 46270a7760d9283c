"""Dense model in, Mixture-of-Experts model out, in place; the one configuration; the receipt."""

import re
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNFamily, FFNWeights, find_ffns
from lightning_moe.initializers import CopyInit, ExpertInit
from lightning_moe.layer import MoELayer, moe_layers
from lightning_moe.routers import Router, TopKRouter
from lightning_moe.routing import MoEWarning
from lightning_moe.tokens import TokenContext, takes_tokens

_SLICE = re.compile(r"-?\d*:-?\d*(:-?\d*)?")


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """What to make of a dense model.

    Args:
        num_experts: experts E per layer.
        router: called as ``router(hidden_size, num_experts)`` for each layer: a `Router` class, or one with arguments
            bound, as ``functools.partial(TopKRouter, top_k=4)``.
        init: fills the experts from the dense FFN; None is ``CopyInit()``.
        num_shared_experts: experts that every token goes through, beside those that it is routed to (SharedE). All are
            scaled so that step 0 stays the dense model: S shared experts and routed weights that sum to w are divided
            by S + w.
        capacity_factor: in training each expert takes at most ``ceil(capacity_factor * N / E)`` of the N assignments of
            a batch, and drops the others; None takes all, as evaluation does. See `limit_capacity`.
        layers: which of the model's FFNs, counted from 0 in the order of its modules: ``"all"``; a slice such as
            ``"1::2"``; a number or a list of them; a name pattern such as ``"model.layers.1?.*"``; or a list of all
            these.
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
    num_shared_experts: int = 0
    capacity_factor: float | None = None
    layers: str | int | Sequence[int | str] = "all"
    family: FFNFamily | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.num_experts, int) or self.num_experts < 1:
            raise ValueError(f"num_experts={self.num_experts!r}: wanted a whole number of experts, 1 or more.")
        if not isinstance(self.num_shared_experts, int) or self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts={self.num_shared_experts!r}: wanted a whole number, 0 or more.")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(
                f"capacity_factor={self.capacity_factor!r}: wanted a number > 0, as 1.25, or None for no limit."
            )
        if self.family is not None and not isinstance(self.family, FFNFamily):
            raise TypeError(f'family={self.family!r}: wanted FFNFamily(up="w_in", activation="act", down="w_out").')
        if isinstance(self.router, Router) or not callable(self.router):
            raise TypeError(
                f"router={self.router!r}: wanted what makes a router for each layer, as TopKRouter or "
                "functools.partial(TopKRouter, top_k=2), not a router or its name."
            )


@dataclass(frozen=True)
class Receipt:
    """What `upcycle` did.

    Args:
        layers: names of the modules that were replaced.
        kept: names of the dense FFNs that were left.
        num_experts: experts per layer, shared ones left out.
        experts_per_token: experts that compute for one token, shared ones left out.
        num_shared_experts: experts that compute for every token.
        parameters: total before and after.
        active_parameters: parameters that compute for one token, before and after.
        preserved: whether step 0 computes exactly the dense model.
        reason: why, or why not.
        measured_difference: max |logit difference| to the dense model on the batch given; None without one.
        seed: what the random numbers derive from.
    """

    layers: tuple[str, ...]
    kept: tuple[str, ...]
    num_experts: int
    experts_per_token: float
    num_shared_experts: int
    parameters: tuple[int, int]
    active_parameters: tuple[int, int]
    preserved: bool
    reason: str
    measured_difference: float | None
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        total, active = self.parameters, self.active_parameters
        lines = [
            f"Upcycled {len(self.layers)} of {len(self.layers) + len(self.kept)} FFNs to {self.num_experts} experts, "
            f"{self.experts_per_token:g} per token"
            + (f", and {self.num_shared_experts} shared." if self.num_shared_experts else "."),
            f"  parameters   {_human(total[0])} -> {_human(total[1])}",
            f"  active       {_human(active[0])} -> {_human(active[1])} per token",
            f"  step 0       {'the dense model' if self.preserved else 'NOT the dense model'}: {self.reason}",
        ]
        if self.measured_difference is not None:
            lines.append(f"  measured     max |logit difference| = {self.measured_difference:.1e}")
        return "\n".join(lines)


def upcycle(model: nn.Module, config: UpcycleConfig, *, batch: Mapping[str, Any] | Tensor | None = None) -> Receipt:
    """Replaces dense FFNs of a model by Mixture-of-Experts layers, in place.

    All layers are built before the first is put in: a model is upcycled as a whole or not at all.

    Args:
        model: any module with FFNs of a known family, or of ``config.family``.
        config: what to make of it.
        batch: inputs of the model, a mapping of keyword arguments or one tensor; if given, the outputs before and after
            are compared and the receipt tells the difference.

    Returns:
        What was done, and how step 0 relates to the dense model.

    Raises:
        TypeError: if ``config`` is no `UpcycleConfig`, or if no FFN of a known family is found.
        ValueError: if the model is upcycled already, if ``config.layers`` matches nothing, or if the router refuses its
            arguments.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> model = nn.Sequential(model, nn.LayerNorm(8))
        >>> receipt = upcycle(model, UpcycleConfig(num_experts=4), batch=torch.randn(3, 8))
        >>> receipt.layers, receipt.preserved, receipt.measured_difference < 1e-6
        (('0',), True, True)
    """
    check_config(config)
    if done := moe_layers(model):
        raise ValueError(f"{type(model).__name__} is upcycled already: {next(iter(done))} is a MoE layer.")
    dense = find_ffns(model, config.family)
    chosen = select_layers(list(dense), config.layers)
    seed = torch.initial_seed() if config.seed is None else config.seed
    init = CopyInit() if config.init is None else config.init
    layers = {name: _build_layer(name, dense[name], config, init, seed) for name in chosen}
    contexts = _share_contexts(model, layers)
    before = _count(model.parameters())
    dense_out = torch.empty(0) if batch is None else _outputs(model, batch)
    for name, layer in layers.items():
        _replace(model, name, layer)
    for context, watched in contexts:
        context.watch(watched)
    first = next(iter(layers.values()))
    _warn_if_not_causal(model, first.router)
    after = _count(model.parameters())
    idle = sum(_idle(layer) for layer in layers.values())
    preserved, reason = _step_zero(first.router, init, config)
    return Receipt(
        layers=tuple(chosen),
        kept=tuple(name for name in dense if name not in layers),
        num_experts=config.num_experts,
        experts_per_token=first.router.experts_per_token,
        num_shared_experts=config.num_shared_experts,
        parameters=(before, after),
        active_parameters=(before, after - idle),
        preserved=preserved,
        reason=reason,
        measured_difference=None if batch is None else _difference(dense_out, _outputs(model, batch)),
        seed=seed,
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


def _build_layer(name: str, dense: FFNWeights, config: UpcycleConfig, init: ExpertInit, seed: int) -> MoELayer:
    generator = torch.Generator().manual_seed(_layer_seed(seed, name))
    # The router draws from the global generator, as any module does: give it this layer's own numbers, then put the
    # global state back, so that upcycling shifts nobody else's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_layer_seed(seed, name))
        router = config.router(dense.hidden_size, config.num_experts)
    if not isinstance(router, Router):
        raise TypeError(
            f"router={config.router!r} made a {type(router).__name__}, not a Router. Pass a Router class or a callable "
            "(hidden_size, num_experts) -> Router."
        )
    experts = _build_experts(config.num_experts, dense)
    init(experts, dense, generator)
    shared = None
    if config.num_shared_experts:
        shared = _build_experts(config.num_shared_experts, dense)
        CopyInit()(shared, dense, generator)
    for part in (experts, shared):
        _divide_output(part, config.num_shared_experts + (1.0 if router.weights_sum is None else router.weights_sum))
    layer = MoELayer(
        router.to(dense.up.device, dense.up.dtype),
        experts,
        shared_experts=shared,
        capacity_factor=config.capacity_factor,
        dropout=dense.dropout,
        name=name,
    )
    for part in (experts, shared):
        if part is not None:
            part.requires_grad_(any(source.requires_grad for _, source in dense.sources))
    return layer


def _build_experts(num_experts: int, dense: FFNWeights) -> Experts:
    return Experts(
        num_experts,
        dense.hidden_size,
        dense.expert_size,
        activation=dense.activation,
        gated=dense.gate is not None,
        up_bias=dense.up_bias is not None,
        down_bias=dense.down_bias is not None,
        device=dense.up.device,
        dtype=dense.up.dtype,
    )


@torch.no_grad()
def _divide_output(experts: Experts | None, divisor: float) -> None:
    if experts is not None and divisor != 1:
        experts.down_proj.div_(divisor)
        if experts.down_proj_bias is not None:
            experts.down_proj_bias.div_(divisor)


def _layer_seed(seed: int, name: str) -> int:
    # crc32 and not hash(), which differs from process to process
    return (seed * 2654435761 + zlib.crc32(name.encode())) % 2**63


def _share_contexts(model: nn.Module, layers: Mapping[str, MoELayer]) -> list[tuple[TokenContext, nn.Module]]:
    # Each layer listens to the innermost text model around it: in a vision-language model the vision tower has no
    # token ids, and its patches must not meet the text's padding mask.
    contexts: dict[str | None, TokenContext] = {}
    members: dict[str | None, list[MoELayer]] = {}
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        parts = name.split(".")
        ancestors = [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]
        home = next((path for path in ancestors if takes_tokens(modules[path])), None)
        layer.context = contexts.setdefault(home, TokenContext())
        members.setdefault(home, []).append(layer)
    for group in members.values():
        for position, layer in enumerate(group):
            layer.position, layer.is_last = position, layer is group[-1]
    return [(context, modules[path]) for path, context in contexts.items() if path is not None]


def _replace(model: nn.Module, name: str, layer: MoELayer) -> None:
    # a module used in several places is replaced in all of them
    dense = model.get_submodule(name)
    if dense is model:
        raise ValueError("The model itself is one FFN; put it into a module, as nn.Sequential(ffn).")
    layer.train(dense.training)
    for parent in list(model.modules()):
        # _modules and not named_children(): that names a child once, which a parent may have under two names
        for child_name, child in list(parent._modules.items()):
            if child is dense:
                setattr(parent, child_name, layer)


def _step_zero(router: Router, init: ExpertInit, config: UpcycleConfig) -> tuple[bool, str]:
    if not init.copies_dense:
        return False, f"{type(init).__name__} changes the experts."
    if router.weights_sum is None:
        return False, (
            f"the experts are copies, but the weights of {type(router).__name__} do not sum to one, nor to the "
            "same for every token, so each FFN's output is scaled by their sum."
        )
    if config.capacity_factor is not None:
        return False, (
            f"the experts are copies, but with capacity_factor={config.capacity_factor:g} tokens are dropped in "
            "training; in evaluation it is the dense model."
        )
    if config.num_shared_experts or router.weights_sum != 1:
        return True, (
            f"every expert, shared or routed, is a copy divided by {config.num_shared_experts + router.weights_sum:g}, "
            "which is what the weights sum to."
        )
    return True, f"every expert is a copy and the weights of {type(router).__name__} sum to one."


def _warn_if_not_causal(model: nn.Module, router: Router) -> None:
    if router.causal or not any(_generates(module) for module in model.modules()):
        return
    warnings.warn(
        f"{type(router).__name__} lets a token's routing depend on later tokens (causal = False), and "
        f"{type(model).__name__} is a causal language model: in training it sees a little of what it is to predict, "
        "and generating token by token differs from training. LossFreeRouter keeps the load even and is causal.",
        MoEWarning,
        stacklevel=3,
    )


def _generates(module: nn.Module) -> bool:
    # a causal language model of transformers
    can_generate = getattr(module, "can_generate", None)
    is_encoder_decoder = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    return callable(can_generate) and bool(can_generate()) and not is_encoder_decoder


def _human(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _idle(layer: MoELayer) -> int:
    per_expert = _count(layer.experts.parameters()) / layer.experts.num_experts
    return round(per_expert * (layer.experts.num_experts - layer.router.experts_per_token))


@torch.no_grad()
def _outputs(model: nn.Module, batch: Mapping[str, Any] | Tensor) -> Tensor:
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        out = model(**batch) if isinstance(batch, Mapping) else model(batch)
    finally:
        for module, training in was_training:
            module.training = training
    for key in ("logits", "last_hidden_state"):
        out = getattr(out, key, out)
    if not isinstance(out, Tensor):
        raise TypeError(f"batch: {type(model).__name__} returned {type(out).__name__}; wanted a tensor or `.logits`.")
    return out


def _difference(dense: Tensor, moe: Tensor) -> float:
    return float((dense.float() - moe.float()).abs().max())
