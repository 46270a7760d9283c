"""The layer that replaces a dense FFN."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lightning_moe.experts import Experts
from lightning_moe.losses import BalanceLoss
from lightning_moe.routers import Router
from lightning_moe.routing import TokenContext, is_observed, notify


class MoELayer(nn.Module):
    """A router and its experts in the place of a dense FFN: same input, same output.

    ``out = sum over the assignments n of token t of weights[n] * expert_n(x[t])``.

    Balance losses are attached by callbacks, as modules in ``balance_losses``. With gradients on, the layer computes
    them from its own routing and injects their gradient into the graph at its output, scaled by ``loss_scale`` (a 0-d
    float32 tensor that callbacks write before each backward); the task loss itself is untouched.

    Args:
        router: decides which token goes where.
        experts: what the tokens are sent through.
        dropout: probability of the dropout on the output, as the dense FFN had it.
        name: the layer's name in its model, under which its routing is recorded.

    Example:
        >>> from lightning_moe import TopKRouter
        >>> layer = MoELayer(TopKRouter(8, 4, top_k=2), Experts(4, 8, 16))
        >>> layer(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(self, router: Router, experts: Experts, *, dropout: float = 0.0, name: str = "moe") -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(f"{name}: a router of {router.num_experts} experts cannot serve {experts.num_experts}.")
        self.router = router
        self.experts = experts
        self.dropout = nn.Dropout(dropout)
        self.name = name
        self.context = TokenContext()
        self.balance_losses = nn.ModuleDict()
        # No buffer: precision plugins would cast it, and 1/3 or a loss scale of 65536 is no half-precision number.
        self.loss_scale = torch.ones((), dtype=torch.float32)
        self.register_load_state_dict_pre_hook(_explain_mismatch)

    def forward(self, hidden_states: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Routes each token to its experts and returns the weighted sum of their outputs."""
        x: Tensor = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, D)
        sequence_length = hidden_states.shape[-2] if hidden_states.dim() > 1 else 1
        tokens = self.context.tokens(x.shape[0] // max(sequence_length, 1), sequence_length)
        routing = self.router(x, tokens)
        out = self.dropout(self.experts(x, routing))
        # not self.training: transformers' from_pretrained leaves a model in evaluation mode, and Lightning trains it so
        injecting = torch.is_grad_enabled()
        losses: dict[str, Tensor] = {}
        if injecting and self.loss_scale.device != x.device:
            self.loss_scale = self.loss_scale.to(x.device)
        if injecting or is_observed():
            for name, loss in self.balance_losses.items():
                assert isinstance(loss, BalanceLoss)
                losses[name] = loss(routing)
                if injecting:
                    out = _InjectGradient.apply(out, loss.coefficient * losses[name], self.loss_scale)
        if is_observed():
            notify(self.name, routing, losses)
        reshaped: Tensor = out.view(hidden_states.shape)
        return reshaped


class _InjectGradient(torch.autograd.Function):
    # Identity on x whose backward also sends `scale` into the loss: as if scale * loss had been added to the total.
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        # An attribute and not save_for_backward: the scale is written in place between forward and backward, and its
        # value at the backward is the one that counts.
        ctx.scale, ctx.dtype = scale, loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, ctx.scale.to(ctx.dtype), None


def _explain_mismatch(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    # torch would list keys and sizes, layer by layer; say once what they mean
    assert isinstance(module, MoELayer)
    own = module.experts.state_dict(prefix=f"{prefix}experts.")
    known = module.state_dict(prefix=prefix)
    # by what the layer does not know, not by what is missing: one file of several may hold a part of the layer only
    foreign = [key for key in state_dict if key.startswith(prefix) and key not in known]
    if foreign and not any(key in state_dict for key in known):
        raise ValueError(
            f"{prefix[:-1]}: the checkpoint is that of a dense model (it holds {foreign[0]}), this layer has "
            f"{module.experts.num_experts} experts. Load a dense checkpoint into the dense model, before upcycling."
        )
    for key, tensor in own.items():
        if key in state_dict and state_dict[key].shape != tensor.shape:
            raise ValueError(
                f"{key}: the checkpoint has shape {tuple(state_dict[key].shape)}, that is "
                f"{state_dict[key].shape[0]} experts; this model has {tuple(tensor.shape)}. Upcycle with the "
                "configuration that the checkpoint was trained with."
            )


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Finds the MoE layers of a model, by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
