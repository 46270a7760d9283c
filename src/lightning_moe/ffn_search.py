"""Finds the dense FFNs of a model, by the table of families.

Before a module is replaced, its output on a probe is compared with that of the canonical form, so that one that has the
parts of a family but computes something else is refused in words.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import product

from torch import nn

from lightning_moe.ffn import FFN_FAMILIES, FFNFamily, FFNWeights, attribute, is_linear, probability_of
from lightning_moe.ffn_probe import no_family_message, probe
from lightning_moe.four_bit import Linear4bit


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
            _check_probe(name, module, weights)
            probed.add(repr(module))
        found[name] = weights
    if not found:
        raise TypeError(no_family_message(model, families))
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
    linears = [getattr(child, "base_layer", child) for child in module.children() if is_linear(child)]
    # Conv1D has nx and nf
    names = [("in_features", "out_features") if isinstance(linear, nn.Linear) else ("nx", "nf") for linear in linears]
    sizes = [(getattr(linear, a), getattr(linear, b)) for linear, (a, b) in zip(linears, names, strict=True)]
    return len(sizes) in (2, 3) and any(
        last[0] > first[0] == last[1] and first[1] in (last[0], 2 * last[0]) for first, last in product(sizes, sizes)
    )


def _check_weights(name: str, module: nn.Module, family: FFNFamily) -> None:
    dtypes = set()
    for part in family.parts:
        if part == family.activation:
            continue
        linear = attribute(module, part)
        if hasattr(linear, "base_layer"):
            raise TypeError(
                f"{name}.{part}: an adapter of peft stands here, and experts are copies of plain weights. Merge it "
                "first (model.merge_and_unload()), upcycle, and put adapters on the attention after that."
            )
        weight = linear.weight
        # float8 is one byte
        if isinstance(linear, Linear4bit) or not weight.is_floating_point() or weight.element_size() < 2:
            kind = "4 bit" if isinstance(linear, Linear4bit) else weight.dtype
            raise TypeError(
                f"{name}.{part}: the weight is quantised ({kind}), and experts are copies of full-precision "
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
    if p := probability_of(module, family.inner_dropout):
        raise ValueError(
            f"{name}: {type(module).__name__} has a dropout of {p:g} between the projections "
            f"({family.inner_dropout}), which would act on the output of the experts. Set it to 0 in the model's "
            f"configuration, or module.{family.inner_dropout} = 0.0 for each of them."
        )
    holders = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    for part in family.absorbed():
        if holders[id(attribute(module, part))] > 1:
            raise ValueError(
                f"{name}.{part}: several modules share it, and with the FFN it becomes an identity for all of them. "
                f"Give each its own: copy.deepcopy(module.{part})."
            )


def _check_probe(name: str, module: nn.Module, weights: FFNWeights) -> None:
    if weights.up.is_meta:
        return
    difference, tolerance = probe(module, weights)
    if difference > tolerance:
        raise ValueError(
            f"{name}: {type(module).__name__} has the parts of a known FFN family but computes something else "
            f"(outputs differ by {difference:.1e} on a probe). Pass `family=FFNFamily(...)` with its own parts."
        )
