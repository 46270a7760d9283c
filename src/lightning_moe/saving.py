"""Saves and loads upcycled models: safetensors and one JSON, no pickle.

A *recipe* is the part of an upcycled model that its weights do not tell, in plain Python: which module became a MoE
layer, with which router and how many experts of which width, and what is in 4 bit. It stands in ``moe_config.json`` and
in every Lightning checkpoint.
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import load_torch_model, save_torch_model, save_torch_state_dict
from torch import Tensor, nn

from lightning_moe.__about__ import __version__
from lightning_moe.config import UpcycleConfig
from lightning_moe.description import describe_model, empty_model
from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNFamily, FFNWeights
from lightning_moe.initializers import CopyInit, ExpertInit, FFNStates, LowRankInit
from lightning_moe.layer import MoELayer, moe_layers, plain_name, saved_name
from lightning_moe.low_rank import LowRankExperts
from lightning_moe.native import native_blocks
from lightning_moe.native_import import replace_native
from lightning_moe.quantization import apply_four_bit, four_bit_recipe
from lightning_moe.receipt import Expansion, Receipt
from lightning_moe.routers import ROUTERS, Router
from lightning_moe.routers.base import init_arguments
from lightning_moe.upcycle import upcycle

CONFIG_FILE = "moe_config.json"
# None of transformers' own names: from_pretrained on this directory would build a random model of default size.
WEIGHTS_FILES = "moe_model{suffix}.safetensors"
# 2 where weights are in 4 bit, which readers of format 1 would not know; 1 elsewhere
FORMAT = 2


def moe_recipe(model: nn.Module, family: FFNFamily | None = None) -> dict[str, Any]:
    """Describes the MoE layers of a model in plain Python, so that `apply_recipe` can make them again.

    Args:
        model: an upcycled model.
        family: the family it was upcycled with, if that is none of `FFN_FAMILIES`.

    Raises:
        ValueError: if the model has no MoE layer.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer to save; call upcycle(model, config) first.")
    four_bit = four_bit_recipe(model)
    recipe = {
        "format": 1 if four_bit is None else FORMAT,
        "lightning_moe": __version__,
        "family": None if family is None else vars(family),
        "layers": {saved_name(name): _layer_recipe(name, layer) for name, layer in layers.items()},
    }
    return recipe if four_bit is None else {**recipe, "four_bit": four_bit}


def check_recipe(model: nn.Module, recipe: dict[str, Any] | None, names: Iterable[str]) -> None:
    """Raises if a checkpoint cannot be loaded into a model because its MoE layers are others, before that is tried.

    Args:
        model: an upcycled model, sharded or not.
        recipe: the checkpoint's; None if it has none.
        names: of the tensors in the checkpoint.

    Raises:
        ValueError: if the layers, or the number or width of their experts, are not the same.
    """
    if not moe_layers(model):
        return
    way_out = "Upcycle with the configuration that the checkpoint was trained with."
    own = {plain_name(name): layer for name, layer in moe_recipe(model)["layers"].items()}
    if recipe is None:
        if not any(plain_name(name).startswith(tuple(f"{layer}.experts." for layer in own)) for name in names):
            raise ValueError(
                f"{next(iter(own))}: the checkpoint is that of a dense model, this model has MoE layers. Load it "
                "before upcycling: MoEUpcycleCallback(..., dense_checkpoint=PATH) does, in the place of ckpt_path=PATH."
            )
        return
    layers = {plain_name(name): layer for name, layer in recipe["layers"].items()}
    for name in [*layers, *own]:
        if (name in layers) != (name in own):
            where, other = ("checkpoint", "model") if name in layers else ("model", "checkpoint")
            raise ValueError(f"{name} is a MoE layer in the {where}, and dense in the {other}. {way_out}")
    for name, layer in own.items():
        for key in ("num_experts", "expert_size", "num_shared_experts", "shared_expert_size", "low_rank"):
            if layers[name].get(key) != layer[key] and not (key not in layers[name] and not layer[key]):
                raise ValueError(
                    f"{name}: the checkpoint has {key}={layers[name].get(key)}, this model {layer[key]}. {way_out}"
                )


