"""The layer that replaces a dense FFN."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_moe.experts import Experts, combine
from lightning_moe.four_bit import check_loaded
from lightning_moe.losses import BalanceLoss
from lightning_moe.routers import Router
from lightning_moe.routing import Routing, is_observed, is_recomputing, limit_capacity, notify
from lightning_moe.tokens import TokenContext


class RoutedLayer(nn.Module, ABC):
    """What the callbacks train, balance and watch: a router and its experts, under a name, with balance losses.

    With gradients on, the losses in ``balance_losses`` are computed from the layer's own routing, and their gradient is
    injected into the graph, scaled by ``loss_scale`` (a 0-d float32 tensor that callbacks write before each backward);
    the task loss itself is untouched.

    Args:
        name: the layer's name in its model, under which its routing is recorded.
    """

    router: nn.Module
    experts: nn.Module
    shared_experts: nn.Module | None

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.context = TokenContext()
        self.balance_losses = nn.ModuleDict()
        # No buffer: precision plugins would cast it, and 1/3 or a loss scale of 65536 is no half-precision number.
        # On the CPU even under torch.device("meta"), where from_pretrained builds: no checkpoint would ever fill it.
        self.loss_scale = torch.ones((), dtype=torch.float32, device="cpu")

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """E, the number of experts that are FFNs."""

    @property
    @abstractmethod
    def adapts_to_load(self) -> bool:
        """Whether the router is to be told the load of each optimizer step."""

    @abstractmethod
    def adapt(self, load: Float[Tensor, " choices"], scale: int | float = 1.0) -> None:
        """Tells the router the load of an optimizer step, see `Router.adapt`."""

    @abstractmethod
    def default_losses(self) -> list[BalanceLoss]:
        """The balance losses to train with if nobody names others."""

    @property
    @abstractmethod
    def parameters_per_expert(self) -> float:
        """Parameters that one expert has for itself."""

    @property
    def routes_by_states(self) -> bool:
        """Whether hidden states alone say where a token goes, see `route`."""
        return True

    @abstractmethod
    def route(self, x: Float[Tensor, "T D"]) -> Routing:
        """Asks the router, where ``routes_by_states``; this counts as no forward of the layer."""

    @abstractmethod
    def reroute(self, change: Callable[[Routing], Routing]) -> RemovableHandle:
        """Puts ``change(routing)`` in the place of each routing until the handle is removed; so it is recorded too.

        Of several changes the last one comes first.
        """

    @abstractmethod
    def gate_rows(self) -> Float[Tensor, "choices _"] | None:
        """The vectors that tokens are compared with, one per choice; None if the router has none."""

    @property
    @abstractmethod
    def entrance(self) -> nn.Module:
        """The module whose first argument are the hidden states that the experts compute on."""

    @abstractmethod
    def expert_weights(self) -> list[Float[Tensor, "E ..."]]:
        """All weights of the experts, with the experts in the first dimension."""

    @abstractmethod
    def expert_outputs(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "E T D"]:
        """What every expert computes for every token, unweighted."""

    def _watch_and_balance(self, x: Float[Tensor, "T _"], routing: Routing) -> Float[Tensor, "T _"]:
        # Returns x, which must be used: the gradient of the balance losses comes with its own.
        # not self.training: transformers' from_pretrained leaves a model in evaluation mode, and Lightning trains it so
        injecting, observed = torch.is_grad_enabled(), is_observed()
        if injecting and self.loss_scale.device != x.device:
            self.loss_scale = self.loss_scale.to(x.device)
        losses: dict[str, Tensor] = {}
        total = torch.zeros((), device=x.device, dtype=torch.float32)
        for name, loss in self.balance_losses.items():
            assert isinstance(loss, BalanceLoss)
            # without gradients only if somebody looks, or if the loss counts: reentrant checkpointing has none at first
            if not injecting and not observed and not (loss.counts and self.training):
                continue
            losses[name] = loss(routing)
            total = total + loss.coefficient * losses[name]
        if injecting and losses:
            x = _InjectGradient.apply(x, total, self.loss_scale)
        if observed:
            notify(self.name, routing, losses)
        return x


class MoELayer(RoutedLayer):
    """A router and its experts in the place of a dense FFN: same input, same output.

    ``out[t] = sum over the assignments n of token t of weights[n] * expert_n(x[t]) + sum_s shared_expert_s(x[t])``.

    Balance losses are attached by callbacks, as modules in ``balance_losses``; their gradient comes in at the output.

    Args:
        router: decides which token goes where.
        experts: what the tokens are sent through.
        shared_experts: what every token goes through besides; None where there are none.
        capacity_factor: in training each expert takes at most ``ceil(capacity_factor * N / E)`` tokens, see
            `limit_capacity`; None takes all, as evaluation does.
        dropout: probability of the dropout on the output, as the dense FFN had it.
        name: the layer's name in its model, under which its routing is recorded.

    Raises:
        ValueError: if router and experts differ in number, or the capacity factor is not above 0.

    Example:
        >>> from lightning_moe import TopKRouter
        >>> layer = MoELayer(TopKRouter(8, 4, top_k=2), Experts(4, 8, 16))
        >>> layer(torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        shared_experts: Experts | None = None,
        capacity_factor: float | None = None,
        dropout: float = 0.0,
        name: str = "moe",
    ) -> None:
        super().__init__(name)
        if router.num_experts != experts.num_experts:
            raise ValueError(f"{name}: a router of {router.num_experts} experts cannot serve {experts.num_experts}.")
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"{name}: capacity_factor={capacity_factor}, wanted a number > 0, or None for no limit.")
        self.router: Router = router
        self.experts: Experts = experts
        self.shared_experts: Experts | None = shared_experts
        self.capacity_factor = capacity_factor
        self.dropout = nn.Dropout(dropout)
        # among the layers that share the context: where routers build on each other's logits
        self.position = 0
        self.is_last = True
        self._previous_logits: Tensor | None = None
        self.register_load_state_dict_pre_hook(_explain_mismatch)

    @property
    def plain_experts(self) -> Experts:
        """The experts, without the adapters of peft on them that ``target_parameters`` of its configuration makes."""
        experts: Any = self.experts
        while hasattr(experts, "base_layer"):
            experts = experts.base_layer
        return experts  # type: ignore[no-any-return]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.plain_experts.num_experts

    @property
    def parameters_per_expert(self) -> float:
        """As the experts say, which may share some."""
        return self.plain_experts.parameters_per_expert

    @property
    def routes_by_states(self) -> bool:
        """Not by token ids, nor by the logits of the layer before."""
        return not (self.router.uses_token_ids or self.router.uses_previous_logits)

    def route(self, x: Float[Tensor, "T D"]) -> Routing:
        """Asks the router."""
        routing: Routing = self.router(x)
        return routing

    def reroute(self, change: Callable[[Routing], Routing]) -> RemovableHandle:
        """Changes what the router returns."""
        return self.router.register_forward_hook(lambda router, given, routing: change(routing), prepend=True)

    def gate_rows(self) -> Float[Tensor, "choices _"] | None:
        """As the router says."""
        return self.router.gate_rows()

    @property
    def entrance(self) -> nn.Module:
        """The layer itself."""
        return self

    def expert_weights(self) -> list[Float[Tensor, "E ..."]]:
        """As the experts say."""
        return self._without_adapters().weights()

    def expert_outputs(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "E T D"]:
        """Sends every token to every expert."""
        E, T = self.num_experts, len(x)
        token_ids = torch.arange(T, device=x.device).repeat(E)
        expert_ids = torch.arange(E, device=x.device).repeat_interleave(T)
        weights, logits = torch.ones(E * T, device=x.device), x.new_zeros(T, E, dtype=torch.float32)
        # rows come sorted by expert, and by token within one
        outputs, _ = self._without_adapters().outputs(x, Routing(token_ids, expert_ids, weights, logits, logits))
        return outputs.view(E, T, -1)

    @property
    def adapts_to_load(self) -> bool:
        """As the router's class says."""
        return self.router.adapts_to_load

    def adapt(self, load: Float[Tensor, " choices"], scale: int | float = 1.0) -> None:
        """Tells the router."""
        # without the argument where it says nothing: a router of a user's own may not have it
        self.router.adapt(load, *() if scale == 1 else (scale,))

    def default_losses(self) -> list[BalanceLoss]:
        """Those of the router's paper, see `Router.balance_losses`."""
        return self.router.balance_losses()

    def forward(self, hidden_states: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Routes each token to its experts and returns the weighted sum of their outputs."""
        x: Tensor = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, D)
        sequence_length = hidden_states.shape[-2] if hidden_states.dim() > 1 else 1
        routing = self._route(x, sequence_length)
        out, routing = self._compute(x, routing)
        if (free := self.router.zero_computation(x, routing)) is not None:
            out = out + free.to(out.dtype)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        out = self._watch_and_balance(self.dropout(out), routing)
        reshaped: Tensor = out.view(hidden_states.shape)
        return reshaped

    def _route(self, x: Float[Tensor, "T D"], sequence_length: int) -> Routing:
        tokens = self.context.tokens(x.shape[0] // max(sequence_length, 1), sequence_length)
        if self.router.uses_previous_logits:
            tokens = replace(tokens, previous_logits=self._logits_before(x.shape[0]))
        routing: Routing = replace(self.router(x, tokens), sequence_length=sequence_length)
        if self.router.uses_previous_logits and not self.is_last and not is_recomputing():
            self.context.logits = (self.position, routing.logits)
        if self.capacity_factor is None or not self.training:
            return routing
        return limit_capacity(routing, self.capacity_factor)

    def _logits_before(self, num_tokens: int) -> Float[Tensor, "T choices"] | None:
        if is_recomputing():
            return self._previous_logits
        position, logits = self.context.logits or (self.position, None)
        # taken, so that nothing of the graph outlives the forward
        self.context.logits = None
        if logits is not None and (position != self.position - 1 or logits.shape[0] != num_tokens):
            logits = None
        # What activation checkpointing will ask for again: without the graph, but as if it had one, so that the
        # repeated forward saves the same tensors.
        self._previous_logits = None if logits is None else logits.detach().requires_grad_(logits.requires_grad)
        return logits

    def _without_adapters(self) -> Experts:
        # peft's adapters act in the forward alone
        if hasattr(self.experts, "base_layer"):
            raise TypeError(
                f"{self.name}: an adapter of peft stands on the experts, so their weights and single outputs cannot be "
                "looked at. Merge it first, with model.merge_and_unload(); or leave out what looks at them."
            )
        return self.experts

    def _compute(self, x: Float[Tensor, "T D"], routing: Routing) -> tuple[Float[Tensor, "T D"], Routing]:
        # what the losses look at is kept only if one of them does
        losses = list(self.balance_losses.values()) if torch.is_grad_enabled() or is_observed() else []
        if any(loss.needs_gate for loss in losses):
            routing = replace(routing, gate=self.router.gate_rows())
        if not any(loss.needs_outputs for loss in losses):
            return self.experts(x, routing), routing
        y, rows = self._without_adapters().outputs(x, routing)
        in_order = y.new_zeros(len(routing.expert_ids), y.shape[1]).index_copy(0, rows.order, y)
        return combine(y, rows, routing), replace(routing, outputs=in_order)


class _InjectGradient(torch.autograd.Function):
    # Identity on x whose backward also sends `scale` into the loss: as if scale * loss had been added to the total.
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        # An attribute and not save_for_backward: the scale is written in place between forward and backward, and its
        # value at the backward is the one that counts.
        ctx.scale, ctx.dtype = scale, loss.dtype
        # not x.view_as(x): what follows may add to it in place, as Falcon does
        return x.clone()

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
            f"{module.num_experts} experts. Load a dense checkpoint into the dense model, before upcycling: "
            "MoEUpcycleCallback(..., dense_checkpoint=PATH) does, in the place of ckpt_path=PATH."
        )
    for key, tensor in own.items():
        if key.endswith(".packed"):
            check_loaded(state_dict, key.removesuffix(".packed"))
        if f"{key}.packed" in state_dict:
            raise ValueError(
                f"{key}: the checkpoint holds this weight in 4 bit, and this model in full precision. Quantise the "
                "model before, as it was: with MoEUpcycleCallback(..., quantize=...), or quantize_frozen(model)."
            )
        if key in state_dict and state_dict[key].shape != tensor.shape:
            raise ValueError(
                f"{key}: the checkpoint has shape {tuple(state_dict[key].shape)}, that is "
                f"{_experts_in(state_dict[key])}; this model has {tuple(tensor.shape)}. Upcycle with the "
                "configuration that the checkpoint was trained with."
            )


def _experts_in(tensor: Tensor) -> str:
    # low-rank experts share one FFN
    return f"{tensor.shape[0]} experts" if tensor.shape[0] > 1 else "one expert, or low-rank experts"


# what wrappers around a module put into its path: torch.compile, FSDP, activation checkpointing
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def plain_name(path: str) -> str:
    """A module's path without what wrappers around it put there: a compiled layer has the name of the plain one."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def saved_name(path: str) -> str:
    """A module's path as state dicts have it: FSDP and checkpointing leave no trace in them, torch.compile does."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS - {"_orig_mod"})


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Finds the MoE layers of a model, by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
