"""What a Hugging Face model is beside its weights, in plain Python: class, configurations and dtype; and back."""

import json
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.initialization import no_init_weights

from lightning_moe.layer import moe_layers, plain_name


def describe_model(model: transformers.PreTrainedModel) -> dict[str, Any]:
    """Describes a model so that `empty_model` can build one like it; a sharded one as if it were whole."""
    cls, config = dense_form(model)
    return {
        "class": cls.__name__,
        "config": json.loads(config.to_json_string(use_diff=False)),
        "generation_config": _generation_config(model),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def dense_form(model: transformers.PreTrainedModel) -> tuple[type[transformers.PreTrainedModel], Any]:
    """The class and the configuration of the dense model; a model that AutoModel loaded has others of its own."""
    config: Any = model.config
    if hasattr(config, "dense_class"):
        return config.dense_class, config.dense_config()
    # fully_shard puts a class of its own in front
    dense: Any = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
    return dense, config


def describe_models(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Describes the Hugging Face models in a module that have MoE layers, under their paths.

    Example:
        >>> describe_models(nn.Sequential(nn.Linear(8, 8)))
        {}
    """
    layers = [plain_name(name) for name in moe_layers(module)]
    found: dict[str, dict[str, Any]] = {}
    for path, part in module.named_modules():
        if not isinstance(part, transformers.PreTrainedModel) or any(_is_inside(path, outer) for outer in found):
            continue
        if any(_is_inside(layer, plain_name(path)) for layer in layers):
            found[plain_name(path)] = describe_model(part)
    return found


def empty_model(described: dict[str, Any], *, meta: bool = False) -> nn.Module:
    """Builds a model as `describe_model` described it, without weights worth anything.

    Args:
        described: what `describe_model` returned.
        meta: whether its parameters are on the meta device, where they take no memory.

    Raises:
        ValueError: if this version of transformers does not have its class.
    """
    cls = getattr(transformers, described["class"], None)
    if cls is None:
        raise ValueError(
            f"The model was saved as transformers.{described['class']}, which transformers {transformers.__version__} "
            "does not have. Install the version it was saved with, or pass model=<the dense one>."
        )
    default = torch.get_default_dtype()
    # built in its dtype and not cast to it: a cast would take the float32 buffers of the rotary embedding along
    torch.set_default_dtype(getattr(torch, described["dtype"]))
    try:
        with no_init_weights(), torch.device("meta" if meta else "cpu"):
            model: transformers.PreTrainedModel = cls(cls.config_class.from_dict(described["config"]))
    finally:
        torch.set_default_dtype(default)
    # skipping the initialisation skips the tying too
    model.tie_weights()
    if described["generation_config"] is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(described["generation_config"])
    return model


def _generation_config(model: transformers.PreTrainedModel) -> dict[str, Any] | None:
    generation = getattr(model, "generation_config", None)
    return None if generation is None else json.loads(generation.to_json_string())


def _is_inside(path: str, outer: str) -> bool:
    return outer == "" or path == outer or path.startswith(f"{outer}.")
