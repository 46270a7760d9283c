"""How alike the experts of each layer are: in their weights, and in what they compute for the same tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_moe.analysis.forward import domain_losses
from lightning_moe.analysis.results import LayerAnalysis
from lightning_moe.analysis.texts import Batch
from lightning_moe.layer import RoutedLayer
from lightning_moe.metrics import ExpertWeightCosine, OutputCKA, OutputSimilarity, RouterRowCosine
from lightning_moe.native import routed_layers

_MOST_TOKENS = 1024
# of the largest tensor in a comparison of outputs: 256 MB
_MOST_NUMBERS = 64_000_000


@torch.no_grad()
def add_similarity(
    model: nn.Module, layers: Sequence[LayerAnalysis], batches: Sequence[Batch], generator: torch.Generator
) -> list[LayerAnalysis]:
    """Adds the likeness of the experts to the analyses of the layers.

    Args:
        model: a model with MoE layers, of this package or attached.
        layers: the layers so far.
        batches: a sample of the first batch of each domain is what the experts compute on.
        generator: of what chance is compared with.
    """
    ran = {layer.name for layer in layers}
    moe = {layer.name: layer for layer in routed_layers(model).values() if layer.name in ran}
    states = _sampled_inputs(model, moe, {batch.domain: batch for batch in reversed(batches)})
    results = []
    for analysis in layers:
        layer = moe[analysis.name]
        numbers: dict[str, Any] = {**_of_weights(layer), **_of_outputs(layer, states.pop(analysis.name), generator)}
        results.append(replace(analysis, **numbers))
    return results


def _of_weights(layer: RoutedLayer) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {"weight_cosine": None, "router_row_cosine": None}
    if stacked := layer.expert_weights():
        weights = ExpertWeightCosine().to(stacked[0].device)
        weights.update(stacked)
        numbers["weight_cosine"] = float(weights.compute())
    if (rows := layer.gate_rows()) is not None:
        metric = RouterRowCosine().to(rows.device)
        metric.update(rows)
        numbers["router_row_cosine"] = float(metric.compute())
    return numbers


def _sampled_inputs(
    model: nn.Module, moe: Mapping[str, RoutedLayer], first: Mapping[int, Batch]
) -> dict[str, Float[Tensor, "T D"]]:
    # what reaches each layer, of some tokens only: a batch of hidden states of all layers is large
    parts: dict[str, list[Tensor]] = {name: [] for name in moe}

    def keep(name: str, count: int, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        rows = given[0].detach().reshape(-1, given[0].shape[-1])
        # not the first ones, which are of one text
        places = torch.linspace(0, len(rows) - 1, min(count, len(rows)), device=rows.device)
        parts[name].append(rows[places.long()])

    counts = {name: max(1, _num_tokens(layer) // len(first)) for name, layer in moe.items()}
    handles = [
        layer.entrance.register_forward_pre_hook(partial(keep, name, counts[name])) for name, layer in moe.items()
    ]
    try:
        domain_losses(model, first.values(), max(first) + 1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in parts.items()}


def _num_tokens(layer: RoutedLayer) -> int:
    E, rows = layer.num_experts, layer.gate_rows()
    shapes = [weight.shape for weight in layer.expert_weights()] + ([] if rows is None else [rows.shape])
    width = max((size for shape in shapes for size in shape[1:]), default=1)
    return max(2, min(_MOST_TOKENS, _MOST_NUMBERS // (E * width), int((_MOST_NUMBERS / E) ** 0.5)))


def _of_outputs(layer: RoutedLayer, x: Float[Tensor, "T D"], generator: torch.Generator) -> dict[str, float]:
    E, outputs = layer.num_experts, layer.expert_outputs(x)
    cosine, cka, shuffled = OutputSimilarity(), OutputCKA(), OutputCKA()
    for metric in (cosine, cka, shuffled):
        metric.to(x.device)
    # token by token: the products of all pairs at once would take T * E^2 numbers
    for part in outputs.split(max(1, _MOST_NUMBERS // (E * E * outputs.shape[-1])), dim=1):
        cosine.update(part)
    cka.update(outputs)
    orders = torch.stack([torch.randperm(len(x), generator=generator) for _ in range(E)]).to(x.device)
    shuffled.update(outputs.gather(1, orders.unsqueeze(-1).expand_as(outputs)))
    return {
        "output_cosine": float(cosine.compute()),
        "output_cka": float(cka.compute()),
        "output_cka_chance": float(shuffled.compute()),
    }
