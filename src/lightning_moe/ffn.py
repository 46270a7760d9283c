"""Finds the dense FFNs of any model and reads each as canonical gate, up and down weights.

A family is a row of a table: the names of an FFN's parts. A module belongs to a family if it has exactly these parts;
before it is replaced, its output on a probe is compared with that of the canonical form, so that a module that has the
parts of a family but computes something else is refused in words.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import permutations, product
from typing import Any

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
        if not callable(_activation(module, self.activation)):
            return False
        linears = [_attribute(module, part) for part in self.parts if part != self.activation]
        if not all(_is_linear(part) for part in linears):
            return False
        if self.place is not None:
            others = (*self.absorbed(), *self.beside)
            return all(isinstance(_attribute(module, part), nn.Module) for part in others)
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
        activation = _activation(module, self.activation)
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
            dropout=_probability(module, self.dropout),
            inner_dropout=_probability(module, self.inner_dropout),
            absorbed=self.absorbed(),
            sources=(*gate_sources, *up_sources, *down_sources),
        )

    def absorbed(self) -> tuple[str, ...]:
        """The attributes that become identities where the FFN is no module of its own."""
        if self.place is None:
            return ()
        return tuple(part for part in self.parts if part != self.place and not part.startswith(f"{self.place}."))


# of those that modules call without having them
_INLINE_ACTIVATIONS = ("silu", "gelu", "relu", "tanh")

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
        if match is None:
            continue
        _check_weights(name, module, match)
        weights = match.read(module)
        # a head or projector with the parts of an FFN leads to another width
        if weights.down.shape[0] != weights.hidden_size:
            continue
        if match.place is not None:
            _check_place(name, module, match, model)
            prefix = f"{name}." if name else ""
            found[prefix + match.place] = replace(weights, absorbed=tuple(prefix + part for part in weights.absorbed))
            continue
        # one of a kind is enough: the layers of a model differ in their weights only
        if repr(module) not in probed:
            _probe(name, module, weights)
            probed.add(repr(module))
        found[name] = weights
    if not found:
        raise TypeError(_no_family_message(model, families))
    return found


def find_lookalikes(model: nn.Module, found: Iterable[str], family: FFNFamily | None = None) -> dict[str, str]:
    """Finds what looks like a dense FFN and is none that `find_ffns` found.

    That is a module with the parts of a family that leads to another width, or one with two or three linear layers that
    widen and come back. Attention is left out by its name.

    Args:
        model: any module.
        found: the names that `find_ffns` gave.
        family: what it was given.

    Returns:
        Name of the module to the reason why it is no FFN, in the order of the modules.

    Example:
        >>> model = nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 3))})
        >>> find_lookalikes(model, ["ffn"])
        {'head': 'leads from width 4 to 3'}
    """
    families = list(FFN_FAMILIES.values()) if family is None else [family]
    unknown = "of no known family" if family is None else "not of the family that was given"
    lookalikes = {}
    for name, module in model.named_modules():
        if any(_overlap(name, other) for other in found) or "attention" in type(module).__name__.lower():
            continue
        if match := next((row for row in families if row.matches(module)), None):
            weights = match.read(module)
            lookalikes[name] = f"leads from width {weights.hidden_size} to {weights.down.shape[0]}"
        elif _widens_and_comes_back(module):
            lookalikes[name] = f"{unknown}: {type(module).__name__}"
    return lookalikes


def _overlap(name: str, other: str) -> bool:
    # one is the other or holds it; the model itself, "", holds all
    first, second = sorted((f"{name}." if name else "", f"{other}." if other else ""), key=len)
    return second.startswith(first)


def _widens_and_comes_back(module: nn.Module) -> bool:
    linears = [getattr(child, "base_layer", child) for child in module.children() if _is_linear(child)]
    # Conv1D has nx and nf
    names = [("in_features", "out_features") if isinstance(linear, nn.Linear) else ("nx", "nf") for linear in linears]
    sizes = [(getattr(linear, a), getattr(linear, b)) for linear, (a, b) in zip(linears, names, strict=True)]
    return len(sizes) in (2, 3) and any(
        last[0] > first[0] == last[1] and first[1] in (last[0], 2 * last[0]) for first, last in product(sizes, sizes)
    )


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def _activation(module: nn.Module, name: str) -> Any:
    found = _attribute(module, name)
    return getattr(F, name, None) if found is None else found


def _probability(module: nn.Module, path: str | None) -> float:
    # of a dropout, which is a module or only its probability
    found = None if path is None else _attribute(module, path)
    return float(found) if isinstance(found, (int, float)) else float(getattr(found, "p", 0.0))


def _is_linear(module: Any) -> bool:
    # transformers' Conv1D is told by its name, so that this file needs no transformers; one that peft adapts is refused
    # later, in words
    module = getattr(module, "base_layer", module)
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _sizes(linear: nn.Module) -> tuple[int, ...]:
    # in and out
    weight = getattr(linear, "base_layer", linear).weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape) if type(linear).__name__ == "Conv1D" else tuple(weight.shape[::-1])


def _read_linear(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None, Sources]:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    assert bias is None or isinstance(bias, nn.Parameter)
    sources: Sources = ((name, weight),)
    if bias is not None:
        sources += ((f"{name}_bias", bias),)
    weight_view = weight.detach() if isinstance(module, nn.Linear) else weight.detach().t()
    return weight_view, None if bias is None else bias.detach(), sources


def _check_weights(name: str, module: nn.Module, family: FFNFamily) -> None:
    dtypes = set()
    for part in family.parts:
        if part == family.activation:
            continue
        linear = _attribute(module, part)
        if hasattr(linear, "base_layer"):
            raise TypeError(
                f"{name}.{part}: an adapter of peft stands here, and experts are copies of plain weights. Merge it "
                "first (model.merge_and_unload()), upcycle, and put adapters on the attention after that."
            )
        weight = linear.weight
        # float8 is one byte
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise TypeError(
                f"{name}.{part}: the weight is quantised ({weight.dtype}), and experts are copies of full-precision "
                "weights. Load the model without quantisation, upcycle it, and quantise after that."
            )
        if weight.dim() != 2 or hasattr(weight, "device_mesh"):
            raise ValueError(
                f"{name}.{part}: the weight is sharded already. Upcycle before the strategy or fully_shard wraps the "
                "model: in __init__ or configure_model, or by MoEUpcycleCallback."
            )
        dtypes.add(weight.dtype)
    if len(dtypes) > 1:
        raise ValueError(
            f"{name}: its weights differ in dtype ({', '.join(sorted(map(str, dtypes)))}), as those of T5 do in "
            "float16. Load the model in bfloat16 or float32, or cast it as a whole: model.to(torch.bfloat16)."
        )


def _check_place(name: str, module: nn.Module, family: FFNFamily, model: nn.Module) -> None:
    if p := _probability(module, family.inner_dropout):
        raise ValueError(
            f"{name}: {type(module).__name__} has a dropout of {p:g} between the projections "
            f"({family.inner_dropout}), which would act on the output of the experts. Set it to 0 in the model's "
            f"configuration, or module.{family.inner_dropout} = 0.0 for each of them."
        )
    holders = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    for part in family.absorbed():
        if holders[id(_attribute(module, part))] > 1:
            raise ValueError(
                f"{name}.{part}: several modules share it, and with the FFN it becomes an identity for all of them. "
                f"Give each its own: copy.deepcopy(module.{part})."
            )


def _probe(name: str, module: nn.Module, weights: FFNWeights) -> None:
    if weights.up.is_meta:
        return
    difference, tolerance = _difference(module, weights)
    if difference > tolerance:
        raise ValueError(
            f"{name}: {type(module).__name__} has the parts of a known FFN family but computes something else "
            f"(outputs differ by {difference:.1e} on a probe). Pass `family=FFNFamily(...)` with its own parts."
        )


@torch.no_grad()
def _difference(module: nn.Module, weights: FFNWeights) -> tuple[float, float]:
    # how far a module is from its canonical form on a probe, and how far it may be
    # a fixed, deterministic input that excites every channel; drawing it would move the global generator
    rows = torch.arange(3 * weights.hidden_size, device=weights.up.device, dtype=torch.float32)
    x = torch.sin(rows).view(3, 1, -1).to(weights.up.dtype)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        dense = module(x)
    finally:
        for part, training in modes:
            part.training = training
    canonical = weights(x).float()
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2
    return float((dense.float() - canonical).abs().max()), tolerance * float(canonical.abs().max())


def _no_family_message(model: nn.Module, families: Iterable[FFNFamily]) -> str:
    kinds = {
        f"{type(module).__name__}({', '.join(name for name, _ in module.named_children())})": module
        for module in model.modules()
        if sum(_is_linear(child) for child in module.children()) >= 2
    }
    known = "; ".join(", ".join(family.parts) for family in families)
    fitting = [(type(module).__name__, family) for module in kinds.values() if (family := _fitting_family(module))]
    advice = [f"This one fits {name}: UpcycleConfig(family={_in_one_line(family)})." for name, family in fitting]
    return (
        f"{type(model).__name__}: no FFN of a known family. Looked for modules with the parts: {known}. "
        f"Modules with two linear layers or more: {', '.join(sorted(kinds)) or 'none'}. "
        + (
            " ".join(advice)
            or "Describe yours in one line and pass it: "
            'UpcycleConfig(family=FFNFamily(up="fc_in", down="fc_out", activation="act")).'
        )
    )


def _fitting_family(module: nn.Module) -> FFNFamily | None:
    # the first description made of a module's own parts that computes what the module does
    for family in _possible_families(module):
        if not family.matches(module):
            continue
        weights = family.read(module)
        if weights.up.is_meta:
            continue
        # the width of what goes through a dropout tells where it stands
        widths: dict[str, int] = {}
        hooks = [
            module.get_submodule(name).register_forward_pre_hook(partial(_note_width, widths, name))
            for name in (family.dropout, family.inner_dropout)
            if name is not None
        ]
        try:
            difference, tolerance = _difference(module, weights)
        except Exception:
            # a forward that takes something else raises whatever it likes
            continue
        finally:
            for hook in hooks:
                hook.remove()
        wanted = {family.dropout: weights.hidden_size, family.inner_dropout: weights.expert_size}
        if difference <= tolerance and all(wanted[name] == width for name, width in widths.items()):
            return family
    return None


def _note_width(widths: dict[str, int], name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
    widths[name] = given[0].shape[-1]


def _possible_families(module: nn.Module) -> Iterator[FFNFamily]:
    children = dict(module.named_children())
    linears = [name for name, child in children.items() if _is_linear(child)]
    dropouts = [name for name, child in children.items() if getattr(child, "p", 0) != 0]
    if len(linears) not in (2, 3) or len(dropouts) > 2:
        return
    own = [name for name, value in {**children, **vars(module)}.items() if callable(value) and name[0] != "_"]
    activations = [name for name in own if name not in (*linears, *dropouts)]
    ends = set(permutations([*dropouts, *[None] * (2 - len(dropouts))]))
    for activation, order, fused, (dropout, inner) in product(
        (*activations, *_INLINE_ACTIVATIONS), permutations(linears), (False, True), sorted(ends, key=str)
    ):
        gate = order[0] if len(order) == 3 else None
        sizes = [_sizes(children[name]) for name in order]
        in_size, width = sizes[-1][::-1]
        if (fused and gate) or any(size != (in_size, width * (2 if fused else 1)) for size in sizes[:-1]):
            continue
        yield FFNFamily(
            gate=gate,
            up=order[-2],
            down=order[-1],
            activation=activation,
            fused_gate=fused,
            dropout=dropout,
            inner_dropout=inner,
        )


def _in_one_line(family: FFNFamily) -> str:
    given = {field.name: getattr(family, field.name) for field in fields(family)}
    texts = [
        f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}" for name, value in given.items() if value
    ]
    return f"FFNFamily({', '.join(texts)})"
