"""The blocks of a model around its MoE layers: what is sharded, gathered or recomputed together."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from lightning_moe.layer import MoELayer, plain_name
from lightning_moe.native import native_blocks


def moe_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The MoE layers, and the MoE blocks that a Hugging Face model brings itself, by path."""
    native = set(native_blocks(module))
    return {
        path: part
        for path, part in module.named_modules()
        if isinstance(part, MoELayer) or (native and plain_name(path) in native)
    }


def moe_blocks(module: nn.Module) -> list[nn.Module]:
    """The decoder blocks that hold a MoE layer, and their siblings, in the order of the model.

    They are what stands in the innermost `ModuleList` around each layer.
    """
    found: dict[int, nn.ModuleList] = {}
    for path in moe_modules(module):
        for above in reversed(list(_above(path))):
            part = module.get_submodule(above)
            if isinstance(part, nn.ModuleList):
                found[id(part)] = part
                break
    return [block for blocks in found.values() for block in blocks]


def loose_layers(module: nn.Module) -> list[nn.Module]:
    """The MoE layers that stand in no `ModuleList`."""
    blocks = {id(block) for block in moe_blocks(module)}
    return [layer for path, layer in moe_modules(module).items() if not _parents(module, path) & blocks]


def sharding_units(module: nn.Module) -> Iterator[nn.Module]:
    """What gathers its parameters for its own forward and backward: inner units first, as `fully_shard` wants them.

    The blocks around the MoE layers, the layers that have none around them, the Hugging Face models around all of
    these, and every other module that has parameters of its own. An expert is never a unit.
    """
    yielded: set[int] = set()

    def new(unit: nn.Module) -> Iterator[nn.Module]:
        if id(unit) not in yielded and any(True for _ in unit.parameters()):
            yielded.add(id(unit))
            yield unit

    for inner in (*moe_blocks(module), *loose_layers(module)):
        yield from new(inner)
    models = {id(part) for part in module.modules() if isinstance(part, PreTrainedModel)}
    for path, part in module.named_modules():
        if id(part) in models and not _parents(module, path) & models:
            yield from new(part)
    for path, part in module.named_modules():
        has_own = any(True for _ in part.parameters(recurse=False))
        # whatever stands inside of a unit is sharded with it
        if part is not module and has_own and not _parents(module, path) & yielded:
            yield from new(part)


def _above(path: str) -> Iterator[str]:
    # the paths of all modules around this one, the outermost first
    parts = path.split(".")
    yield from (".".join(parts[:end]) for end in range(len(parts)))


def _parents(module: nn.Module, path: str) -> set[int]:
    return {id(module.get_submodule(above)) for above in _above(path)}
