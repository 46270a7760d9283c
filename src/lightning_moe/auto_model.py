"""Upcycled models of any architecture as models that transformers' auto classes load, with this package installed.

For each class of transformers there is one that adds the recipe of the MoE layers: `LlamaForCausalLM` becomes
`UpcycledLlamaForCausalLM`, whose configuration holds the recipe and whose ``from_pretrained`` and ``save_pretrained``
are those of transformers. Importing this module makes the ``model_type`` known to `transformers.AutoConfig`.
"""

import copy
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from lightning_moe.description import dense_form
from lightning_moe.ffn import FFNFamily
from lightning_moe.routing import MoEWarning
from lightning_moe.saving import apply_recipe, moe_recipe

MODEL_TYPE = "lightning_moe"
_PREFIX = "Upcycled"
_MODULE = "modeling_lightning_moe"
_CODE = '''"""What the auto classes of transformers need of this model. Its code is in the package lightning-moe."""

from lightning_moe.auto_model import UpcycledConfig, upcycled_class

__all__ = ["{name}", "UpcycledConfig"]

{name} = upcycled_class("{dense}")
'''


class UpcycledConfig(PreTrainedConfig):
    """The configuration of a dense model, and ``moe_recipe``; each dense class has a subclass of both."""

    model_type = MODEL_TYPE
    dense_class: ClassVar[type[PreTrainedModel]]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Makes that of the class that the dictionary names in ``architectures``."""
        if cls is not UpcycledConfig:
            return super().from_dict(config_dict, **kwargs)
        (name,) = config_dict["architectures"]
        return upcycled_class(name.removeprefix(_PREFIX)).config_class.from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: transformers would copy the file of this class, where `save_pretrained` writes its own."""

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes ``config.json``, and beside it the few lines of Python that its ``auto_map`` names."""
        name = self.dense_class.__name__
        code = _CODE.format(name=f"{_PREFIX}{name}", dense=name)
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{_MODULE}.py").write_text(code, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def dense_config(self) -> PreTrainedConfig:
        """That of the dense model; configurations of parts, where there are any, are shared."""
        made: Any = copy.copy(self)
        made.__class__ = self.dense_class.config_class
        made.architectures = [self.dense_class.__name__]
        for name in ("model_type", "moe_recipe", "auto_map"):
            made.__dict__.pop(name, None)
        config: PreTrainedConfig = made
        return config


class _Upcycled(nn.Module):
    # before the dense class in the order of resolution

    config: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        # some heads ask AutoModel for their body, by the class of the configuration
        dense = config.dense_config()
        super().__init__(dense, *args, **kwargs)
        for module in self.modules():
            if getattr(module, "config", None) is dense:
                module.config = config
        # what was settled meanwhile, as the kind of attention
        vars(config).update({key: value for key, value in vars(dense).items() if key.startswith("_")})
        default = torch.get_default_dtype()
        # from_pretrained builds in the dtype of the weights, where a router's buffers would follow
        torch.set_default_dtype(torch.float32)
        try:
            apply_recipe(self, config.moe_recipe)
        finally:
            torch.set_default_dtype(default)
        self._frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; what low-rank experts share stays frozen."""
        loaded: Any = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name in model._frozen:
            model.get_parameter(name).requires_grad_(False)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers does, with the recipe of the layers as they are by now."""
        self.config.moe_recipe = moe_recipe(self) | {"family": self.config.moe_recipe["family"]}
        # names as they are in the model: what the dense class calls them on disk is not looked for when it is loaded
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]


@cache
def upcycled_class(name: str) -> Any:
    """The class of upcycled models of a class of transformers.

    Args:
        name: of the dense class, such as ``"LlamaForCausalLM"``.

    Raises:
        ValueError: if transformers has no such class, or no auto class loads it.

    Example:
        >>> upcycled_class("LlamaForCausalLM").__mro__[2].__name__
        'LlamaForCausalLM'
    """
    dense = getattr(transformers, name, None)
    if not (isinstance(dense, type) and issubclass(dense, PreTrainedModel)):
        raise ValueError(f"transformers {transformers.__version__} has no model {name}.")
    autos = auto_classes(dense)
    if not autos:
        raise ValueError(f"None of transformers' auto classes loads a {name}; save_moe(model, path) writes it.")
    named = {"__module__": __name__, "model_type": MODEL_TYPE, "dense_class": dense}
    bases: tuple[Any, ...] = (dense.config_class, UpcycledConfig)
    config_class = type(f"{_PREFIX}{name}Config", bases, named)
    made = type(f"{_PREFIX}{name}", (_Upcycled, dense), {"__module__": __name__, "config_class": config_class})
    for auto in autos:
        auto.register(config_class, made, exist_ok=True)
    return made


def as_upcycled(model: PreTrainedModel, family: FFNFamily | None = None) -> PreTrainedModel:
    """The same model as one of its `upcycled_class`, which saves itself; it shares all its parts with the model.

    Args:
        model: an upcycled model.
        family: the family it was upcycled with, if that is none of `FFN_FAMILIES`.

    Raises:
        ValueError: if the model has no MoE layer, its class is none that transformers' auto classes load, or a model
            made from its configuration would not hold its weights.
    """
    dense, dense_config = dense_form(model)
    if getattr(transformers, dense.__name__, None) is not dense:
        raise ValueError(
            f"{dense.__name__} is no class of transformers, so its auto classes do not load it; save_moe(model, path) "
            "writes it, and load_moe(path, model=<the dense one>) reads it."
        )
    cls, name = upcycled_class(dense.__name__), f"{_PREFIX}{dense.__name__}"
    known = {auto.__name__: f"{_MODULE}.{name}" for auto in auto_classes(dense)}
    settings = dense_config.to_dict() | {
        "model_type": MODEL_TYPE,
        "architectures": [name],
        "auto_map": {"AutoConfig": f"{_MODULE}.UpcycledConfig", **known},
        "moe_recipe": moe_recipe(model, family),
    }
    config = cls.config_class.from_dict(settings)
    with torch.device("meta"), warnings.catch_warnings():
        # they were given when the model was upcycled
        warnings.simplefilter("ignore", MoEWarning)
        shapes = {key: tensor.shape for key, tensor in cls(config).state_dict().items()}
    own = {key: tensor.shape for key, tensor in model.state_dict().items()}
    if different := sorted(key for key in {**own, **shapes} if own.get(key) != shapes.get(key)):
        raise ValueError(
            f"{dense.__name__}: a model made from its configuration has other weights, as {different[0]}. Change it by "
            "its configuration alone, or keep it with save_moe(model, path)."
        )
    made = copy.copy(model)
    made.__class__, made.config = cls, config
    return made


def is_own_format(path: Path) -> bool:
    """Whether a directory holds what an `upcycled_class` saved."""
    file = path / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == MODEL_TYPE


def load_own_format(path: Path, dtype: str = "auto") -> Any:
    """Loads what an `upcycled_class` saved, of whichever class it is."""
    config = AutoConfig.from_pretrained(path)
    return upcycled_class(config.dense_class.__name__).from_pretrained(path, config=config, dtype=dtype)


def auto_classes(dense: type[PreTrainedModel]) -> list[Any]:
    """The auto classes of transformers that load a class of its models, `AutoModelForCausalLM` and the like."""
    found: list[Any] = []
    for name in sorted(vars(transformers.models.auto.modeling_auto)):
        auto = getattr(transformers, name, None)
        if not (isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass)) or auto._model_mapping is None:
            continue
        held = auto._model_mapping.get(dense.config_class, None)
        if dense in (held if isinstance(held, tuple) else (held,)):
            found.append(auto)
    return found


AutoConfig.register(MODEL_TYPE, UpcycledConfig, exist_ok=True)
