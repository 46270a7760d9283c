"""What a dense FFN is, in canonical gate, up and down weights, and the table of known families.

A family is a row of a table: the names of an FFN's parts. A module belongs to a family if it has exactly these parts.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]
Sources = tuple[tuple[str, nn.Parameter], ...]


@dataclass(frozen=True)
class FFNWeights:
    """The weights of one dense FFN in canonical form.

    Gated: ``y = (act(x gate^T + b_gate) * (x up^T + b_up)) down^T + b_down``; without ``gate``:
    ``y = act(x up^T + b_up) down^T + b_down``.

    Args:
        up: up projection, (F, D).
        down: down projection, (O, F); O = D but for a head, which `find_ffns` leaves out.
        activation: the function between them.
        gate: gate projection, (F, D); None for an FFN without a gate.
        up_bias: (F,).
        down_bias: (D,).
        gate_bias: (F,).
        dropout: probability of the dropout on the FFN's output.
        inner_dropout: probability of the dropout between activation and down projection.
        absorbed: names of modules, beside the FFN's own, whose work the FFN does: they become identities with it.
        sources: the module's own parameters behind each canonical weight, by that weight's name.
    """

    up: Float[Tensor, "F D"]
    down: Float[Tensor, "O F"]
    activation: Activation
    gate: Float[Tensor, "F D"] | None = None
    up_bias: Float[Tensor, " F"] | None = None
    down_bias: Float[Tensor, " O"] | None = None
    gate_bias: Float[Tensor, " F"] | None = None
    dropout: float = 0.0
    inner_dropout: float = 0.0
    absorbed: tuple[str, ...] = ()
    sources: Sources = ()

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.up.shape[1]

    @property
    def expert_size(self) -> int:
        """F, the width of the FFN and so of an expert."""
        return self.up.shape[0]

    def hidden(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """Computes what the down projection gets: the activations of the neurons."""
        up = F.linear(x, self.up, self.up_bias)
        return (
            self.activation(up) if self.gate is None else self.activation(F.linear(x, self.gate, self.gate_bias)) * up
        )

    def __call__(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Computes the FFN, dropout left out."""
        return F.linear(self.hidden(x), self.down, self.down_bias)


@dataclass(frozen=True, kw_only=True)
class FFNFamily:
    """The names of the parts of one kind of FFN. A new family is one of these.

    Most FFNs are modules of their own. Of some, the parts stand in a module that does more (a whole decoder layer):
    these have a ``place``, the part that the MoE layer replaces, and the others become identities.

    Args:
        up: attribute of the up projection, or of the fused gate-and-up projection, whose first half is the gate; as all
            attributes, it may be dotted.
        down: attribute of the down projection.
        activation: attribute of the activation, a module or a function; or the name of a function in
            ``torch.nn.functional``, such as ``"silu"``, where the module has none and calls that one.
        gate: attribute of the gate projection; None if there is none, or if it is fused into ``up``.
        fused_gate: whether ``up`` holds gate and up in one weight.
        dropout: attribute of a dropout on the output, a module or a probability.
        inner_dropout: attribute of a dropout between activation and down projection; with a ``place`` it must be 0.
        place: the attribute to replace, where the FFN is no module of its own.
        beside: attributes that the module must have besides, where the names of the parts do not tell it from others.

    Example:
        >>> family = FFNFamily(up="0", activation="1", down="2")
        >>> ffn = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
        >>> family.read(ffn).expert_size
        16
    """

    up: str
    down: str
    activation: str
    gate: str | None = None
    fused_gate: bool = False
    dropout: str | None = None
    inner_dropout: str | None = None
    place: str | None = None
    beside: Sequence[str] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The attributes that a module of this family must have."""
        return tuple(part for part in (self.gate, self.up, self.activation, self.down) if part is not None)

    def matches(self, module: nn.Module) -> bool:
        """Whether the module has the parts of this family and, without a ``place``, nothing else that computes."""
        if not callable(activation_of(module, self.activation)):
            return False
        linears = [attribute(module, part) for part in self.parts if part != self.activation]
        if not all(is_linear(part) for part in linears):
            return False
        if self.place is not None:
            others = (*self.absorbed(), *self.beside)
            return all(isinstance(attribute(module, part), nn.Module) for part in others)
        dropouts = (self.dropout, self.inner_dropout)
        for name, child in module.named_children():
            # a dropout between the projections would be lost in training
            if name not in self.parts and not isinstance(child, nn.Identity):
                p = getattr(child, "p", None)
                if p is None or (p != 0 and name not in dropouts):
                    return False
        owned = sum(p.numel() for part in linears for p in part.parameters())
        return bool(owned == sum(p.numel() for p in module.parameters()))

    def read(self, module: nn.Module) -> FFNWeights:
        """Reads the canonical weights: views of the module's own, nothing is copied."""
        up, up_bias, up_sources = _read_linear(module.get_submodule(self.up), "up")
        down, down_bias, down_sources = _read_linear(module.get_submodule(self.down), "down")
        gate: Tensor | None = None
        gate_bias: Tensor | None = None
        gate_sources: Sources = ()
        if self.gate is not None:
            gate, gate_bias, gate_sources = _read_linear(module.get_submodule(self.gate), "gate")
        elif self.fused_gate:
            gate, up = up.chunk(2)
            gate_bias, up_bias = (None, None) if up_bias is None else up_bias.chunk(2)
        activation = activation_of(module, self.activation)
        # what is absorbed becomes an identity wherever it stands, so the experts need one of their own
        activation = activation if self.place is None else copy.deepcopy(activation)
        return FFNWeights(
            up=up,
            down=down,
            activation=activation,
            gate=gate,
            up_bias=up_bias,
            down_bias=down_bias,
            gate_bias=gate_bias,
            dropout=probability_of(module, self.dropout),
            inner_dropout=probability_of(module, self.inner_dropout),
            absorbed=self.absorbed(),
            sources=(*gate_sources, *up_sources, *down_sources),
        )

    def absorbed(self) -> tuple[str, ...]:
        """The attributes that become identities where the FFN is no module of its own."""
        if self.place is None:
            return ()
        return tuple(part for part in self.parts if part != self.place and not part.startswith(f"{self.place}."))


