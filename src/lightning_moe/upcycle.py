"""Dense model in, Mixture-of-Experts model out, in place."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_moe.calibration import Batch, calibrate, check_batch, check_batches, difference, generates, outputs
from lightning_moe.config import UpcycleConfig, check_config, select_layers
from lightning_moe.ffn import FFNWeights
from lightning_moe.ffn_search import find_ffns, find_lookalikes
from lightning_moe.initializers import CopyInit, ExpertInit, FFNStates
from lightning_moe.layer import MoELayer, moe_layers
from lightning_moe.native import native_blocks
from lightning_moe.planning import LayerPlan, check_sizes, plan_layer
from lightning_moe.receipt import Receipt, num_bytes, num_parameters
from lightning_moe.routers import Router
from lightning_moe.routing import MoEWarning
from lightning_moe.tokens import TokenContext, text_model_around


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
    first is put in. Parts of a model may be upcycled one after the other, each with a configuration of its own whose
    ``layers`` are named. A model on the meta device becomes one on the meta device.

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
        TypeError: if ``config`` is no `UpcycleConfig`, ``batch`` no inputs, ``calibration`` no list of these, or if no
            FFN of a known family is found.
        ValueError: if all layers are to be upcycled and some are MoE already, if ``config.layers`` matches nothing, if
            the router refuses its arguments, if an initialiser does not fit the FFNs or the router, or if it needs
            ``calibration``.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> model = nn.Sequential(model, nn.LayerNorm(8))
        >>> receipt = upcycle(model, UpcycleConfig(num_experts=4), batch=torch.randn(3, 8))
        >>> receipt.layers, receipt.preserved, receipt.measured_difference < 1e-6
        (('0',), True, True)
    """
    _check(model, config)
    check_batches("calibration", calibration)
    if batch is not None:
        check_batch("batch", batch)
    dense = find_ffns(model, config.family)
    chosen = select_layers(list(dense), config.layers)
    seed = torch.initial_seed() if config.seed is None else config.seed
    init = CopyInit() if config.init is None else config.init
    calibration = [batch] if calibration is None and batch is not None else calibration
    for name in chosen:
        # before anything is loaded or looked at
        check_sizes(name, dense[name], config, init.for_layer(name))
    init = init.for_model(model, chosen, config.family)
    states = calibrate(model, {name: dense[name] for name in chosen}, (init, config.router_init), calibration)
    plans = {name: plan_layer(name, dense[name], config, init, seed, states.get(name)) for name in chosen}
    before, trainable, memory = num_parameters(model), num_parameters(model, trainable=True), num_bytes(model)
    kept = tuple(name for name in dense if name not in plans)
    left_dense = dict.fromkeys(kept, f"not chosen by layers={config.layers!r}")
    left_dense |= find_lookalikes(model, tuple(dense), config.family)
    dense_out = torch.empty(0) if batch is None else outputs(model, batch)
    similarity = _build(model, plans, dense, states, progress)
    init.finish(model)
    router = plans[chosen[0]].layer.router
    _warn_if_not_causal(model, router)
    after, idle = num_parameters(model), sum(_idle(plan.layer) for plan in plans.values())
    preserved, reason = _step_zero(router, init, config)
    return Receipt(
        layers=tuple(chosen),
        kept=kept,
        left_dense=left_dense,
        num_experts=config.num_experts,
        experts_per_token=router.experts_per_token,
        num_shared_experts=config.num_shared_experts,
        parameters=(before, after),
        trainable_parameters=(trainable, num_parameters(model, trainable=True)),
        active_parameters=(before, after - idle),
        memory=(memory, num_bytes(model)),
        expert_similarity=similarity,
        preserved=preserved,
        reason=reason,
        measured_difference=None if batch is None else difference(dense_out, outputs(model, batch)),
        seed=seed,
    )


def _check(model: nn.Module, config: Any) -> None:
    check_config(config)
    done = moe_layers(model)
    if done and config.layers == "all":
        raise ValueError(
            f"{type(model).__name__} is upcycled already: {next(iter(done))} is a MoE layer. For a part of it that is "
            'still dense, name the layers, as layers="*vision_tower*".'
        )
    if config.layers == "all" and (blocks := native_blocks(model)):
        raise ValueError(
            f"{type(model).__name__} is a Mixture of Experts already: {blocks[0]} is a block of it. "
            "BalanceLossCallback, ExpertBiasCallback and ExpertUtilizationCallback serve it without upcycling, see "
            "docs/native.md. "
            'For FFNs of it that are dense, name the layers, as layers="*vision_tower*".'
        )


