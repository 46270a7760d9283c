"""Dense model in, Mixture-of-Experts model out, in place; the one configuration."""

import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNFamily, FFNWeights, find_ffns, find_lookalikes
from lightning_moe.initializers import CopyInit, ExpertInit, RouterInit
from lightning_moe.layer import MoELayer, moe_layers
from lightning_moe.receipt import Receipt, expert_similarity, num_bytes
from lightning_moe.routers import Router, TopKRouter
from lightning_moe.routing import MoEWarning
from lightning_moe.tokens import TokenContext, takes_pixels, takes_tokens

Batch = Mapping[str, Any] | Tensor
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
    router_init: RouterInit | None = None
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


def upcycle(
    model: nn.Module,
    config: UpcycleConfig,
    *,
    batch: Batch | None = None,
    calibration: Sequence[Batch] | None = None,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> Receipt:
    """Replaces dense FFNs of a model by Mixture-of-Experts layers, in place.

    A model is upcycled as a whole or not at all: what can be refused is refused before the first FFN is touched. Then
    layer after layer is built and takes the place of its FFN, whose memory is free for the next, unless someone else
    holds it: the peak is the result and one dense FFN. An initialiser that does not work from shapes alone
    (``SplitInit(method="kmeans")`` looks at numbers) could refuse half-way, so there all layers are built before the
    first is put in. A model on the meta device becomes one on the meta device.

    Args:
        model: any module with FFNs of a known family, or of ``config.family``.
        config: what to make of it.
        batch: inputs of the model, a mapping of keyword arguments or one tensor; if given, the outputs before and after
            are compared and the receipt tells the difference.
        calibration: batches whose hidden states initialisers may look at; `CentroidRouterInit` takes each for a domain.
            None takes ``batch``.
        progress: wraps the names of the layers while they are built, as ``tqdm`` does.

    Returns:
        What was done, and how step 0 relates to the dense model.

    Raises:
        TypeError: if ``config`` is no `UpcycleConfig`, or if no FFN of a known family is found.
        ValueError: if the model is upcycled already, if ``config.layers`` matches nothing, if the router refuses its
            arguments, if an initialiser does not fit the FFNs or the router, or if it needs ``calibration``.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> model = nn.Sequential(model, nn.LayerNorm(8))
        >>> receipt = upcycle(model, UpcycleConfig(num_experts=4), batch=torch.randn(3, 8))
        >>> receipt.layers, receipt.preserved, receipt.measured_difference < 1e-6
        (('0',), True, True)
    """
    _check(model, config)
    dense = find_ffns(model, config.family)
    chosen = select_layers(list(dense), config.layers)
    seed = torch.initial_seed() if config.seed is None else config.seed
    init = CopyInit() if config.init is None else config.init
    calibration = [batch] if calibration is None and batch is not None else calibration
    inputs = _calibrate(model, {name: dense[name] for name in chosen}, (init, config.router_init), calibration)
    plans = {name: _plan(name, dense[name], config, init, seed, inputs.get(name)) for name in chosen}
    before, memory = _count(model.parameters()), num_bytes(model)
    kept = tuple(name for name in dense if name not in plans)
    left_dense = dict.fromkeys(kept, f"not chosen by layers={config.layers!r}")
    left_dense |= find_lookalikes(model, tuple(dense), config.family)
    dense_out = torch.empty(0) if batch is None else _outputs(model, batch)
    similarity = _build(model, plans, dense, inputs, progress)
    router = plans[chosen[0]].layer.router
    _warn_if_not_causal(model, router)
    after, idle = _count(model.parameters()), sum(_idle(plan.layer) for plan in plans.values())
    preserved, reason = _step_zero(router, init, config)
    return Receipt(
        layers=tuple(chosen),
        kept=kept,
        left_dense=left_dense,
        num_experts=config.num_experts,
        experts_per_token=router.experts_per_token,
        num_shared_experts=config.num_shared_experts,
        parameters=(before, after),
        active_parameters=(before, after - idle),
        memory=(memory, num_bytes(model)),
        expert_similarity=similarity,
        preserved=preserved,
        reason=reason,
        measured_difference=None if batch is None else _difference(dense_out, _outputs(model, batch)),
        seed=seed,
    )


def _check(model: nn.Module, config: Any) -> None:
    check_config(config)
    if done := moe_layers(model):
        raise ValueError(f"{type(model).__name__} is upcycled already: {next(iter(done))} is a MoE layer.")


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


@dataclass(frozen=True)
class _Plan:
    # a layer that lacks nothing but the experts' weights: they are on the meta device yet
    layer: MoELayer
    init: ExpertInit
    generator: torch.Generator
    scale: float
    shared_scale: float


def _plan(
    name: str, dense: FFNWeights, config: UpcycleConfig, init: ExpertInit, seed: int, inputs: list[Tensor] | None
) -> _Plan:
    if not name:
        raise ValueError("The model itself is one FFN; put it into a module, as nn.Sequential(ffn).")
    init = init.for_layer(name)
    generator = torch.Generator().manual_seed(_layer_seed(seed, name))
    try:
        expert_size = init.expert_size(dense.expert_size, config.num_experts)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    router = _build_router(name, dense, config, init, generator, inputs, _layer_seed(seed, name))
    experts = _build_experts(config.num_experts, expert_size, dense)
    num_shared = config.num_shared_experts
    # the shared experts together count S times, the routed ones together as often as their weights say
    weights_sum = 1.0 if router.weights_sum is None else router.weights_sum
    whole = num_shared + weights_sum
    layer = MoELayer(
        router,
        experts,
        shared_experts=_build_experts(num_shared, dense.expert_size, dense) if num_shared else None,
        capacity_factor=config.capacity_factor,
        dropout=dense.dropout,
        name=name,
    )
    for part in (layer.experts, layer.shared_experts):
        if part is not None:
            part.requires_grad_(any(source.requires_grad for _, source in dense.sources))
    scale = init.output_scale(weights_sum, config.num_experts, router.experts_per_token) * weights_sum / whole
    return _Plan(layer, init, generator, scale, 1 / whole)


def _build_router(
    name: str,
    dense: FFNWeights,
    config: UpcycleConfig,
    init: ExpertInit,
    generator: torch.Generator,
    inputs: list[Tensor] | None,
    layer_seed: int,
) -> Router:
    # The router draws from the global generator, as any module does: give it this layer's own numbers, then put the
    # global state back, so that upcycling shifts nobody else's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(layer_seed)
        router = config.router(dense.hidden_size, config.num_experts)
    if not isinstance(router, Router):
        raise TypeError(
            f"router={config.router!r} made a {type(router).__name__}, not a Router. Pass a Router class or a callable "
            "(hidden_size, num_experts) -> Router."
        )
    router = router.to(dense.up.device, dense.up.dtype)
    try:
        # without weights there are no hidden states either
        if config.router_init is not None and not (config.router_init.needs_inputs and dense.up.is_meta):
            config.router_init(router, generator, inputs)
        init.init_router(router, generator)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return router


def _build_experts(num_experts: int, expert_size: int, dense: FFNWeights) -> Experts:
    return Experts(
        num_experts,
        dense.hidden_size,
        expert_size,
        activation=dense.activation,
        gated=dense.gate is not None,
        up_bias=dense.up_bias is not None,
        down_bias=dense.down_bias is not None,
        inner_dropout=dense.inner_dropout,
        device="meta",
        dtype=dense.up.dtype,
    )


def _build(
    model: nn.Module,
    plans: Mapping[str, _Plan],
    dense: dict[str, FFNWeights],
    inputs: dict[str, list[Tensor]],
    progress: Callable[[Sequence[str]], Iterable[str]],
) -> float | None:
    # Puts the planned layers in and returns the mean similarity of their experts. A dense FFN is let go of as soon as
    # its layer stands, but where building the next one could fail.
    contexts = _share_contexts(model, {name: plan.layer for name, plan in plans.items()})
    streams = _works_from_shapes(plans, dense, inputs)
    similarities = []
    for name in progress(tuple(plans)):
        _fill(plans[name], dense[name], inputs.pop(name, None))
        similarities.append(_similarity(plans[name]))
        if streams:
            _put_in(model, name, plans[name].layer, dense.pop(name).absorbed)
    if not streams:
        for name, plan in plans.items():
            _put_in(model, name, plan.layer, dense[name].absorbed)
    for context, watched in contexts:
        context.watch(watched)
    known = [similarity for similarity in similarities if similarity is not None]
    return sum(known) / len(known) if known else None


def _similarity(plan: _Plan) -> float | None:
    # copies are alike by what they are: to read all of their weights again takes longer than writing them
    experts = plan.layer.experts
    if plan.init.copies_dense and experts.num_experts > 1 and not experts.down_proj.is_meta:
        return 1.0
    return expert_similarity(experts)


def _works_from_shapes(
    plans: Mapping[str, _Plan], dense: Mapping[str, FFNWeights], inputs: Mapping[str, list[Tensor]]
) -> bool:
    # A rehearsal on the meta device, once for each kind of FFN. What asks for numbers there fails: so whether the real
    # thing succeeds depends on shapes alone, and on there being memory.
    rehearsed = set()
    for name, plan in plans.items():
        given = {field.name: getattr(dense[name], field.name) for field in fields(FFNWeights)}
        weights: dict[str, Any] = {key: value.to("meta") for key, value in given.items() if isinstance(value, Tensor)}
        states = torch.cat([part.to("meta") for part in inputs[name]]) if name in inputs else None
        kind = (
            id(plan.init),
            *((key, value.shape) for key, value in weights.items()),
            None if states is None else states.shape,
        )
        if kind in rehearsed:
            continue
        rehearsed.add(kind)
        try:
            plan.init(plan.layer.experts, replace(dense[name], **weights), torch.Generator().manual_seed(0), states)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        except Exception:
            return False
    return True


def _fill(plan: _Plan, dense: FFNWeights, inputs: list[Tensor] | None) -> None:
    if dense.up.is_meta:
        return
    layer = plan.layer
    # the activation may have weights of its own, which stay
    layer.experts.to_empty(device=dense.up.device, recurse=False)
    plan.init(layer.experts, dense, plan.generator, None if inputs is None else torch.cat(inputs))
    _scale_output(layer.experts, plan.scale)
    if layer.shared_experts is not None:
        layer.shared_experts.to_empty(device=dense.up.device, recurse=False)
        CopyInit()(layer.shared_experts, dense, plan.generator)
        _scale_output(layer.shared_experts, plan.shared_scale)


def _put_in(model: nn.Module, name: str, layer: MoELayer, absorbed: Sequence[str]) -> None:
    _replace(model, name, layer)
    for part in absorbed:
        _replace(model, part, nn.Identity())


@torch.no_grad()
def _scale_output(experts: Experts, factor: float) -> None:
    if factor != 1:
        experts.down_proj.mul_(factor)
        if experts.down_proj_bias is not None:
            experts.down_proj_bias.mul_(factor)


def _calibrate(
    model: nn.Module,
    dense: Mapping[str, FFNWeights],
    parts: Sequence[ExpertInit | RouterInit | None],
    batches: Sequence[Batch] | None,
) -> dict[str, list[Tensor]]:
    # what the initialisers that look at hidden states get to see
    needy = [part for part in parts if part is not None and part.needs_inputs]
    if not needy or next(iter(dense.values())).up.is_meta:
        return {}
    if not batches:
        raise ValueError(
            f"{type(needy[0]).__name__} looks at hidden states of the model: give upcycle(..., calibration=[batch, "
            "...]) some batches. With a Trainer, call it before fit; MoEUpcycleCallback leaves an upcycled model as it "
            "is."
        )
    return _hidden_states(model, list(dense), batches)


@torch.no_grad()
def _hidden_states(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, list[Tensor]]:
    # the hidden states that reach each FFN, padding left out, one tensor for each batch
    collected: dict[str, list[Tensor]] = {name: [] for name in names}
    mask: Tensor | None = None

    def keep(name: str, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        if mask is not None and mask.numel() == len(rows):
            rows = rows[mask.reshape(-1).bool()]
        collected[name].append(rows)

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: keep(name, given[0]))
        for name in names
    ]
    try:
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            _outputs(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return collected


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
        # A vision tower ends the search, as its patches must not meet the text's padding mask; and so does a model of
        # both, whose text has a model of its own inside.
        home = next((path for path in ancestors if takes_tokens(modules[path]) or takes_pixels(modules[path])), None)
        if home is not None and takes_pixels(modules[home]):
            home = None
        layer.context = contexts.setdefault(home, TokenContext())
        members.setdefault(home, []).append(layer)
    for group in members.values():
        for position, layer in enumerate(group):
            layer.position, layer.is_last = position, layer is group[-1]
    return [(context, modules[path]) for path, context in contexts.items() if path is not None]


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    # a module used in several places is replaced in all of them
    dense = model.get_submodule(name)
    layer.train(dense.training)
    for parent in list(model.modules()):
        # _modules and not named_children(): that names a child once, which a parent may have under two names
        for child_name, child in list(parent._modules.items()):
            if child is dense:
                setattr(parent, child_name, layer)


def _step_zero(router: Router, init: ExpertInit, config: UpcycleConfig) -> tuple[bool, str]:
    kept, reason = init.step_zero(router)
    if not kept:
        return False, f"{reason}."
    name = type(router).__name__
    if router.weights_sum is None:
        return False, (
            f"{reason}, but the weights of {name} do not sum to one, nor to the same for every token, so each FFN's "
            "output is scaled by their sum."
        )
    if config.capacity_factor is not None:
        return False, (
            f"{reason}, but with capacity_factor={config.capacity_factor:g} tokens are dropped in training; in "
            "evaluation it is the dense model."
        )
    shared = f", beside {config.num_shared_experts} shared" if config.num_shared_experts else ""
    if shared or router.weights_sum != 1:
        return True, f"{reason}{shared}, scaled by what all weights sum to."
    return True, f"{reason} and the weights of {name} sum to one."


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


def _count(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _idle(layer: MoELayer) -> int:
    per_expert = _count(layer.experts.parameters()) / layer.experts.num_experts
    return round(per_expert * (layer.experts.num_experts - layer.router.experts_per_token))


@torch.no_grad()
def _outputs(model: nn.Module, batch: Batch) -> Tensor:
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
