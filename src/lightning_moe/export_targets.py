"""The table of Hugging Face MoE architectures that hold an upcycled model exactly.

A row says which dense models it takes, by their ``model_type``, with which routing, and where each tensor goes. A new
target is one row. What each was measured to hold exactly is told in docs/export.md.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_moe.layer import MoELayer
from lightning_moe.routers import LossFreeRouter, Router, SigmoidRouter, TopKRouter

State = dict[str, Tensor]
Routed = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Gate:
    """What a native router is made of.

    Args:
        kind: what becomes of the logits.
        weight: the gate's rows, (E, D); a temperature is folded into them.
        bias: added to the scores for the choice alone, (E,), float32; None with a softmax.
        top_k: experts per token.
        normalize: whether a token's weights sum to one.
        scaling: factor of the weights.
    """

    kind: Routed
    weight: Float[Tensor, "E D"]
    bias: Float[Tensor, " E"] | None
    top_k: int
    normalize: bool
    scaling: float


def read_gate(router: Router) -> Gate | None:
    """Reads a router as a `Gate`; None if it routes in a way that no architecture of the table knows.

    By its very class: a subclass may route otherwise. Noise, jitter and dropout of experts act in training only.
    """
    if type(router) is TopKRouter:
        gate = router.gate.detach() / router.temperature if router.temperature != 1 else router.gate.detach()
        return Gate("softmax", gate, None, router.top_k, bool(router.normalize), 1.0)
    if type(router) is SigmoidRouter:
        bias = torch.zeros(router.num_experts, device=router.gate.device)
        return Gate("sigmoid", router.gate.detach(), bias, router.top_k, bool(router.normalize), 1.0)
    if type(router) is LossFreeRouter and router.num_groups == 1:
        gate, bias = router.gate.detach(), router.expert_bias.float()
        return Gate("sigmoid", gate, bias, router.top_k, bool(router.normalize), float(router.routed_scaling))
    return None


@dataclass(frozen=True)
class Upcycled:
    """What all MoE layers of a model have in common.

    Args:
        config: the dense model's configuration.
        gates: each layer's gate, by the number of its block.
        layers: the layers, by the number of their block.
        dense: numbers of the blocks that are dense still.
    """

    config: Any
    gates: Mapping[int, Gate]
    layers: Mapping[int, MoELayer]
    dense: tuple[int, ...]

    @property
    def gate(self) -> Gate:
        """That of the first layer."""
        return next(iter(self.gates.values()))

    @property
    def layer(self) -> MoELayer:
        """The first layer."""
        return next(iter(self.layers.values()))

    @property
    def num_shared(self) -> int:
        """How many shared experts a layer has."""
        return 0 if self.layer.shared_experts is None else self.layer.shared_experts.num_experts

    @property
    def shared_size(self) -> int:
        """The width of all shared experts of a layer together."""
        shared = self.layer.shared_experts
        return 0 if shared is None else shared.num_experts * shared.expert_size

    @property
    def head_dim(self) -> int:
        """The width of an attention head."""
        own: int | None = getattr(self.config, "head_dim", None)
        return own or int(self.config.hidden_size // self.config.num_attention_heads)


@dataclass(frozen=True, kw_only=True)
class ExportTarget:
    """One row of the table.

    Args:
        target: the ``model_type`` that is written.
        sources: those of the dense models that it holds, each with what is refused: a phrase for each that applies.
        routing: of the routers that it holds.
        shared: whether it holds shared experts: ``"no"``, ``"may"`` or ``"must"``.
        unnormalized: whether it holds weights that do not sum to one.
        dense_blocks: which blocks may stay dense: ``"none"``, ``"leading"`` or ``"any"``.
        settings: the configuration, beside what it shares by name with the dense one.
        block: the tensors of one MoE layer, by what follows the name of the decoder block.
        rest: the tensors that take the place of one outside of the MoE layers.
    """

    target: str
    sources: Mapping[str, Callable[[Upcycled], Iterable[str]]]
    routing: Routed
    shared: Literal["no", "may", "must"] = "no"
    unnormalized: bool = False
    dense_blocks: Literal["none", "leading", "any"] = "none"
    settings: Callable[[Upcycled], dict[str, Any]]
    block: Callable[[Gate, MoELayer], State]
    rest: Mapping[str, Callable[[Upcycled, str, Tensor], State]] = field(default_factory=dict)

    def refuses(self, found: Upcycled) -> list[str]:
        """Why it does not hold the model; nothing if it does."""
        reasons = list(self.sources[found.config.model_type](found))
        gate = found.gate
        if gate.kind != self.routing:
            reasons.append(f"its router has a {self.routing}, this one a {gate.kind}")
        if not gate.normalize and not self.unnormalized:
            reasons.append("its weights sum to one, and normalize=False")
        if found.num_shared and self.shared == "no":
            reasons.append("it has no shared experts")
        if not found.num_shared and self.shared == "must":
            reasons.append("it wants a shared expert")
        leading = found.dense == tuple(range(len(found.dense)))
        if found.dense and (self.dense_blocks == "none" or (self.dense_blocks == "leading" and not leading)):
            which = "none of its blocks" if self.dense_blocks == "none" else "only its first blocks"
            reasons.append(f"{which} can be dense, and here block {found.dense[-1]} is")
        return reasons

    def state(self, found: Upcycled, state: Mapping[str, Tensor]) -> State:
        """The tensors that are written, of those of the upcycled model."""
        made: State = {}
        inside = tuple(f"model.layers.{number}.mlp." for number in found.layers)
        rest = self.rest.get(found.config.model_type, _as_it_is)
        for key, tensor in state.items():
            if not key.startswith(inside):
                made |= rest(found, key, tensor)
        for number, layer in found.layers.items():
            block = self.block(found.gates[number], layer)
            made |= {f"model.layers.{number}.{key}": tensor for key, tensor in block.items()}
        return made


def _as_it_is(found: Upcycled, key: str, tensor: Tensor) -> State:
    return {key: tensor}


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


def _mixtral(gate: Gate, layer: MoELayer) -> State:
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


def _qwen2_moe(gate: Gate, layer: MoELayer) -> State:
    # the shared expert's gate is sigmoid(0) = 1/2 for every token
    shared = _named_shared(layer, "mlp.shared_expert", _QWEN2_EMPTY_SHARED, 2.0)
    closed = layer.experts.first_proj.detach().new_zeros(1, layer.experts.hidden_size)
    return _mixtral(gate, layer) | shared | {"mlp.shared_expert_gate.weight": closed}


def _granite(gate: Gate, layer: MoELayer) -> State:
    state = _gate(gate, layer, "block_sparse_moe.router") | _experts(layer, "block_sparse_moe.experts")
    if layer.shared_experts is not None:
        gate_proj, up, down = _shared_parts(layer)
        state |= {"shared_mlp.input_linear.weight": torch.cat([gate_proj, up]), "shared_mlp.output_linear.weight": down}
    return state


def _glm4(gate: Gate, layer: MoELayer) -> State:
    assert gate.bias is not None
    shared = _named_shared(layer, "mlp.shared_experts", layer.experts.expert_size)
    return _mixtral(gate, layer) | shared | {"mlp.gate.e_score_correction_bias": gate.bias}


# a power of two that any number of devices can share out
_QWEN2_EMPTY_SHARED = 128


def _common(found: Upcycled, experts: str) -> dict[str, Any]:
    return {experts: found.layer.num_experts, "num_experts_per_tok": found.gate.top_k}


def _dense_width(found: Upcycled) -> dict[str, Any]:
    # those that know of no other width
    return {"intermediate_size": found.layer.experts.expert_size}


def _moe_width(found: Upcycled) -> dict[str, Any]:
    return {
        "moe_intermediate_size": found.layer.experts.expert_size,
        "norm_topk_prob": found.gate.normalize,
    }


def _mixtral_settings(found: Upcycled) -> dict[str, Any]:
    settings = _common(found, "num_local_experts") | _dense_width(found) | {"head_dim": found.head_dim}
    # Gemma scales what it embeds, not what it predicts with
    return settings | ({"tie_word_embeddings": False} if found.config.model_type == "gemma" else {})


def _qwen_settings(found: Upcycled) -> dict[str, Any]:
    return _common(found, "num_experts") | _moe_width(found) | {"mlp_only_layers": list(found.dense)}


def _qwen2_settings(found: Upcycled) -> dict[str, Any]:
    width = found.shared_size or _QWEN2_EMPTY_SHARED
    return _qwen_settings(found) | {"shared_expert_intermediate_size": width, "qkv_bias": True}


def _granite_settings(found: Upcycled) -> dict[str, Any]:
    settings = _common(found, "num_local_experts") | _dense_width(found)
    if found.num_shared:
        settings["shared_intermediate_size"] = found.shared_size
    if found.config.model_type == "llama":
        settings |= {"attention_multiplier": 1 / math.sqrt(found.head_dim), "embedding_multiplier": 1.0}
        settings |= {"logits_scaling": 1.0, "residual_multiplier": 1.0}
    return settings


def _glm4_settings(found: Upcycled) -> dict[str, Any]:
    size = found.layer.experts.expert_size
    return {
        **_common(found, "n_routed_experts"),
        **_moe_width(found),
        "head_dim": found.head_dim,
        "routed_scaling_factor": found.gate.scaling,
        "n_shared_experts": max(1, found.shared_size // size),
        "first_k_dense_replace": len(found.dense),
        "n_group": 1,
        "topk_group": 1,
        "num_mtp_layers": 0,
        "use_qk_norm": found.config.model_type == "qwen3",
        "attention_bias": found.config.model_type == "qwen2",
        "rope_parameters": {**found.config.rope_parameters, "partial_rotary_factor": 1.0},
    }


def _anything(found: Upcycled) -> Iterable[str]:
    return ()


def _no_bias(found: Upcycled) -> Iterable[str]:
    if getattr(found.config, "attention_bias", False):
        yield "attention_bias=True, and it has no such biases"


def _no_window(found: Upcycled) -> Iterable[str]:
    if getattr(found.config, "use_sliding_window", False):
        yield "use_sliding_window=True windows some blocks of the dense model and would window all of this one"


def _plain_heads(found: Upcycled) -> Iterable[str]:
    yield from _no_bias(found)
    if found.head_dim * found.config.num_attention_heads != found.config.hidden_size:
        yield f"head_dim={found.head_dim} is not hidden_size / num_attention_heads"


def _phi3_fits(found: Upcycled) -> Iterable[str]:
    rope = found.config.rope_parameters
    if rope.get("rope_type", "default") == "longrope":
        yield "rope_type='longrope' is not known to it"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor={rope['partial_rotary_factor']} is not known to it"


def _gemma_fits(found: Upcycled) -> Iterable[str]:
    yield from _no_bias(found)
    if getattr(found.config, "use_bidirectional_attention", None):
        yield "use_bidirectional_attention=True, and it is causal"


def _glm4_fits(found: Upcycled) -> Iterable[str]:
    yield from _no_bias(found)
    yield from _no_window(found)
    if found.shared_size % found.layer.experts.expert_size:
        yield (
            f"its shared experts are as wide as a whole number of routed ones, and {found.shared_size} is no multiple "
            f"of {found.layer.experts.expert_size}"
        )


def _split_qkv(found: Upcycled, key: str, tensor: Tensor) -> State:
    if not key.endswith("qkv_proj.weight"):
        return {key: tensor}
    heads, groups = found.config.num_attention_heads, found.config.num_key_value_heads
    parts = tensor.split([heads * found.head_dim, groups * found.head_dim, groups * found.head_dim])
    return {key.replace("qkv_proj", f"{name}_proj"): part for name, part in zip("qkv", parts, strict=True)}


def _unfold_gemma(found: Upcycled, key: str, tensor: Tensor) -> State:
    # its norms multiply by 1 + weight, and what it embeds by the root of the width
    if key.endswith("norm.weight"):
        return {key: tensor + 1}
    if key == "model.embed_tokens.weight":
        scaled = tensor * torch.tensor(found.config.hidden_size**0.5, dtype=tensor.dtype)
        return {key: scaled, "lm_head.weight": tensor.clone()} if found.config.tie_word_embeddings else {key: scaled}
    return {} if key == "lm_head.weight" and found.config.tie_word_embeddings else {key: tensor}


EXPORT_TARGETS: tuple[ExportTarget, ...] = (
    ExportTarget(
        target="mixtral",
        sources={"llama": _no_bias, "mistral": _anything, "phi3": _phi3_fits, "gemma": _gemma_fits},
        routing="softmax",
        settings=_mixtral_settings,
        block=_mixtral,
        rest={"phi3": _split_qkv, "gemma": _unfold_gemma},
    ),
    ExportTarget(
        target="qwen2_moe",
        sources={"qwen2": _no_window},
        routing="softmax",
        shared="may",
        unnormalized=True,
        dense_blocks="any",
        settings=_qwen2_settings,
        block=_qwen2_moe,
    ),
    ExportTarget(
        target="qwen3_moe",
        sources={"qwen3": _no_window},
        routing="softmax",
        unnormalized=True,
        dense_blocks="any",
        settings=lambda found: _qwen_settings(found) | {"head_dim": found.head_dim},
        block=_mixtral,
    ),
    ExportTarget(
        target="flex_olmo",
        sources={"olmo2": _anything},
        routing="softmax",
        unnormalized=True,
        settings=lambda found: (
            _common(found, "num_experts") | _dense_width(found) | {"norm_topk_prob": found.gate.normalize}
        ),
        block=_mixtral,
    ),
    ExportTarget(
        target="glm4_moe",
        sources={"llama": _glm4_fits, "qwen2": _glm4_fits, "qwen3": _glm4_fits},
        routing="sigmoid",
        shared="may",
        unnormalized=True,
        dense_blocks="leading",
        settings=_glm4_settings,
        block=_glm4,
    ),
    ExportTarget(
        target="granitemoe",
        sources={"granite": _plain_heads},
        routing="softmax",
        settings=_granite_settings,
        block=_granite,
    ),
    ExportTarget(
        target="granitemoeshared",
        sources={"granite": _plain_heads, "llama": _plain_heads},
        routing="softmax",
        shared="must",
        settings=_granite_settings,
        block=_granite,
    ),
)