# of those that modules call without having them
INLINE_ACTIVATIONS = ("silu", "gelu", "relu", "tanh")

# Those with a place come last: a module that is an FFN by itself is taken as such.
FFN_FAMILIES: dict[str, FFNFamily] = {
    # Llama, Mistral, Qwen, Gemma, OLMo, SmolLM, StableLM, Granite, Cohere, DINOv2 with SwiGLU, ...
    "llama": FFNFamily(gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn"),
    # Phi-3, Phi-4, GLM-4: gate and up in one weight
    "phi3": FFNFamily(up="gate_up_proj", fused_gate=True, down="down_proj", activation="activation_fn"),
    # GPT-2: Conv1D, whose weight is transposed, and a dropout at the end
    "gpt2": FFNFamily(up="c_fc", down="c_proj", activation="act", dropout="dropout"),
    "starcoder2": FFNFamily(up="c_fc", down="c_proj", activation="act", dropout="residual_dropout"),
    "gptj": FFNFamily(up="fc_in", down="fc_out", activation="act", dropout="dropout"),
    # GPT-NeoX, Falcon
    "gpt_neox": FFNFamily(up="dense_h_to_4h", down="dense_4h_to_h", activation="act"),
    "two_linear": FFNFamily(up="fc1", down="fc2", activation="act"),
    # Phi-1 and Phi-2, CLIP, SigLIP, ViT, DINOv2 without SwiGLU
    "clip": FFNFamily(up="fc1", down="fc2", activation="activation_fn"),
    # the projector of LLaVA, where both sides are of one width
    "llava": FFNFamily(up="linear_1", down="linear_2", activation="act"),
    "distilbert": FFNFamily(up="lin1", down="lin2", activation="activation", dropout="dropout"),
    "nemotron": FFNFamily(up="up_proj", down="down_proj", activation="act_fn"),
    "t5": FFNFamily(up="wi", down="wo", activation="act", inner_dropout="dropout"),
    "t5_gated": FFNFamily(gate="wi_0", up="wi_1", down="wo", activation="act", inner_dropout="dropout"),
    "modernbert": FFNFamily(up="Wi", fused_gate=True, down="Wo", activation="act", inner_dropout="drop"),
    "sequential": FFNFamily(up="0", activation="1", down="2", dropout="3"),
    # torchvision's and timm's order
    "sequential_dropout": FFNFamily(up="0", activation="1", inner_dropout="2", down="3", dropout="4"),
    # the residual is added inside
    "bloom": FFNFamily(up="dense_h_to_4h", down="dense_4h_to_h", activation="gelu_impl", place="dense_h_to_4h"),
    # the parts stand in the decoder layer itself; OPT, and BART and its kin, which have a dropout inside
    "opt": FFNFamily(
        up="fc1",
        down="fc2",
        activation="activation_fn",
        inner_dropout="activation_dropout",
        place="fc1",
        beside=("self_attn", "final_layer_norm"),
    ),
    # BERT, RoBERTa and their kin: one module ends before the down projection, the other adds the residual and norm
    "bert": FFNFamily(
        up="intermediate.dense",
        down="output.dense",
        activation="intermediate.intermediate_act_fn",
        place="intermediate",
        beside=("attention",),
    ),
}


def attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path; None if there is none."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def activation_of(module: nn.Module, name: str) -> Any:
    """The activation: an attribute of the module, or a function of ``torch.nn.functional``."""
    found = attribute(module, name)
    return getattr(F, name, None) if found is None else found


def probability_of(module: nn.Module, path: str | None) -> float:
    """The probability of a dropout, which is a module or only its probability."""
    found = None if path is None else attribute(module, path)
    return float(found) if isinstance(found, (int, float)) else float(getattr(found, "p", 0.0))


def is_linear(module: Any) -> bool:
    """Whether this is a linear layer, under an adapter or not."""
    # transformers' Conv1D is told by its name, so that this file needs no transformers; one that peft adapts is refused
    # later, in words
    module = getattr(module, "base_layer", module)
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _read_linear(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None, Sources]:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    assert bias is None or isinstance(bias, nn.Parameter)
    sources: Sources = ((name, weight),)
    if bias is not None:
        sources += ((f"{name}_bias", bias),)
    weight_view = weight.detach() if isinstance(module, nn.Linear) else weight.detach().t()
    return weight_view, None if bias is None else bias.detach(), sources
