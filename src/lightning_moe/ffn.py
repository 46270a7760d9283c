"""Finds the dense FFNs of any model and reads each as canonical gate, up and down weights.

A family is a row of a table: the names of an FFN's parts. A module belongs to a family if it has exactly these parts;
before it is replaced, its output on a probe is compared with that of the canonical form, so that a module that has the
parts of a family but computes something else is refused in words.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
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
    sources: Sources = ()

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.up.shape[1]

    @property
    def expert_size(self) -> int:
        """F, the width of the FFN and so of an expert."""
        return self.up.shape[0]

    def __call__(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Computes the FFN, dropout left out."""
        up = F.linear(x, self.up, self.up_bias)
        if self.gate is None:
            return F.linear(self.activation(up), self.down, self.down_bias)
        return F.linear(self.activation(F.linear(x, self.gate, self.gate_bias)) * up, self.down, self.down_bias)


@dataclass(frozen=True, kw_only=True)
class FFNFamily:
    """The names of the parts of one kind of FFN. A new family is one of these.

    Args:
        up: attribute of the up projection, or of the fused gate-and-up projection, whose first half is the gate.
        down: attribute of the down projection.
        activation: attribute of the activation, a module or a function.
        gate: attribute of the gate projection; None if there is none, or if it is fused into ``up``.
        fused_gate: whether ``up`` holds gate and up in one weight.
        dropout: attribute of a dropout on the output.

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

    @property
    def parts(self) -> tuple[str, ...]:
        """The attributes that a module of this family must have."""
        return tuple(part for part in (self.gate, self.up, self.activation, self.down) if part is not None)

    def matches(self, module: nn.Module) -> bool:
        """Whether the module has the parts of this family and nothing else that computes."""
        children = dict(module.named_children())
        if not all(part in children or callable(getattr(module, part, None)) for part in self.parts):
            return False
        linears = [part for part in self.parts if part != self.activation]
        if not all(part in children and _is_linear(children[part]) for part in linears):
            return False
        others = [child for name, child in children.items() if name not in (*self.parts, self.dropout)]
        # a dropout between the projections would be lost in training
        if not all(isinstance(child, nn.Identity) or getattr(child, "p", None) == 0 for child in others):
            return False
        owned = sum(p.numel() for part in linears for p in children[part].parameters())
        return owned == sum(p.numel() for p in module.parameters())

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
        dropout = None if self.dropout is None else getattr(module, self.dropout, None)
        return FFNWeights(
            up=up,
            down=down,
            activation=getattr(module, self.activation),
            gate=gate,
            up_bias=up_bias,
            down_bias=down_bias,
            gate_bias=gate_bias,
            dropout=float(getattr(dropout, "p", 0.0)),
            sources=(*gate_sources, *up_sources, *down_sources),
        )


FFN_FAMILIES: dict[str, FFNFamily] = {
    # Llama, Mistral, Qwen, Gemma, OLMo, SmolLM, ...
    "llama": FFNFamily(gate="gate_proj", up="up_proj", down="down_proj", activation="act_fn"),
    # Phi-3, Phi-4, GLM-4: gate and up in one weight
    "phi3": FFNFamily(up="gate_up_proj", fused_gate=True, down="down_proj", activation="activation_fn"),
    # GPT-2: Conv1D, whose weight is transposed, and a dropout at the end
    "gpt2": FFNFamily(up="c_fc", down="c_proj", activation="act", dropout="dropout"),
    "gpt_neox": FFNFamily(up="dense_h_to_4h", down="dense_4h_to_h", activation="act"),
    "two_linear": FFNFamily(up="fc1", down="fc2", activation="act"),
    "sequential": FFNFamily(up="0", activation="1", down="2", dropout="3"),
}


def find_ffns(model: nn.Module, family: FFNFamily | None = None) -> dict[str, FFNWeights]:
    """Finds every dense FFN of a model, in the order of its modules.

    The first FFN of each kind, as ``repr`` shows it, is compared with its canonical form on a probe.

    Args:
        model: any module.
        family: the one family to look for; None looks for every one in `FFN_FAMILIES`.

    Returns:
        Name of the module to its canonical weights. A module used in several places appears under its first name.

    Raises:
        TypeError: if the model has no FFN of a known family; the message lists what it has.
        ValueError: if a module has the parts of a family but computes something else.
    """
    families = list(FFN_FAMILIES.values()) if family is None else [family]
    found = {}
    probed = set()
    for name, module in model.named_modules():
        match = next((row for row in families if row.matches(module)), None)
        weights = None if match is None else match.read(module)
        # a head or projector with the parts of an FFN leads to another width
        if weights is not None and weights.down.shape[0] == weights.hidden_size:
            # one of a kind is enough: the layers of a model differ in their weights only
            if repr(module) not in probed:
                _probe(name, module, weights)
                probed.add(repr(module))
            found[name] = weights
    if not found:
        raise TypeError(_no_family_message(model, families))
    return found


def _is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D is told by its name, so that this file needs no transformers
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


@torch.no_grad()
def _probe(name: str, module: nn.Module, weights: FFNWeights) -> None:
    if weights.up.is_meta:
        return
    # a fixed, deterministic input that excites every channel; drawing it would move the global generator
    rows = torch.arange(3 * weights.hidden_size, device=weights.up.device, dtype=torch.float32)
    x = torch.sin(rows).view(3, 1, -1).to(weights.up.dtype)
    was_training = module.training
    module.eval()
    try:
        dense = module(x)
    finally:
        module.train(was_training)
    canonical = weights(x)
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2
    difference = (dense.float() - canonical.float()).abs().max()
    if difference > tolerance * canonical.float().abs().max():
        raise ValueError(
            f"{name}: {type(module).__name__} has the parts of a known FFN family but computes something else "
            f"(outputs differ by {difference:.1e} on a probe). Pass `family=FFNFamily(...)` with its own parts."
        )


def _no_family_message(model: nn.Module, families: Iterable[FFNFamily]) -> str:
    seen = sorted(
        {
            f"{type(module).__name__}({', '.join(name for name, _ in module.named_children())})"
            for module in model.modules()
            if sum(_is_linear(child) for child in module.children()) >= 2
        }
    )
    known = "; ".join(", ".join(family.parts) for family in families)
    return (
        f"{type(model).__name__}: no FFN of a known family. Looked for modules with the parts: {known}. "
        f"Modules with two linear layers or more: {', '.join(seen) or 'none'}. "
        "Describe yours in one line and pass it: "
        'UpcycleConfig(family=FFNFamily(up="fc_in", down="fc_out", activation="act")).'
    )
