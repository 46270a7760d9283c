"""A Mixture-of-Experts model in, one with more experts out, in place: experts and their router rows are duplicated."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_moe.calibration import Batch, as_labels, check_batches, difference, evaluating, outputs
from lightning_moe.checks import check_choice, check_not_negative, check_whole
from lightning_moe.experts import Experts
from lightning_moe.four_bit import Weight4bit
from lightning_moe.layer import MoELayer, moe_layers
from lightning_moe.losses import BalanceLoss
from lightning_moe.planning import layer_seed
from lightning_moe.receipt import Expansion, num_parameters
from lightning_moe.routers import Router
from lightning_moe.routers.base import init_arguments

# tokens of random hidden states on which routers before and after are compared: a few kB
_PROBE = 256


def expand(
    model: nn.Module,
    num_experts: int,
    *,
    method: Literal["even", "utility"] = "even",
    row_noise: float = 0.01,
    top_k: int | None = None,
    calibration: Sequence[Batch] | None = None,
    batch: Batch | None = None,
    seed: int | None = None,
) -> Expansion:
    """Gives the MoE layers of a model more experts, copies of those they have, in place; all layers or none.

    Copies of an expert, and of its row and bias in the router, stand side by side: the groups of a `LossFreeRouter`
    stay whole. Expand before the optimizer is made, which would keep the old parameters.

    With ``top_k=None`` the compute per token stays, and step 0 is *not* the same function: a token's K choices are
    copies of fewer experts (but where K is 1, and its weight always 1). It is the same with ``"even"``, ``row_noise=0``
    and ``top_k`` multiplied as the experts are, which multiplies their compute too, if the router's weights share out
    over copies, as softmax scores and normalised weights do; random hidden states, routed before and after, tell.
    Copies with equal rows tie, and where a top-k decides between them some never train: ``row_noise`` moves all but the
    first.

    Reference: Dwivedi et al., *Expert Upcycling: Shifting the Compute-Efficient Frontier of Mixture-of-Experts*, 2026,
    https://arxiv.org/abs/2604.19835. Differs from the authors' code, which has this utility among others: there only
    the first projection counts, the best experts get up to three more copies each, and the noise is on router biases.

    Args:
        model: an upcycled model.
        num_experts: experts per layer afterwards, more than now; with ``"even"`` a multiple of what there are.
        method: ``"even"`` copies each expert as often. ``"utility"`` gives each further copy, layer by layer, to the
            expert of largest ``utility / copies``; utility is the squared norm of the loss's gradient by the expert's
            weights, summed over ``calibration``, in evaluation and without balance losses.
        row_noise: standard deviation of the noise on the copies' rows, as a fraction of that of the row, >= 0. A row of
            zeros gets none.
        top_k: experts per token afterwards; None keeps it.
        calibration: mappings for ``"utility"``, for which the model's output has a ``.loss``; ``input_ids`` without
            ``labels`` become the labels, padding left out.
        batch: inputs of the model, on which its outputs before and after are compared.
        seed: what each layer's noise derives from, with its name; None takes the seed of ``seed_everything``.

    Raises:
        TypeError: if ``calibration`` is no list of batches.
        ValueError: if there is no MoE layer, an argument is out of range, a router cannot be duplicated row by row or
            refuses its arguments, a balance loss has counted experts, or ``calibration`` is missing or gives no loss.

    Example:
        >>> from lightning_moe import UpcycleConfig, upcycle
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)))
        >>> _ = upcycle(model, UpcycleConfig(num_experts=4))
        >>> expansion = expand(model, 8, top_k=4, row_noise=0.0, batch=torch.randn(3, 8))
        >>> expansion.copies, expansion.preserved, expansion.measured_difference < 1e-5
        ({'0': (2, 2, 2, 2)}, True, True)
    """
    layers = moe_layers(model)
    check_batches("calibration", calibration)
    if top_k is not None:
        check_whole(top_k=top_k)
    before = _check(layers, num_experts, method, row_noise, bool(calibration))
    plans = {name: _plan(name, layer, num_experts, top_k, method) for name, layer in layers.items()}
    copies = dict.fromkeys(layers, (num_experts // before,) * before)
    if method == "utility":
        utilities = _utilities(model, layers, calibration or ())
        copies = {name: _apportion(utilities[name].tolist(), num_experts) for name in layers}
    sources = {name: torch.arange(before).repeat_interleave(torch.tensor(copies[name])) for name in layers}
    seed = torch.initial_seed() if seed is None else seed
    parameters = num_parameters(model)
    out = torch.empty(0) if batch is None else outputs(model, batch)
    results = [_fill(plan, sources[name], row_noise, layer_seed(seed, name)) for name, plan in plans.items()]
    for name, layer in layers.items():
        layer.router = plans[name].router
        _grow(layer.experts, sources[name])
    preserved, reason = next((result for result in results if not result[0]), results[0])
    return Expansion(
        layers=tuple(layers),
        num_experts=(before, num_experts),
        copies=copies,
        parameters=(parameters, num_parameters(model)),
        preserved=preserved,
        reason=reason,
        measured_difference=None if batch is None else difference(out, outputs(model, batch)),
        seed=seed,
    )


def _check(layers: Mapping[str, MoELayer], wanted: int, method: str, row_noise: float, calibrated: bool) -> int:
    check_choice("method", method, ("even", "utility"))
    check_whole(num_experts=wanted)
    check_not_negative(row_noise=row_noise)
    if calibrated and method == "even":
        raise ValueError('method="even" has no use for calibration; leave it out, or take method="utility".')
    if not calibrated and method == "utility":
        raise ValueError('method="utility" measures gradients of the loss: give calibration=[batch, ...].')
    numbers = sorted({layer.experts.num_experts for layer in layers.values()})
    if not numbers:
        raise ValueError("The model has no MoE layer to expand; call upcycle(model, config) instead.")
    if len(numbers) > 1:
        raise ValueError(
            f"The MoE layers of the model have {' and '.join(map(str, numbers))} experts; they can be expanded only "
            "where all have as many."
        )
    before = numbers[0]
    if wanted <= before:
        raise ValueError(f"num_experts={wanted}: the model has {before} experts already; give more, as {2 * before}.")
    if method == "even" and wanted % before:
        raise ValueError(
            f'num_experts={wanted} is no multiple of the {before} that there are, and method="even" copies each as '
            f'often; give {2 * before} or {3 * before}, or take method="utility".'
        )
    return before


@dataclass(frozen=True)
class _Plan:
    layer: MoELayer
    router: Router  # of the new size, its values of no matter yet
    axes: dict[str, int | None]  # which dimension of each of its tensors counts experts
    shares: Float[Tensor, "T E"]
    top_k: int


def _plan(name: str, layer: MoELayer, num_experts: int, top_k: int | None, method: str) -> _Plan:
    router = layer.router
    if problem := _problem(layer, method):
        raise ValueError(f"{name}: {problem} Or upcycle the dense model to {num_experts} experts at once.")
    try:
        larger, axes = _larger(router, num_experts, top_k)
        if not router.learned or router.uses_token_ids or router.uses_previous_logits:
            raise ValueError("it does not choose by hidden states alone, so a copy takes over none of its original's.")
        shares, chosen = _shares(router, torch.arange(router.num_experts))
        if chosen is None:
            raise ValueError("it gives tokens no fixed number of experts, so copies would change how many compute.")
    except ValueError as error:
        kind, instead = type(router).__name__, f"Or upcycle the dense model to {num_experts} experts."
        raise ValueError(f"{name}.router: {kind} cannot be expanded: {error} {instead}") from error
    return _Plan(layer, larger, axes, shares, chosen)


def _problem(layer: MoELayer, method: str) -> str | None:
    before, own = layer.experts.num_experts, dict(layer.experts.named_parameters(recurse=False))
    if any(tensor.is_meta for tensor in layer.parameters()):
        return "its weights are on the meta device. Load them before expanding."
    if any(isinstance(weight, Weight4bit) for weight in layer.experts.projections.values()):
        return "its experts are in 4 bit. Expand first and quantise after that."
    if before == 1 and type(layer.experts) is not Experts:
        return f"of a single {type(layer.experts).__name__}, what is shared cannot be told from what is its own."
    if odd := {key: tuple(p.shape) for key, p in own.items() if p.shape[0] not in (1, before)}:
        return f"experts of shapes {odd}; wanted {before} first, or 1 for what they share."
    if method == "utility" and getattr(layer.router, "num_groups", 1) > 1:
        return 'method="utility" would move experts over the bounds of the router\'s groups; take method="even".'
    for loss in layer.balance_losses.values():
        assert isinstance(loss, BalanceLoss)
        # counts over the global batch have one more entry, for the tokens
        if any({before, before + 1} & set(state.shape) for state in loss.training_state().values()):
            return f"{type(loss).__name__} has counted {before} experts. Expand before training starts."
    return None


def _larger(router: Router, num_experts: int, top_k: int | None) -> tuple[Router, dict[str, int | None]]:
    arguments = init_arguments(router, skip=("hidden_size", "num_experts"))
    if top_k is not None:
        if "top_k" not in arguments:
            raise ValueError(f"it takes no top_k={top_k}.")
        arguments["top_k"] = top_k
    with torch.random.fork_rng(devices=[]):
        larger = type(router)(router.hidden_size, num_experts, **arguments)
    axes: dict[str, int | None] = {}
    grown, new = (router.num_experts, num_experts), larger.state_dict()
    for key, tensor in router.state_dict().items():
        shapes = tuple(tensor.shape), tuple(new.get(key, torch.empty(0)).shape)
        pairs = list(zip(*shapes, strict=False))
        different = [axis for axis, pair in enumerate(pairs) if pair[0] != pair[1]]
        if len(different) > 1 or any(pairs[axis] != grown for axis in different) or len({*map(len, shapes)}) > 1:
            raise ValueError(f"{key} of shape {shapes[0]} would be {shapes[1]}; wanted one row per expert.")
        axes[key] = different[0] if different else None
    return larger.train(router.training), axes


@torch.no_grad()
def _shares(router: Router, sources: Int[Tensor, " E"]) -> tuple[Float[Tensor, "T old"], int | None]:
    # what weight random tokens give to the copies of each old expert together, in evaluation; and K, if it is fixed
    router, device = copy.deepcopy(router).eval(), next(router.parameters()).device
    x = torch.randn(_PROBE, router.hidden_size, generator=torch.Generator().manual_seed(0)).to(device)
    routing = router(x)
    old = sources.to(device)[routing.expert_ids]
    shares = torch.zeros(_PROBE, int(sources[-1]) + 1, device=device)
    return shares.index_put_((routing.token_ids, old), routing.weights.float(), accumulate=True), routing.top_k


@torch.no_grad()
def _fill(plan: _Plan, sources: Int[Tensor, " E"], row_noise: float, seed: int) -> tuple[bool, str]:
    # gives the larger router its values; returns whether step 0 is the layer before, and why
    router, capacity = plan.router, plan.layer.capacity_factor
    for key, old in plan.layer.router.state_dict(keep_vars=True).items():
        owner, _, attribute = key.rpartition(".")
        setattr(router.get_submodule(owner), attribute, _copied(old, plan.axes[key], sources))
    # compared before the noise: do the weights share out over equal copies?
    shares, top_k = _shares(router, sources)
    generator = torch.Generator().manual_seed(seed)
    first = torch.searchsorted(sources, sources.unique())
    for key, rows in router.named_parameters():
        axis = plan.axes[key]
        if axis is not None and rows.dim() > 1 and row_noise:
            others = [dim for dim in range(rows.dim()) if dim != axis]
            scale = rows.float().std(dim=others, keepdim=True, correction=0) * row_noise
            scale.index_fill_(axis, first.to(rows.device), 0)
            rows.add_((torch.randn(rows.shape, generator=generator).to(rows.device) * scale).to(rows.dtype))
    if not torch.allclose(shares, plan.shares, rtol=1e-5, atol=1e-6):
        return False, f"a token's top_k={top_k} copies do not get what its {plan.top_k} experts got before."
    if row_noise:
        return False, f"row_noise={row_noise:g} moves the rows of the copies."
    if capacity is not None:
        return False, f"in training capacity_factor={capacity:g} drops other tokens, in evaluation none."
    return True, "for every token the copies of an expert together get the weight that it had."


def _grow(experts: Experts, sources: Int[Tensor, " E"]) -> None:
    # one tensor after the other: the peak is the result and one of them
    for key, old in list(experts.named_parameters(recurse=False)):
        if old.shape[0] == experts.num_experts:
            setattr(experts, key, _copied(old, 0, sources))
    experts.num_experts = len(sources)


def _copied(old: Tensor, axis: int | None, sources: Int[Tensor, " E"]) -> Tensor:
    new = old.detach().clone() if axis is None else old.detach().index_select(axis, sources.to(old.device))
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _apportion(utilities: Sequence[float], total: int) -> tuple[int, ...]:
    # D'Hondt over what is left when each expert has one; at a tie to the fewer copies, then to the lower number
    copies = [1] * len(utilities)
    for _ in range(total - len(copies)):
        copies[max(range(len(copies)), key=lambda e: (utilities[e] / copies[e], -copies[e], -e))] += 1
    return tuple(copies)


def _utilities(model: nn.Module, layers: Mapping[str, MoELayer], batches: Sequence[Batch]) -> dict[str, Tensor]:
    # per layer one number for each expert
    labelled = [_with_labels(number, batch) for number, batch in enumerate(batches)]
    sums = {name: torch.zeros(layer.experts.num_experts, dtype=torch.float64) for name, layer in layers.items()}
    # in the place of the model's own parameters, which may be frozen
    leaves: dict[str, Tensor] = {
        f"{name}.experts.{key}": nn.Parameter(parameter.detach())
        for name, layer in layers.items()
        for key, parameter in layer.experts.named_parameters(recurse=False)
        if parameter.shape[0] == layer.experts.num_experts
    }
    with _unbalanced(model, layers), torch.enable_grad():
        for number, batch in enumerate(labelled):
            loss = getattr(torch.func.functional_call(model, leaves, (), batch), "loss", None)
            if not isinstance(loss, Tensor) or not loss.requires_grad or not loss.isfinite():
                raise ValueError(f"calibration[{number}]: loss={loss}; wanted output.loss, finite and with a gradient.")
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for key, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    sums[key.rpartition(".experts.")[0]] += gradient.flatten(1).double().square().sum(1).cpu()
    return sums


def _with_labels(number: int, batch: Batch) -> dict[str, Any]:
    if not isinstance(batch, Mapping) or not {"labels", "input_ids"} & set(batch):
        given = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"calibration[{number}]: got {given}, wanted a mapping with labels, or with input_ids.")
    return dict(batch) if "labels" in batch else {"labels": as_labels(batch), **batch}


@contextmanager
def _unbalanced(model: nn.Module, layers: Mapping[str, MoELayer]) -> Iterator[None]:
    # in evaluation mode, without balance losses; what changes is put back
    states = [(layer, layer.balance_losses, dict(vars(layer.context))) for layer in layers.values()]
    with torch.random.fork_rng(devices={p.device.index for p in model.parameters() if p.is_cuda}), evaluating(model):
        try:
            for layer in layers.values():
                layer.balance_losses = nn.ModuleDict()
            yield
        finally:
            for layer, losses, context in states:
                layer.balance_losses = losses
                vars(layer.context).update(context)
