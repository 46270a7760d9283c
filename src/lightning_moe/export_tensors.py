"""Where the tensors of an upcycled model go in a native one: the block of each architecture, and what is around it."""

import torch
from torch import Tensor

from lightning_moe.export_gates import Gate, Upcycled
from lightning_moe.layer import MoELayer

State = dict[str, Tensor]
# a power of two that any number of devices can share out
QWEN2_EMPTY_SHARED = 128


def _experts(layer: MoELayer, prefix: str) -> State:
    first, down, _, _ = layer.experts.written_out()
    return {f"{prefix}.gate_up_proj": first.detach(), f"{prefix}.down_proj": down.detach()}


def _gate(gate: Gate, layer: MoELayer, name: str) -> State:
    return {f"{name}.weight": gate.weight.to(layer.experts.down_proj.dtype)}


def _shared_parts(layer: MoELayer, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    # several shared experts add up: side by side they are one
    assert layer.shared_experts is not None
    first, down, _, _ = (None if t is None else t.detach() for t in layer.shared_experts.written_out())
    assert first is not None
    assert down is not None
    gate, up = first.chunk(2, dim=1)
    joined = down.permute(1, 0, 2).flatten(1)
    return gate.flatten(0, 1), up.flatten(0, 1), joined * factor if factor != 1 else joined.contiguous()


def mixtral_block(gate: Gate, layer: MoELayer) -> State:
    """A gate and stacked experts: Mixtral, Qwen3-MoE, FlexOlmo."""
    return _gate(gate, layer, "mlp.gate") | _experts(layer, "mlp.experts")


def _named_shared(layer: MoELayer, prefix: str, empty_size: int, factor: float = 1.0) -> State:
    if layer.shared_experts is not None:
        parts = _shared_parts(layer, factor)
    else:
        # one that adds nothing: engines expect it, and a width of 0 is not safe in all of them
        like, hidden = layer.experts.first_proj.detach(), layer.experts.hidden_size
        gate, up = like.new_zeros(2, empty_size, hidden).unbind(0)
        parts = (gate.clone(), up.clone(), like.new_zeros(hidden, empty_size))
    names = ("gate_proj", "up_proj", "down_proj")
    return {f"{prefix}.{name}.weight": part for name, part in zip(names, parts, strict=True)}


def qwen2_moe_block(gate: Gate, layer: MoELayer) -> State:
    """Mixtral's with a shared expert behind a gate of its own, which multiplies it by one half here."""
    # The shared expert's gate is sigmoid(0) = 1/2 for every token, up to rounding: llama.cpp computes silu(x) / x,
    # which is no number at 0. This is the smallest number of float16.
    shared = _named_shared(layer, "mlp.shared_expert", QWEN2_EMPTY_SHARED, 2.0)
    half = layer.experts.first_proj.detach().new_full((1, layer.experts.hidden_size), 2.0**-24)
    return mixtral_block(gate, layer) | shared | {"mlp.shared_expert_gate.weight": half}


def granite_block(gate: Gate, layer: MoELayer) -> State:
    """Granite's, with its shared experts as one, if there are any."""
    state = _gate(gate, layer, "block_sparse_moe.router") | _experts(layer, "block_sparse_moe.experts")
    if layer.shared_experts is not None:
        gate_proj, up, down = _shared_parts(layer)
        state |= {"shared_mlp.input_linear.weight": torch.cat([gate_proj, up]), "shared_mlp.output_linear.weight": down}
    return state


def glm4_moe_block(gate: Gate, layer: MoELayer) -> State:
    """Mixtral's with a bias on the choice and a shared expert: GLM-4-MoE, dots.llm1."""
    assert gate.bias is not None
    shared = _named_shared(layer, "mlp.shared_experts", layer.experts.expert_size)
    return mixtral_block(gate, layer) | shared | {"mlp.gate.e_score_correction_bias": gate.bias}


def as_it_is(found: Upcycled, key: str, tensor: Tensor) -> State:
    """The tensor under its own name."""
    return {key: tensor}


def split_qkv(found: Upcycled, key: str, tensor: Tensor) -> State:
    """Phi-3's fused attention as three projections."""
    if not key.endswith("qkv_proj.weight"):
        return {key: tensor}
    heads, groups = found.config.num_attention_heads, found.config.num_key_value_heads
    parts = tensor.split([heads * found.head_dim, groups * found.head_dim, groups * found.head_dim])
    return {key.replace("qkv_proj", f"{name}_proj"): part for name, part in zip("qkv", parts, strict=True)}


def unfold_gemma(found: Upcycled, key: str, tensor: Tensor) -> State:
    """Gemma's norms and embedding as Mixtral multiplies by them."""
    # its norms multiply by 1 + weight, and what it embeds by the root of the width
    if key.endswith("norm.weight"):
        return {key: tensor + 1}
    if key == "model.embed_tokens.weight":
        scaled = tensor * torch.tensor(found.config.hidden_size**0.5, dtype=tensor.dtype)
        return {key: scaled, "lm_head.weight": tensor.clone()} if found.config.tie_word_embeddings else {key: scaled}
    return {} if key == "lm_head.weight" and found.config.tie_word_embeddings else {key: tensor}
