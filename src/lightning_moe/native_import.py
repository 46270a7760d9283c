"""Makes the MoE blocks that a Hugging Face model brings itself our own layers, where these compute the same."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_moe.calibration import difference, evaluating
from lightning_moe.experts import Experts
from lightning_moe.ffn_search import find_ffns
from lightning_moe.initializers import CopyInit
from lightning_moe.layer import MoELayer
from lightning_moe.native import NativeMoE, attach_native, detach_native
from lightning_moe.native_routers import sigmoid_scores, softmax_scores
from lightning_moe.routers import LossFreeRouter, Router, TopKRouter
from lightning_moe.routing import unobserved
from lightning_moe.upcycle import share_contexts

_INSTEAD = "The callbacks serve the model as it is, see docs/native.md."
# of the largest output, or of 1 where that is larger
_EXACT = 1e-4


def import_native(model: nn.Module) -> tuple[str, ...]:
    """Replaces the MoE blocks of a Hugging Face model by `MoELayer`, in place; the weights are the same parameters.

    Blocks of Mixtral, Qwen3-MoE, OLMoE, FlexOlmo become layers with a `TopKRouter`; of DeepSeek-V3, GLM-4-MoE and
    dots.llm1, with groups or without, with a `LossFreeRouter`. In float32 each layer is compared with its block on
    random states before any is replaced. `save_moe` and `export_to_hf` write the model; its own ``save_pretrained``
    would use names that its class does not know.

    Args:
        model: holds blocks of its own.

    Returns:
        The names of the blocks.

    Raises:
        ValueError: if there is no such block, or one that is not exactly one of our layers; nothing is changed then.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(
        ...     hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        ...     vocab_size=11, num_local_experts=4, bos_token_id=None, eos_token_id=None,
        ... )
        >>> model = MixtralForCausalLM(config)
        >>> import_native(model)
        ('model.layers.0.mlp',)
        >>> type(model.model.layers[0].mlp.router).__name__
        'TopKRouter'
    """
    found = attach_native(model)
    detach_native(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no MoE blocks whose router is known. {_INSTEAD}")
    layers = {name: _layer(name, native, _same_router) for name, native in found.items()}
    for name, layer in layers.items():
        _compare(name, found[name], layer)
    _put_in(model, layers)
    return tuple(layers)


def replace_native(model: nn.Module, routers: Mapping[str, Callable[[int, int], Router]]) -> None:
    """Replaces the blocks of these names, for weights that are still to be loaded, with routers of these kinds."""
    found = attach_native(model)
    detach_native(model)

    def layer(name: str) -> MoELayer:
        def router(name: str, native: NativeMoE) -> Router:
            num_experts, hidden_size = native.gate_rows().shape
            like = native.experts.get_parameter("down_proj")
            return routers[name](hidden_size, num_experts).to(like.device, like.dtype)

        return _layer(name, found[name], router)

    _put_in(model, {name: layer(name) for name in routers})


def _put_in(model: nn.Module, layers: Mapping[str, MoELayer]) -> None:
    contexts = share_contexts(model, layers)
    for name, layer in layers.items():
        layer.train(model.get_submodule(name).training)
        model.set_submodule(name, layer)
    for context, watched in contexts:
        context.watch(watched)


def _layer(name: str, native: NativeMoE, router: Callable[[str, NativeMoE], Router]) -> MoELayer:
    kind, own = type(native.block).__name__, dict(native.experts.named_parameters())
    activation: Any = getattr(native.experts, "act_fn", None)
    if set(own) != {"gate_up_proj", "down_proj"} or activation is None:
        raise ValueError(f"{name}: the experts of {kind} are not stacked SwiGLU FFNs without biases. {_INSTEAD}")
    if getattr(native.block, "jitter_noise", 0):
        raise ValueError(f"{name}: {kind} has jitter on what its experts see; set router_jitter_noise=0 to import it.")
    if isinstance(getattr(native.block, "shared_expert_gate", None), nn.Module):
        raise ValueError(f"{name}: the shared expert of {kind} has a gate of its own. {_INSTEAD}")
    num_experts, hidden_size, expert_size = own["down_proj"].shape
    experts = Experts(num_experts, hidden_size, expert_size, activation=activation, device="meta")
    experts.gate_up_proj, experts.down_proj = own["gate_up_proj"], own["down_proj"]
    return MoELayer(router(name, native), experts, shared_experts=_shared(native.block), name=name)


def _shared(block: nn.Module) -> Experts | None:
    dense = find_ffns(block).get("shared_experts") if hasattr(block, "shared_experts") else None
    if dense is None:
        return None
    shared = CopyInit().new_experts(1, dense.expert_size, dense).to_empty(device=dense.up.device)
    CopyInit()(shared, dense, torch.Generator())
    return shared


def _same_router(name: str, native: NativeMoE) -> Router:
    theirs: Any = native.router
    gate: Any = native.gate_rows()
    num_experts, hidden_size = gate.shape
    common: dict[str, Any] = {"top_k": theirs.top_k, "normalize": bool(getattr(theirs, "norm_topk_prob", True))}
    if native.scores is softmax_scores and not native.adapts_to_load:
        made: Any = TopKRouter(hidden_size, num_experts, **common)
    elif native.scores is sigmoid_scores and native.adapts_to_load and hasattr(theirs, "num_group"):
        made = LossFreeRouter(
            hidden_size,
            num_experts,
            **common,
            num_groups=theirs.num_group,
            top_k_groups=theirs.topk_group,
            routed_scaling=float(theirs.routed_scaling_factor),
        )
        made.expert_bias = native.expert_bias.detach()
    else:
        raise ValueError(f"{name}: no router of ours is known to route as {type(theirs).__name__} does. {_INSTEAD}")
    made.gate = gate
    router: Router = made
    return router


@torch.no_grad()
def _compare(name: str, native: NativeMoE, layer: MoELayer) -> None:
    gate = native.gate_rows()
    if gate.is_meta or gate.dtype != torch.float32:
        # in half precision theirs routes in half precision too, and two close experts may change places
        return
    states = torch.randn(1, 32, gate.shape[1], generator=torch.Generator().manual_seed(0)).to(gate.device)
    with unobserved(), evaluating(native.block), evaluating(layer):
        theirs, ours = native.block(states), layer(states)
    apart = difference(ours, theirs) if isinstance(theirs, torch.Tensor) else float("inf")
    if not apart <= _EXACT * max(1.0, float(theirs.abs().max())):
        raise ValueError(
            f"{name}: {type(native.block).__name__} is not what our layer computes; an output differs by {apart:.1e}. "
            f"Nothing was changed. {_INSTEAD}"
        )
