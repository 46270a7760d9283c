"""How alike the experts of each layer are: in their weights, and in what they compute for the same tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_moe.analysis.forward import domain_losses
from lightning_moe.analysis.results import LayerAnalysis
from lightning_moe.analysis.texts import Batch
from lightning_moe.experts import Experts
from lightning_moe.layer import MoELayer, moe_layers
from lightning_moe.metrics import ExpertWeightCosine, OutputCKA, OutputSimilarity, RouterRowCosine
from lightning_moe.routing import Routing

_MOST_TOKENS = 1024
# of the largest tensor in a comparison of outputs: 256 MB
_MOST_NUMBERS = 64_000_000


@torch.no_grad()
def add_similarity(
    model: nn.Module, layers: Sequence[LayerAnalysis], batches: Sequence[Batch], generator: torch.Generator
) -> list[LayerAnalysis]:
    """Adds the likeness of the experts to the analyses of the layers.

    Args:
        model: a model with MoE layers of this package.
        layers: the layers so far.
        batches: a sample of the first batch of each domain is what the experts compute on.
        generator: of what chance is compared with.
    """
    ran = {layer.name for layer in layers}
    moe = {layer.name: layer for layer in moe_layers(model).values() if layer.name in ran}
    states = _sampled_inputs(model, moe, {batch.domain: batch for batch in reversed(batches)})
    results = []
    for analysis in layers:
        layer = moe[analysis.name]
        numbers = {**_of_weights(layer), **_of_outputs(layer, states.pop(analysis.name), generator)}
        results.append(replace(analysis, **numbers))
    return results


def expert_outputs(experts: Experts, x: Float[Tensor, "T D"]) -> Float[Tensor, "E T D"]:
    """What every expert computes for every token, unweighted."""
    E, T = experts.num_experts, len(x)
    token_ids = torch.arange(T, device=x.device).repeat(E)
    expert_ids = torch.arange(E, device=x.device).repeat_interleave(T)
    every = Routing(
        token_ids, expert_ids, torch.ones(E * T, device=x.device), *x.new_zeros(2, T, E, dtype=torch.float32)
    )
    # rows come sorted by expert, and by token within one
    return experts.outputs(x, every)[0].view(E, T, -1)


def _of_weights(layer: MoELayer) -> dict[str, Any]:
    weights = ExpertWeightCosine().to(layer.experts.down_proj.device)
    weights.update(layer.experts.weights())
    rows = layer.router.gate_rows()
    cosine = None
    if rows is not None:
        metric = RouterRowCosine().to(rows.device)
        metric.update(rows)
        cosine = float(metric.compute())
    return {"weight_cosine": float(weights.compute()), "router_row_cosine": cosine}


def _sampled_inputs(
    model: nn.Module, moe: Mapping[str, MoELayer], first: Mapping[int, Batch]
) -> dict[str, Float[Tensor, "T D"]]:
    # what reaches each layer, of some tokens only: a batch of hidden states of all layers is large
    parts: dict[str, list[Tensor]] = {name: [] for name in moe}

    def keep(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, MoELayer)
        rows = given[0].detach().reshape(-1, given[0].shape[-1])
        count = max(1, _num_tokens(layer.experts) // len(first))
        # not the first ones, which are of one text
        places = torch.linspace(0, len(rows) - 1, min(count, len(rows)), device=rows.device)
        parts[layer.name].append(rows[places.long()])

    handles = [layer.register_forward_pre_hook(keep) for layer in moe.values()]
    try:
        domain_losses(model, first.values(), max(first) + 1)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in parts.items()}


def _num_tokens(experts: Experts) -> int:
    E, width = experts.num_experts, max(experts.hidden_size, 2 * experts.expert_size)
    return max(2, min(_MOST_TOKENS, _MOST_NUMBERS // (E * width), int((_MOST_NUMBERS / E) ** 0.5)))


def _of_outputs(layer: MoELayer, x: Float[Tensor, "T D"], generator: torch.Generator) -> dict[str, Any]:
    experts = layer.experts
    E = experts.num_experts
    outputs = expert_outputs(experts, x)
    cosine, cka, shuffled = OutputSimilarity(), OutputCKA(), OutputCKA()
    for metric in (cosine, cka, shuffled):
        metric.to(x.device)
    # token by token: the products of all pairs at once would take T * E^2 numbers
    for part in outputs.split(max(1, _MOST_NUMBERS // (E * E * experts.hidden_size)), dim=1):
        cosine.update(part)
    cka.update(outputs)
    orders = torch.stack([torch.randperm(len(x), generator=generator) for _ in range(E)]).to(x.device)
    shuffled.update(outputs.gather(1, orders.unsqueeze(-1).expand_as(outputs)))
    return {
        "output_cosine": float(cosine.compute()),
        "output_cka": float(cka.compute()),
        "output_cka_chance": float(shuffled.compute()),
    }
