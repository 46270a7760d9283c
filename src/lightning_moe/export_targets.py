"""The table of Hugging Face MoE architectures that hold an upcycled model exactly.

A row says which dense models it takes, by their ``model_type``, with which routing, and where each tensor goes. A new
target is one row. What each was measured to hold exactly is told in docs/export.md.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from lightning_moe.export_gates import Gate, Routed, Upcycled
from lightning_moe.export_tensors import (
    QWEN2_EMPTY_SHARED,
    State,
    as_it_is,
    glm4_moe_block,
    granite_block,
    mixtral_block,
    qwen2_moe_block,
    split_qkv,
    unfold_gemma,
)
from lightning_moe.layer import MoELayer


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
            if self.dense_blocks == "none":
                reasons.append(
                    f"none of its blocks can be dense, and here block {found.dense[-1]} is "
                    "(dense_as_experts=True would write equal experts there)"
                )
            else:
                reasons.append(f"only its first blocks can be dense, and here block {found.dense[-1]} is")
        return reasons

    def state(self, found: Upcycled, state: Mapping[str, Tensor]) -> State:
        """The tensors that are written, of those of the upcycled model."""
        made: State = {}
        inside = tuple(f"model.layers.{number}.mlp." for number in found.layers)
        rest = self.rest.get(found.config.model_type, as_it_is)
        for key, tensor in state.items():
            if not key.startswith(inside):
                made |= rest(found, key, tensor)
        for number, layer in found.layers.items():
            block = self.block(found.gates[number], layer)
            made |= {f"model.layers.{number}.{key}": tensor for key, tensor in block.items()}
        return made


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
    width = found.shared_size or QWEN2_EMPTY_SHARED
    return _qwen_settings(found) | {
        "shared_expert_intermediate_size": width,
        "qkv_bias": found.config.model_type == "qwen2",
    }


def _granite_settings(found: Upcycled) -> dict[str, Any]:
    settings = _common(found, "num_local_experts") | _dense_width(found)
    if found.num_shared:
        settings["shared_intermediate_size"] = found.shared_size
    if found.config.model_type == "llama":
        settings |= {"attention_multiplier": 1 / math.sqrt(found.head_dim), "embedding_multiplier": 1.0}
        settings |= {"logits_scaling": 1.0, "residual_multiplier": 1.0}
    return settings


def _sigmoid_settings(found: Upcycled) -> dict[str, Any]:
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
    }


def _glm4_settings(found: Upcycled) -> dict[str, Any]:
    return {
        **_sigmoid_settings(found),
        "num_mtp_layers": 0,
        "use_qk_norm": found.config.model_type == "qwen3",
        "attention_bias": found.config.model_type == "qwen2",
        "rope_parameters": {**found.config.rope_parameters, "partial_rotary_factor": 1.0},
    }


def _dots1_settings(found: Upcycled) -> dict[str, Any]:
    # without a window its own default would be taken; the last is what llama.cpp goes by, and no other reads
    return {
        **_sigmoid_settings(found),
        "sliding_window": found.config.sliding_window,
        "layer_types": list(found.config.layer_types),
        "scoring_func": "sigmoid",
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
    yield from _shared_fits(found)


def _shared_fits(found: Upcycled) -> Iterable[str]:
    if found.shared_size % found.layer.experts.expert_size:
        yield (
            f"its shared experts are as wide as a whole number of routed ones, and {found.shared_size} is no multiple "
            f"of {found.layer.experts.expert_size}"
        )


EXPORT_TARGETS: tuple[ExportTarget, ...] = (
    ExportTarget(
        target="mixtral",
        sources={
            "llama": _no_bias,
            "mistral": _anything,
            "phi3": _phi3_fits,
            "gemma": _gemma_fits,
            "mixtral": _anything,
        },
        routing="softmax",
        settings=_mixtral_settings,
        block=mixtral_block,
        rest={"phi3": split_qkv, "gemma": unfold_gemma},
    ),
    ExportTarget(
        target="qwen3_moe",
        sources={"qwen3": _no_window, "qwen3_moe": _anything},
        routing="softmax",
        unnormalized=True,
        dense_blocks="any",
        settings=lambda found: _qwen_settings(found) | {"head_dim": found.head_dim},
        block=mixtral_block,
    ),
    ExportTarget(
        target="flex_olmo",
        sources={"olmo2": _anything, "flex_olmo": _anything},
        routing="softmax",
        unnormalized=True,
        settings=lambda found: (
            _common(found, "num_experts") | _dense_width(found) | {"norm_topk_prob": found.gate.normalize}
        ),
        block=mixtral_block,
    ),
    ExportTarget(
        target="glm4_moe",
        sources={"llama": _glm4_fits, "qwen2": _glm4_fits, "qwen3": _glm4_fits},
        routing="sigmoid",
        shared="may",
        unnormalized=True,
        dense_blocks="leading",
        settings=_glm4_settings,
        block=glm4_moe_block,
    ),
    ExportTarget(
        target="dots1",
        sources={"qwen3": _shared_fits, "dots1": _shared_fits},
        routing="sigmoid",
        shared="may",
        unnormalized=True,
        dense_blocks="leading",
        settings=_dots1_settings,
        block=glm4_moe_block,
    ),
    ExportTarget(
        target="granitemoe",
        sources={"granite": _plain_heads},
        routing="softmax",
        settings=_granite_settings,
        block=granite_block,
    ),
    ExportTarget(
        target="granitemoeshared",
        sources={"granite": _plain_heads, "llama": _plain_heads},
        routing="softmax",
        shared="must",
        settings=_granite_settings,
        block=granite_block,
    ),
    ExportTarget(
        target="qwen2_moe",
        sources={"qwen2": _no_window, "llama": _plain_heads},
        routing="softmax",
        shared="may",
        unnormalized=True,
        dense_blocks="any",
        settings=_qwen2_settings,
        block=qwen2_moe_block,
    ),
)
