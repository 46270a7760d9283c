"""Blocks that stay dense, for architectures that have none: equal experts compute what one FFN does."""

from dataclasses import replace

import torch
from transformers import PreTrainedModel

from lightning_moe.export_gates import Upcycled
from lightning_moe.ffn import FFNWeights
from lightning_moe.ffn_search import find_ffns
from lightning_moe.initializers import CopyInit
from lightning_moe.layer import MoELayer
from lightning_moe.routers import TopKRouter


def equal_experts(model: PreTrainedModel, found: Upcycled) -> Upcycled:
    """Takes each dense block for a MoE block whose experts are copies of its FFN, behind a gate of zeros.

    Args:
        model: what was read; it stays as it is.
        found: what was read of it.

    Raises:
        ValueError: if a token's weights do not sum to one, if there are shared experts, or if the FFN of a dense block
            is not as wide as an expert.

    Returns:
        The same, without a dense block.
    """
    gate, ffns = found.gate, find_ffns(model)
    if gate.kind != "softmax" or not gate.normalize or found.num_shared:
        raise ValueError(
            "dense_as_experts=True: equal experts are the dense FFN where a softmax's weights sum to one and there are "
            "no shared experts, which does not hold here. Upcycle all layers."
        )
    layers, gates = dict(found.layers), dict(found.gates)
    for number in found.dense:
        ffn = ffns.get(f"model.layers.{number}.mlp")
        if ffn is None or ffn.expert_size != found.layer.experts.expert_size or ffn.up_bias is not None:
            raise ValueError(
                f"dense_as_experts=True: the FFN of block {number} has not the form of an expert, of width "
                f"{found.layer.experts.expert_size} and without biases. Upcycle all layers."
            )
        layers[number] = _equal(ffn, found.layer.num_experts, gate.top_k)
        gates[number] = replace(gate, weight=torch.zeros_like(gate.weight))
    return replace(found, layers=dict(sorted(layers.items())), gates=dict(sorted(gates.items())), dense=())


def _equal(ffn: FFNWeights, num_experts: int, top_k: int) -> MoELayer:
    experts = CopyInit().new_experts(num_experts, ffn.expert_size, ffn).to_empty(device=ffn.up.device)
    with torch.no_grad():
        CopyInit()(experts, ffn, torch.Generator())
    return MoELayer(TopKRouter(ffn.hidden_size, num_experts, top_k=top_k, init_std=0.0), experts)
