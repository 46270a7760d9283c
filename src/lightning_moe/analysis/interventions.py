"""Other routes than the router's own, for as long as a ``with`` block; after it the model is as it was."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.layer import MoELayer, RoutedLayer
from lightning_moe.metrics import chosen_experts
from lightning_moe.native import NativeMoE, routed_layers
from lightning_moe.routing import Routing

Change = Callable[[RoutedLayer, Routing], Routing]
"""Makes another routing of that of a layer."""


class NotMeasurableError(ValueError):
    """A router has no such other route."""


@contextmanager
def rerouted(model: nn.Module, change: Change) -> Iterator[None]:
    """Puts another routing in the place of every router's own, inside the ``with`` block.

    Args:
        model: a model with MoE layers, of this package or attached.
        change: what becomes of each routing.

    Example:
        >>> from lightning_moe import Experts, MoELayer, TopKRouter, record_routing
        >>> layer = MoELayer(TopKRouter(8, 4, top_k=2), Experts(4, 8, 16))
        >>> with rerouted(layer, without_best), record_routing() as window:
        ...     _ = layer(torch.randn(1, 5, 8))
        >>> int((window["moe"].weights > 0).sum())  # one of two experts is left for each token
        5
    """
    with ExitStack() as stack:
        for layer in routed_layers(model).values():
            stack.enter_context(_changed(layer, change))
        yield


@contextmanager
def tempered(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiplies the logits of every router by a factor, inside the ``with`` block.

    A layer of this package keeps its choice: weights become those of the scores of ``factor * logits``,
    ``w'_n = w_n f(factor z_n) / f(z_n)`` with the router's score function f, softmax, sigmoid or ReLU; then, of a
    router whose weights have a fixed sum, scaled to that sum. For a router that chooses by the order of its logits
    alone this is exactly the router with its logits multiplied. The router of a Hugging Face model runs with its logits
    multiplied, and chooses anew: that differs where a bias on the choice, or groups, come in.

    Args:
        model: a model with MoE layers, of this package or attached.
        factor: above 1 makes the routers surer, below 1 less sure; 1 changes nothing.

    Raises:
        NotMeasurableError: in the forward, if weights of a layer of this package do not come from such scores.
    """
    with ExitStack() as stack:
        for layer in routed_layers(model).values():
            stack.enter_context(_tempered(layer, factor))
        yield


def _tempered(layer: RoutedLayer, factor: float) -> AbstractContextManager[None]:
    if isinstance(layer, NativeMoE):
        return layer.logits_times(factor)
    return _changed(layer, partial(_with_temperature, factor))


@contextmanager
def _changed(layer: RoutedLayer, change: Change) -> Iterator[None]:
    handle = layer.reroute(partial(change, layer))
    try:
        yield
    finally:
        handle.remove()


def without_best(layer: RoutedLayer, routing: Routing) -> Routing:
    """Drops each token's expert of largest weight; the others share its weight, as far as there are others."""
    weights = routing.weights.masked_fill(_best_rows(routing), 0)
    return replace(routing, weights=_with_sum_of(routing, weights))


def with_next_best(layer: RoutedLayer, routing: Routing) -> Routing:
    """Puts in the place of each token's best expert the best one that it did not choose, at equal compute.

    The new weight is the old one times the ratio of the two scores; then the token's weights are scaled to their sum.

    Raises:
        NotMeasurableError: if the router's columns are not its experts.
    """
    if routing.choice_ids is not None:
        raise NotMeasurableError(
            f"{type(layer.router).__name__} has several choices for one expert, and no next best one"
        )
    best, scores = _best_rows(routing), routing.scores[:, : routing.num_experts]
    score, expert = scores.masked_fill(chosen_experts(routing), -torch.inf).max(-1)
    # where all experts are chosen there is no other
    score = score.clamp(min=0)[routing.token_ids]
    before = _of_rows(routing, routing.scores).clamp(min=torch.finfo(scores.dtype).tiny)
    weights = torch.where(best, routing.weights * score / before, routing.weights)
    expert_ids = torch.where(best, expert[routing.token_ids], routing.expert_ids)
    return replace(routing, expert_ids=expert_ids, weights=_with_sum_of(routing, weights))