def _build(
    model: nn.Module,
    plans: Mapping[str, LayerPlan],
    dense: dict[str, FFNWeights],
    states: dict[str, FFNStates],
    progress: Callable[[Sequence[str]], Iterable[str]],
) -> float | None:
    # Puts the planned layers in and returns the mean similarity of their experts. A dense FFN is let go of as soon as
    # its layer stands, but where building the next one could fail.
    contexts = share_contexts(model, {name: plan.layer for name, plan in plans.items()})
    streams = _works_from_shapes(plans, dense, states)
    similarities = []
    for name in progress(tuple(plans)):
        plans[name].fill(dense[name], states.pop(name, None))
        similarities.append(plans[name].similarity())
        if streams:
            _put_in(model, name, plans[name].layer, dense.pop(name).absorbed)
    if not streams:
        for name, plan in plans.items():
            _put_in(model, name, plan.layer, dense[name].absorbed)
    for context, watched in contexts:
        context.watch(watched)
    known = [similarity for similarity in similarities if similarity is not None]
    return sum(known) / len(known) if known else None


def _works_from_shapes(
    plans: Mapping[str, LayerPlan], dense: Mapping[str, FFNWeights], states: Mapping[str, FFNStates]
) -> bool:
    # A rehearsal on the meta device, once for each kind of FFN. What asks for numbers there fails: so whether the real
    # thing succeeds depends on shapes alone, and on there being memory.
    rehearsed = set()
    for name, plan in plans.items():
        parts = {field.name: getattr(dense[name], field.name) for field in fields(FFNWeights)}
        weights: dict[str, Any] = {key: value.to("meta") for key, value in parts.items() if isinstance(value, Tensor)}
        given = states.get(name)
        kind = (
            id(plan.init),
            *((key, value.shape) for key, value in weights.items()),
            None if given is None else tuple(batch.shape for batch in given.batches),
        )
        if kind in rehearsed:
            continue
        rehearsed.add(kind)
        layer, generator = plan.layer, torch.Generator().manual_seed(0)
        rehearsal = (replace(dense[name], **weights), generator, None if given is None else given.to("meta"))
        try:
            plan.init(layer.experts, *rehearsal)
            if layer.shared_experts is not None:
                plan.init.fill_shared(layer.shared_experts, *rehearsal)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        except Exception:
            return False
    return True


def _put_in(model: nn.Module, name: str, layer: MoELayer, absorbed: Sequence[str]) -> None:
    _replace(model, name, layer)
    for part in absorbed:
        _replace(model, part, nn.Identity())


def share_contexts(model: nn.Module, layers: Mapping[str, MoELayer]) -> list[tuple[TokenContext, nn.Module]]:
    """Gives each layer the context of the innermost text model around it, which it shares with the others there.

    Returns:
        The contexts, and what each is to watch once the layers are in.
    """
    contexts: dict[str | None, TokenContext] = {}
    members: dict[str | None, list[MoELayer]] = {}
    modules = dict(model.named_modules())
    for name, layer in layers.items():
        home = text_model_around(modules, name)
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
    if init.routes_nothing:
        if type(router).zero_computation is Router.zero_computation:
            return True, f"{reason}."
        return False, f"{reason}, but {name} has choices that compute without an expert."
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
    if router.causal or not any(generates(module) for module in model.modules()):
        return
    warnings.warn(
        f"{type(router).__name__} lets a token's routing depend on later tokens (causal = False), and "
        f"{type(model).__name__} is a causal language model: in training it sees a little of what it is to predict, "
        "and generating token by token differs from training. LossFreeRouter keeps the load even and is causal.",
        MoEWarning,
        stacklevel=3,
    )


def _idle(layer: MoELayer) -> int:
    return round(layer.experts.parameters_per_expert * (layer.experts.num_experts - layer.router.experts_per_token))