def apply_recipe(model: nn.Module, recipe: dict[str, Any]) -> None:
    """Gives a dense model the MoE layers of a recipe, in place; their weights are copies of the dense ones.

    What the recipe has in 4 bit is zeros until a checkpoint fills it, and only what trained with it trains.

    Args:
        model: the dense model that the recipe's model was upcycled from, or one of the same architecture.
        recipe: what `moe_recipe` returned.

    Raises:
        ValueError: if the recipe is of a newer format, or its layers are not this model's.
    """
    if recipe.get("format", 0) > FORMAT:
        raise ValueError(
            f"moe_config: format {recipe['format']} was written by lightning-moe {recipe.get('lightning_moe')}; "
            f"{__version__} reads up to {FORMAT}. Upgrade lightning-moe."
        )
    family = None if recipe["family"] is None else FFNFamily(**recipe["family"])
    natives = set(native_blocks(model)) & set(recipe["layers"])
    if natives:
        replace_native(model, {name: _router_of(recipe["layers"][name]) for name in natives})
    for name in natives:
        moe_layers(model)[name].capacity_factor = recipe["layers"][name].get("capacity_factor")
    built: dict[str, tuple[Any, ...]] = {}
    for name, layer in recipe["layers"].items():
        if name in natives:
            continue
        key = json.dumps(
            {part: value for part, value in layer.items() if not part.endswith("expert_size")}, sort_keys=True
        )
        built.setdefault(key, (layer, []))[1].append(name)
    configs = [_config_of(layer, names, recipe["layers"], family) for layer, names in built.values()]
    for config in configs:
        upcycle(model, config)
    if four_bit := recipe.get("four_bit"):
        apply_four_bit(model, four_bit)


def _config_of(
    layer: dict[str, Any], names: list[str], layers: dict[str, dict[str, Any]], family: FFNFamily | None
) -> UpcycleConfig:
    # one configuration serves all layers that differ in their widths only
    return UpcycleConfig(
        num_experts=layer["num_experts"],
        router=_router_of(layer),
        init=_AsSaved(layers),
        num_shared_experts=layer.get("num_shared_experts", 0),
        capacity_factor=layer.get("capacity_factor"),
        layers=names,
        family=family,
    )


def _router_of(layer: dict[str, Any]) -> Callable[[int, int], Router]:
    router_class, arguments = _router_class(layer["router"]["class_path"]), layer["router"]["init_args"]

    def router(hidden_size: int, num_experts: int) -> Router:
        return router_class(hidden_size, num_experts, **arguments)

    return router


def unfilled(config: UpcycleConfig) -> UpcycleConfig:
    """The same layers, for a checkpoint to fill: no calibration batch is looked at, and the experts are zeros."""
    router_init = None if config.router_init is not None and config.router_init.needs_inputs else config.router_init
    return replace(config, init=_Unfilled(config.init or CopyInit()), router_init=router_init)


class _Unfilled(ExpertInit):
    # kind and widths of the experts alone
    copies_dense = True

    def __init__(self, init: ExpertInit) -> None:
        self.init = init

    def expert_size(self, dense_size: int, num_experts: int, num_shared: int = 0) -> int:
        return self.init.expert_size(dense_size, num_experts, num_shared)

    def shared_size(self, dense_size: int, num_experts: int, num_shared: int) -> int:
        return self.init.shared_size(dense_size, num_experts, num_shared)

    def new_experts(self, num_experts: int, expert_size: int, dense: FFNWeights) -> Experts:
        return self.init.new_experts(num_experts, expert_size, dense)

    @torch.no_grad()
    def __call__(
        self, experts: Experts, dense: FFNWeights, generator: torch.Generator, states: FFNStates | None = None
    ) -> None:
        for parameter in experts.parameters(recurse=False):
            parameter.zero_()

    def fill_shared(
        self, shared: Experts, dense: FFNWeights, generator: torch.Generator, states: FFNStates | None
    ) -> None:
        self(shared, dense, generator, states)