def with_random_experts(generator: torch.Generator) -> Change:
    """Sends each token to other experts, as many and with the same weights, drawn uniformly.

    Args:
        generator: of the draws, on the CPU.
    """

    def change(layer: RoutedLayer, routing: Routing) -> Routing:
        lots = torch.rand(routing.num_tokens, routing.num_experts, generator=generator)
        order = lots.argsort(-1).to(routing.expert_ids.device)  # a permutation of the experts for each token
        is_ffn = routing.expert_ids < routing.num_experts
        drawn = order[routing.token_ids, torch.where(is_ffn, routing.expert_ids, 0)]
        return replace(routing, expert_ids=torch.where(is_ffn, drawn, routing.expert_ids))

    return change


def _with_temperature(factor: float, layer: RoutedLayer, routing: Routing) -> Routing:
    assert isinstance(layer, MoELayer)
    function = _log_score_function(routing)
    if function is None or not _weights_are_scores(routing):
        raise NotMeasurableError(f"the weights of {type(layer.router).__name__} are no function of its logits alone")
    ratio = (_of_rows(routing, function(factor * routing.logits) - function(routing.logits))).exp()
    weights = routing.weights * ratio.nan_to_num()
    return replace(routing, weights=weights if layer.router.weights_sum is None else _with_sum_of(routing, weights))


def _best_rows(routing: Routing) -> Bool[Tensor, " N"]:
    # the row of largest weight that is an FFN's, of each token; the first of equals
    computed = routing.computed()
    size = routing.weights.abs() if computed is None else routing.weights.abs().masked_fill(~computed, -1)
    best = (size == _over_tokens(routing, size, "amax")) & (size >= 0)
    rows = torch.arange(len(size), device=size.device)
    return best & (rows == _over_tokens(routing, torch.where(best, rows, len(size)), "amin"))


def _with_sum_of(routing: Routing, weights: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    # signs may differ: it is the absolute weights that keep their sum
    before, after = (_over_tokens(routing, values.abs(), "sum") for values in (routing.weights, weights))
    return torch.where(after > 0, weights * before / after.clamp(min=torch.finfo(weights.dtype).tiny), weights)


def _over_tokens(routing: Routing, values: Tensor, reduce: str) -> Tensor:
    # each token's sum or extremum, at each of its rows
    result = values.new_zeros(routing.num_tokens)
    result = result.scatter_reduce(0, routing.token_ids, values, reduce, include_self=False)
    return result[routing.token_ids]


def _of_rows(routing: Routing, values: Float[Tensor, "T choices"]) -> Float[Tensor, " N"]:
    columns = routing.expert_ids if routing.choice_ids is None else routing.choice_ids
    return values[routing.token_ids, columns]


def _log_score_function(routing: Routing) -> Callable[[Tensor], Tensor] | None:
    def log_softmax(logits: Tensor) -> Tensor:
        return F.log_softmax(logits, dim=-1)

    def log_relu(logits: Tensor) -> Tensor:
        return F.relu(logits).log()

    for function in (log_softmax, F.logsigmoid, log_relu):
        if torch.allclose(function(routing.logits).exp(), routing.scores, rtol=1e-3, atol=1e-6):
            return function
    return None


def _weights_are_scores(routing: Routing) -> bool:
    # up to a factor of each token's own, and but for what was set to zero
    ratio = routing.weights.abs() / _of_rows(routing, routing.scores).clamp(min=torch.finfo(torch.float32).tiny)
    largest = _over_tokens(routing, ratio, "amax")
    return bool(((ratio - largest).abs() <= 1e-3 * largest).logical_or(routing.weights == 0).all())
