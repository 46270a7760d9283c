"""Sees the MoE blocks that Hugging Face models bring themselves as the same `Routing`, so that callbacks serve both.

Nothing of the model is replaced: a hook on each router reads what it returns, where the model computes it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_moe.layer import MoELayer, RoutedLayer, plain_name
from lightning_moe.losses import BalanceLoss, LoadBalancingLoss, ZLoss
from lightning_moe.native_routers import NATIVE_ROUTERS, Scores, softmax_scores
from lightning_moe.routers.base import token_choice
from lightning_moe.routing import Routing, is_observed
from lightning_moe.tokens import TokenContext, Tokens, paths_above, text_model_around

# where a router keeps its `NativeMoE`
_KEY = "_lightning_moe_native"
_BIAS = "e_score_correction_bias"
_COEFFICIENT = "router_aux_loss_coef"
_SHARED = ("shared_expert", "shared_experts", "shared_expert_gate")


class NativeMoE(RoutedLayer):
    """One MoE block of a Hugging Face model, as callbacks see it: no part of the model, but beside it.

    A hook on the router makes a `Routing` of what it returns, and the gradient of the balance losses comes in at the
    weights. The model's parameters, buffers, modules and outputs stay as they are. `attach_native` makes these.

    Args:
        name: path of the block in its model.
        block: the module that holds router and experts.
        router: returns ``(logits, weights, expert_ids)``.
        scores: makes the scores of all experts from the logits, in float32.
        loss_coefficient: what the model's configuration multiplies its own balance loss by; None if it has none.
    """

    def __init__(
        self, name: str, block: nn.Module, router: nn.Module, scores: Scores, loss_coefficient: int | float | None
    ) -> None:
        super().__init__(name)
        shared = [module for key in _SHARED if isinstance(module := getattr(block, key, None), nn.Module)]
        self.block: nn.Module
        # In __dict__, where nn.Module does not look for submodules: they belong to the model, which this is no part of.
        self.__dict__.update(block=block, router=router, experts=block.get_submodule("experts"))
        self.__dict__["shared_experts"] = nn.ModuleList(shared) if shared else None
        self.scores = scores
        self.loss_coefficient = loss_coefficient
        self.bias_rate: int | float = 1e-3
        self._sequence_length: int | None = None
        # bound methods and no closures: a deep copy of the model takes a copy of this along
        self._handles = [
            block.register_forward_pre_hook(self._note_length, with_kwargs=True),
            router.register_forward_hook(self._after_router),
        ]
        self.listening: RemovableHandle | None = None
        router.__dict__[_KEY] = self

    @property
    def num_experts(self) -> int:
        """E."""
        number: Any = self.router.num_experts
        return int(number)

    @property
    def adapts_to_load(self) -> bool:
        """Whether the block has a bias on the choice, as DeepSeek-V3 and GLM-4-MoE."""
        return self._bias_owner() is not None

    @property
    def expert_bias(self) -> Float[Tensor, " E"]:
        """The block's ``e_score_correction_bias``, where ``adapts_to_load``."""
        bias: Tensor = getattr(self._bias_owner(), _BIAS)
        return bias

    @torch.no_grad()
    def set_expert_bias(self, bias: Float[Tensor, " E"]) -> None:
        """Sets the bias, and makes it float32: in bfloat16 it would swallow its own updates."""
        self.expert_bias.data = self.expert_bias.data.float()
        self.expert_bias.copy_(bias)

    def adapt(self, load: Float[Tensor, " choices"], scale: int | float = 1.0) -> None:
        """Moves the bias: ``bias += scale * bias_rate * sign(mean(load) - load)``, as `LossFreeRouter` does."""
        bias = self.expert_bias
        with torch.no_grad():
            bias += (torch.sign(load.mean() - load) * (self.bias_rate * scale)).to(bias)

    def default_losses(self) -> list[BalanceLoss]:
        """`LoadBalancingLoss` with the model's own coefficient; where that is 0 or none, those of our own router."""
        if self.loss_coefficient:
            return [LoadBalancingLoss(float(self.loss_coefficient))]
        if self.adapts_to_load:
            # as DeepSeek-V3, and LossFreeRouter
            return [LoadBalancingLoss(1e-4, scope="sequence")]
        return [LoadBalancingLoss(), ZLoss()] if self.scores is softmax_scores else [LoadBalancingLoss()]

    @property
    def parameters_per_expert(self) -> float:
        """Those of all experts, divided by their number."""
        return sum(parameter.numel() for parameter in self.experts.parameters()) / self.num_experts

    def tokens(self, num_tokens: int) -> Tokens:
        """What is known of the T tokens of the forward at hand."""
        length = self._sequence_length
        return Tokens() if length is None else self.context.tokens(num_tokens // max(length, 1), length)

    def route(self, x: Float[Tensor, "T D"]) -> Routing:
        """Asks the router, past all hooks: transformers collects what its routers return by hooks too."""
        logits, weights, expert_ids = self.router.forward(x)
        return self._routing_of(logits, weights, expert_ids, Tokens())

    def reroute(self, change: Callable[[Routing], Routing]) -> RemovableHandle:
        """Changes what the router returns, before the hook that records it.

        Raises:
            ValueError: in the forward, if the changed routing has not the same number of experts for each token.
        """

        def hook(
            router: nn.Module, given: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
        ) -> tuple[Tensor, ...]:
            logits, weights, expert_ids = output
            routing = change(self._routing(logits, weights, expert_ids))
            if routing.top_k is None:
                raise ValueError(f"{self.name}: its experts take the same number for each token; keep top_k=K.")
            shape = len(logits), routing.top_k
            return logits, routing.weights.view(shape).to(weights), routing.expert_ids.view(shape).to(expert_ids)

        return self.router.register_forward_hook(hook, prepend=True)

    @contextmanager
    def logits_times(self, factor: int | float) -> Iterator[None]:
        """Multiplies the logits by a factor inside the ``with`` block; what becomes of them is up to the router's code.

        The router's weight and bias are multiplied, and put back: logits are linear in them. In bfloat16 a factor that
        is no power of two rounds them. A bias on the choice (``e_score_correction_bias``) is in no logit, and stays.
        """
        gate = [own for name in ("weight", "bias") if isinstance(own := getattr(self.router, name, None), Tensor)]
        before = [parameter.data for parameter in gate]
        try:
            for parameter in gate:
                parameter.data = parameter.data * factor
            yield
        finally:
            for parameter, data in zip(gate, before, strict=True):
                parameter.data = data

    def gate_rows(self) -> Float[Tensor, "E D"]:
        """The router's ``weight``."""
        return self.router.get_parameter("weight")

    @property
    def entrance(self) -> nn.Module:
        """The experts: some blocks project the states before they reach them."""
        return self.experts

    def expert_weights(self) -> list[Float[Tensor, "E ..."]]:
        """The experts' parameters that are stacked, biases among them."""
        return [own for own in self.experts.parameters() if own.dim() > 0 and len(own) == self.num_experts]

    def expert_outputs(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "E T D"]:
        """Sends all tokens to one expert after another, with a weight of 1, as the block calls its experts."""
        ones = x.new_ones(len(x), 1)
        return torch.stack([self.experts(x, ones.long() * expert, ones) for expert in range(self.num_experts)])

    def detach_hooks(self) -> None:
        """Leaves the model."""
        for handle in self._handles if self.listening is None else [*self._handles, self.listening]:
            handle.remove()
        self._handles, self.listening = [], None
        self.router.__dict__.pop(_KEY, None)

    def _bias_owner(self) -> nn.Module | None:
        return next(
            (module for module in (self.router, self.block) if isinstance(getattr(module, _BIAS, None), Tensor)), None
        )

    def _note_length(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # most blocks flatten to (T, D) before their router
        states = args[0] if args else next(iter(kwargs.values()))
        self._sequence_length = states.shape[-2] if states.dim() > 1 else 1

    def _after_router(
        self, router: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if not self.balance_losses and not is_observed():
            return None
        if self.training != router.training:
            # no child of the model, which would tell it: losses that count ask for it
            self.train(router.training)
        logits, weights, expert_ids = output
        return logits, self._watch_and_balance(weights, self._routing(logits, weights, expert_ids)), expert_ids

    def _routing(
        self, logits: Float[Tensor, "T E"], weights: Float[Tensor, "T K"], expert_ids: Int[Tensor, "T K"]
    ) -> Routing:
        looked_at = any(loss.needs_gate for loss in self.balance_losses.values())
        gate = self.gate_rows() if looked_at else None
        routing = self._routing_of(logits, weights, expert_ids, self.tokens(len(logits)))
        return replace(routing, sequence_length=self._sequence_length, gate=gate)

    def _routing_of(
        self,
        logits: Float[Tensor, "T E"],
        weights: Float[Tensor, "T K"],
        expert_ids: Int[Tensor, "T K"],
        tokens: Tokens,
    ) -> Routing:
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        with torch.autocast(logits.device.type, enabled=False):
            return token_choice(exact, self.scores(exact), expert_ids, weights, tokens)


def attach_native(model: nn.Module) -> dict[str, NativeMoE]:
    """Lets callbacks and `record_routing` see the MoE blocks that a Hugging Face model brings itself.

    Callbacks call it themselves; call it to record the routing of a model without a Trainer. A second call finds what
    the first made. State dict, parameters and outputs of the model stay as they are; a deep copy of it is attached too.
    Attach before the first forward of a compiled model, which looks for hooks only then.

    Args:
        model: holds blocks whose router is one of `NATIVE_ROUTERS`; there may be none.

    Returns:
        Name of the block to what callbacks see of it, in the order of the modules.

    Example:
        >>> from lightning_moe import record_routing
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(
        ...     hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        ...     vocab_size=11, num_local_experts=4, bos_token_id=None, eos_token_id=None,
        ... )
        >>> model = MixtralForCausalLM(config)
        >>> list(attach_native(model))
        ['model.layers.0.mlp']
        >>> with record_routing() as window:
        ...     _ = model(input_ids=torch.randint(0, 11, (2, 5)))
        >>> window["model.layers.0.mlp"].expert_ids.shape
        torch.Size([20])
    """
    modules = dict(model.named_modules())
    found: dict[str, NativeMoE] = {}
    members: dict[str, list[NativeMoE]] = {}
    for path, block, scores in _blocks(modules):
        router = modules[path]
        native = router.__dict__.get(_KEY)
        if native is None:
            native = NativeMoE(_name(block), modules[block], router, scores, _own_coefficient(modules, block))
        found[_name(block)] = native
        if (home := text_model_around(modules, path)) is not None:
            members.setdefault(home, []).append(native)
    for home, group in members.items():
        _share_context(modules[home], group)
    return found


@contextmanager
def attached(model: nn.Module) -> Iterator[None]:
    """Attaches a model inside the ``with`` block; one that was attached before stays so."""
    before = any(isinstance(layer, NativeMoE) for layer in routed_layers(model).values())
    attach_native(model)
    try:
        yield
    finally:
        if not before:
            detach_native(model)


def native_blocks(model: nn.Module) -> list[str]:
    """Names the MoE blocks that a model brings itself, attached or not."""
    return [_name(block) for _, block, _ in _blocks(dict(model.named_modules()))]


def detach_native(model: nn.Module) -> None:
    """Takes away what `attach_native` put around the blocks of a model."""
    for module in model.modules():
        if (native := module.__dict__.get(_KEY)) is not None:
            native.detach_hooks()


def routed_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """Finds what routes in a model, by name, in the order of its modules: MoE layers, and attached native blocks."""
    found: dict[str, RoutedLayer] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if isinstance(module, MoELayer):
            found[path] = module
        elif (native := module.__dict__.get(_KEY)) is not None:
            found[_name(_block_around(modules, path) or "")] = native
    return found


def unknown_routers(model: nn.Module) -> list[str]:
    """Names the classes of routers by which a model says that it has MoE blocks, and that `NATIVE_ROUTERS` lacks."""
    names = set()
    for module in model.modules():
        outputs = getattr(module, "_can_record_outputs", None)
        recorders = outputs.get("router_logits", []) if isinstance(outputs, dict) else []
        for recorder in recorders if isinstance(recorders, list) else [recorders]:
            target = getattr(recorder, "target_class", recorder)
            names.add(getattr(target, "__name__", str(target)))
    return sorted(names - set(NATIVE_ROUTERS))


def own_losses(model: nn.Module) -> list[tuple[Any, bool]]:
    """Finds where a model keeps the coefficient of the balance loss that its own forward adds.

    Returns:
        Objects with a ``router_aux_loss_coef`` other than 0, and for each whether the model's configuration has this
        loss turned on.
    """
    owners: dict[int, tuple[Any, bool]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        text_config = getattr(config, "text_config", None)
        # the head of a vision-language model reads its configuration, that of a language model its own attribute
        for owner, settings in ((module, config), (text_config, text_config)):
            if _number(vars(owner).get(_COEFFICIENT) if owner is not None else None):
                owners[id(owner)] = owner, bool(getattr(settings, "output_router_logits", False))
    return list(owners.values())


def _blocks(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, Scores]]:
    # of each known router its path, that of its block, and how it makes its scores
    for path, router in modules.items():
        scores, block = _scores_of(router), _block_around(modules, path)
        if scores is not None and block is not None:
            yield path, block, scores


def _scores_of(router: nn.Module) -> Scores | None:
    # by name, so that nothing of transformers is imported; the classes above, for a user's own subclass
    return next((NATIVE_ROUTERS[cls.__name__] for cls in type(router).__mro__ if cls.__name__ in NATIVE_ROUTERS), None)


def _block_around(modules: Mapping[str, nn.Module], path: str) -> str | None:
    holders = (up for up in paths_above(path) if isinstance(getattr(modules[up], "experts", None), nn.Module))
    return next(holders, None)


def _name(path: str) -> str:
    return plain_name(path) or "moe"


def _own_coefficient(modules: Mapping[str, nn.Module], block: str) -> int | float | None:
    for path in paths_above(block):
        coefficient = getattr(getattr(modules[path], "config", None), _COEFFICIENT, None)
        if _number(coefficient) is not None:
            return _number(coefficient)
    return None


def _number(value: Any) -> int | float | None:
    return value if type(value) in (int, float) else None


def _share_context(model: nn.Module, group: Sequence[NativeMoE]) -> None:
    if len({id(native.context) for native in group}) == 1 and group[0].listening is not None:
        return
    for native in group:
        if native.listening is not None:
            native.listening.remove()
    context = TokenContext()
    handle = context.watch(model)
    for native in group:
        native.context, native.listening = context, handle