class _AsSaved(ExpertInit):
    # what will be loaded takes the place of every weight: only kind and widths of the experts count
    copies_dense = True

    def __init__(self, layers: dict[str, dict[str, Any]], layer: dict[str, Any] | None = None) -> None:
        self.layers = layers
        self.layer = layer or {}

    def for_layer(self, name: str) -> ExpertInit:
        return _AsSaved(self.layers, self.layers[name])

    def expert_size(self, dense_size: int, num_experts: int, num_shared: int = 0) -> int:
        size: int = self.layer["expert_size"]
        return size

    def shared_size(self, dense_size: int, num_experts: int, num_shared: int) -> int:
        return self.layer.get("shared_expert_size") or dense_size

    def new_experts(self, num_experts: int, expert_size: int, dense: FFNWeights) -> Experts:
        if low_rank := self.layer.get("low_rank"):
            return LowRankInit(**low_rank).new_experts(num_experts, expert_size, dense)
        return super().new_experts(num_experts, expert_size, dense)

    def __call__(
        self, experts: Experts, dense: FFNWeights, generator: torch.Generator, states: FFNStates | None = None
    ) -> None:
        if isinstance(experts, LowRankExperts):
            LowRankInit(experts.rank, experts.alpha)(experts, dense, generator, states)
        elif experts.expert_size == dense.expert_size:
            CopyInit()(experts, dense, generator, states)

    def fill_shared(
        self, shared: Experts, dense: FFNWeights, generator: torch.Generator, states: FFNStates | None
    ) -> None:
        self(shared, dense, generator, states)


def save_moe(
    model: nn.Module, path: str | Path, *, family: FFNFamily | None = None, receipt: Receipt | Expansion | None = None
) -> None:
    """Writes an upcycled model to a directory: ``moe_model*.safetensors`` and ``moe_config.json``.

    Args:
        model: an upcycled model; for a Hugging Face model its configuration is written too, so that `load_moe` needs
            nothing else.
        path: the directory, made if it does not exist.
        family: the family it was upcycled with, if that is none of `FFN_FAMILIES`.
        receipt: what `upcycle` or `expand` returned, to be kept beside the recipe; loading does not need it.

    Raises:
        ValueError: if the model has no MoE layer.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
        >>> receipt = upcycle(model, UpcycleConfig(num_experts=4))
        >>> dense = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
        >>> with tempfile.TemporaryDirectory() as path:
        ...     save_moe(model, path)
        ...     loaded = load_moe(path, model=dense)
        >>> bool((loaded[0].router.gate == model[0].router.gate).all())
        True
    """
    described = describe_model(model) if isinstance(model, transformers.PreTrainedModel) else None
    config = {"recipe": moe_recipe(model, family), "model": described}
    write_moe(model, Path(path), config | ({} if receipt is None else {"receipt": receipt.to_dict()}))


def write_moe(weights: nn.Module | dict[str, Tensor], path: Path, config: dict[str, Any]) -> None:
    """Writes the files that `save_moe` writes, or, to a path that ends in ``.safetensors``, one and a JSON beside it.

    Args:
        weights: the upcycled model, or its weights by name.
        path: the directory, made if it does not exist; or the file.
        config: ``recipe``, ``model`` and what else the JSON shall hold, in plain Python.
    """
    text = json.dumps(config, indent=2) + "\n"
    is_file = path.suffix == ".safetensors"
    directory = path.parent if is_file else path
    directory.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"filename_pattern": WEIGHTS_FILES}
    if is_file:
        options = {"filename_pattern": f"{path.stem}{{suffix}}.safetensors", "max_shard_size": sys.maxsize}
    if isinstance(weights, nn.Module):
        save_torch_model(weights, directory, **options)
    else:
        save_torch_state_dict(weights, directory, **options)
    (path.with_suffix(".json") if is_file else path / CONFIG_FILE).write_text(text)


def load_moe(path: str | Path, *, model: nn.Module | None = None) -> nn.Module:
    """Loads what `save_moe` wrote, in evaluation mode, as ``from_pretrained`` does: call ``.train()`` to train.

    Every parameter trains, but for the FFN that low-rank experts share: what had been frozen is to be frozen again. Of
    a model with weights in 4 bit, what trained when it was saved does. In evaluation mode capacities and a router's
    noise are off; `MoEUpcycleCallback` sets its layers to training itself.

    Args:
        path: the directory.
        model: the dense model to build on; needed for what is no Hugging Face model. It is changed in place.

    Returns:
        The upcycled model.

    Raises:
        FileNotFoundError: if the directory holds no ``moe_config.json``.
        ValueError: if the weights do not fit, or if the saved model is no Hugging Face model and ``model`` is None.
    """
    model = _upcycled(path, model)
    result: Any = load_torch_model(model, Path(path), strict=False, filename_pattern=WEIGHTS_FILES)
    missing = [key for key in result.missing_keys if not _is_tied(model, key, set(result.missing_keys))]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{path}: the weights do not fit {type(model).__name__}. Missing: {missing[:3]}; unexpected: "
            f"{list(result.unexpected_keys)[:3]}. Build the dense model as it was when the MoE was saved."
        )
    return model.eval()


def empty_moe(path: str | Path) -> nn.Module:
    """Builds what `save_moe` wrote on the meta device: its shapes, without its weights.

    Args:
        path: the directory.

    Raises:
        FileNotFoundError: if the directory holds no ``moe_config.json``.
        ValueError: if the saved model is no Hugging Face model.
    """
    with torch.device("meta"):
        return _upcycled(path, None, meta=True).eval()


def _upcycled(path: str | Path, model: nn.Module | None, *, meta: bool = False) -> nn.Module:
    # as the recipe says, its weights not yet loaded
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist. Give the directory that save_moe(model, path) wrote.")
    config = json.loads(file.read_text())
    if model is None:
        if config["model"] is None:
            raise ValueError(
                f"{path} was saved from a model that is none of transformers'; pass model=<the dense one>."
            )
        model = empty_model(config["model"], meta=meta)
    apply_recipe(model, config["recipe"])
    return model


def _layer_recipe(name: str, layer: MoELayer) -> dict[str, Any]:
    router, experts = type(layer.router), layer.plain_experts
    arguments = init_arguments(layer.router, skip=("hidden_size", "num_experts"))
    try:
        json.dumps(arguments)
    except TypeError as error:
        raise ValueError(
            f"{name}: the arguments of {router.__name__} cannot be written as JSON ({error}). Give its __init__ plain "
            "numbers, strings, lists or None."
        ) from error
    return {
        "num_experts": experts.num_experts,
        "num_shared_experts": 0 if layer.shared_experts is None else layer.shared_experts.num_experts,
        "capacity_factor": layer.capacity_factor,
        "expert_size": experts.expert_size,
        "shared_expert_size": None if layer.shared_experts is None else layer.shared_experts.expert_size,
        "low_rank": {"rank": experts.rank, "alpha": experts.alpha} if isinstance(experts, LowRankExperts) else None,
        "router": {"class_path": f"{router.__module__}.{router.__qualname__}", "init_args": arguments},
    }


def _router_class(class_path: str) -> type[Router]:
    module, _, name = class_path.rpartition(".")
    own = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in ROUTERS}
    try:
        cls = own.get(class_path) or getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"The model was saved with the router {class_path}, which cannot be imported here ({error}). Install the "
            "package that defines it, or put its file on the Python path."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Router)):
        raise ValueError(f"The model was saved with the router {class_path}, which is no Router.")
    return cls


def _is_tied(model: nn.Module, key: str, missing: set[str]) -> bool:
    # one tensor under two names is written once
    def tensor(name: str) -> Tensor | None:
        owner, _, attribute = name.rpartition(".")
        found = getattr(model.get_submodule(owner), attribute)
        return found if isinstance(found, Tensor) else None

    own = tensor(key)
    others = (name for name, _ in model.named_parameters(remove_duplicate=False) if name not in missing)
    return any(tensor(name) is own for name in others)
