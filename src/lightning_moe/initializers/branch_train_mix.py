"""Branch-train-mix: experts from several fine-tuned models."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNFamily, FFNWeights
from lightning_moe.ffn_search import find_ffns
from lightning_moe.initializers.base import ExpertInit, FFNStates, copy_neurons
from lightning_moe.routers import Router
from lightning_moe.routing import MoEWarning

# entries of a configuration that do not change what a model computes from given inputs
_DESCRIBING = {
    "architectures",
    "dtype",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "label2id",
    "max_position_embeddings",
    "pretraining_tp",
    "return_dict",
    "task_specific_params",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


class BranchTrainMixInit(ExpertInit):
    """Makes each expert of the FFN of another fine-tuned model, and averages all that is not an expert.

    The models are of one architecture and configuration, branches of one dense model, each trained on a domain of its
    own. Expert e of
    every layer is the FFN of model e; embeddings, attention, norms, heads, and FFNs that stay dense become the mean
    over all of them. The router is new. Shared experts, where there are any, are the dense model's.

    Reference: Sukhbaatar et al., *Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM*, 2024, section
    3.2, https://arxiv.org/abs/2403.07816, where the model that the branches began with is an expert too.

    A run that is resumed builds the model again before it loads the checkpoint, and so needs the branches again.

    Args:
        models: the branches: of a Hugging Face model names on the Hub or paths, of any model the modules themselves,
            which are only read.
        include_dense: whether the model that is upcycled is the first expert, and part of the mean.

    Raises:
        TypeError: if ``models`` is no list of names and modules.
        ValueError: if there is no branch; at `upcycle`, if ``num_experts`` is not the number of models, if a branch
            cannot be loaded, is the model itself, or is of another architecture or configuration.

    Example:
        >>> BranchTrainMixInit(["my-math-model", "my-code-model"]).expert_size(1536, num_experts=3)
        1536
    """

    def __init__(self, models: Sequence[str | nn.Module], include_dense: bool = True) -> None:
        wanted = "wanted a list of one model or more: names, paths, or the modules themselves."
        if isinstance(models, str) or not isinstance(models, Sequence):
            raise TypeError(f"models={models!r}: {wanted}")
        if odd := [model for model in models if not isinstance(model, (str, nn.Module))]:
            raise TypeError(f"models: {odd[0]!r} is a {type(odd[0]).__name__}; {wanted}")
        if not models:
            raise ValueError(f"models=[]: {wanted}")
        self.models = models
        self.include_dense = include_dense
        self._home = ""
        self._branches: list[nn.Module] = []
        self._ffns: list[Mapping[str, FFNWeights]] = []
        self._layer = ""

    def for_model(self, model: nn.Module, names: Sequence[str], family: FFNFamily | None) -> "BranchTrainMixInit":
        """Loads the branches and compares them with the model, parameter by parameter."""
        found = copy.copy(self)
        found._branches = [_load(model, branch) for branch in self.models]
        found._home = _home(model, found._branches[0], names)
        for number, branch in enumerate(self.models):
            # what was loaded has been compared, before
            if isinstance(branch, nn.Module):
                label = f"models: number {number}, a {type(branch).__name__},"
                _check_branch(label, model.get_submodule(found._home), branch)
        _warn_of_what_stays(model, found._home)
        found._ffns = [find_ffns(branch, family) for branch in found._branches]
        return found

    def for_layer(self, name: str) -> "BranchTrainMixInit":
        """Knows which FFN of each branch is the layer's."""
        found = copy.copy(self)
        found._layer = name[len(self._home) + 1 :] if self._home else name
        return found

    def expert_size(self, dense_size: int, num_experts: int, num_shared: int = 0) -> int:
        """The dense width."""
        wanted = len(self.models) + self.include_dense
        if num_experts != wanted:
            with_dense = " and the dense model itself" if self.include_dense else ""
            number = f"{len(self.models)} model{'s' if len(self.models) > 1 else ''}"
            raise ValueError(
                f"num_experts={num_experts}, and BranchTrainMixInit has {number}{with_dense}; set num_experts={wanted}."
            )
        return dense_size

    def step_zero(self, router: Router) -> tuple[bool, str]:
        """Nothing is as it was."""
        return False, "the experts are the FFNs of several models, and the rest is these models' mean"

    @torch.no_grad()
    def __call__(
        self,
        experts: Experts,
        dense: FFNWeights,
        generator: torch.Generator,
        states: FFNStates | None = None,
    ) -> None:
        """Copies the FFN of each model into its expert."""
        sources = [dense] if self.include_dense else []
        sources += [ffns[self._layer] for ffns in self._ffns]
        for expert, source in enumerate(sources):
            copy_neurons(experts, expert, source, slice(None))

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        """Averages the parameters, and the buffers of floating-point numbers that are saved, one after the other."""
        saved = set(model.get_submodule(self._home).state_dict())
        branches = [_tensors(branch) for branch in self._branches]
        for name, own in _tensors(model.get_submodule(self._home)).items():
            if name not in branches[0] or name not in saved or own.is_meta or not own.is_floating_point():
                continue
            others = [branch[name].to(own.device, torch.float32) for branch in branches]
            parts = [own.float(), *others] if self.include_dense else others
            own.copy_(torch.stack(parts).mean(0))


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    # tied ones once
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _load(model: nn.Module, branch: str | nn.Module) -> nn.Module:
    if isinstance(branch, nn.Module):
        return branch
    # duck typing: a Hugging Face model, wherever it stands in the module
    own: Any = next((part for part in model.modules() if hasattr(type(part), "from_pretrained")), None)
    if own is None:
        raise ValueError(
            f"models: {branch!r} is a name, and {type(model).__name__} holds no Hugging Face model that could be "
            "loaded by name. Give the modules themselves."
        )
    cls = type(own)
    if (Path(branch) / "moe_config.json").is_file():
        raise ValueError(f"models: {branch!r} holds a Mixture-of-Experts model; branches are dense models.")
    if Path(branch).is_dir() and not (Path(branch) / "config.json").is_file():
        raise ValueError(f"models: {branch!r} holds no model: there is no config.json in it.")
    try:
        with torch.device("meta"):
            empty: nn.Module = cls(cls.config_class.from_pretrained(branch))
        # before any weight is loaded: what another architecture's directory lacks would be made anew, at default sizes
        _check_branch(f"models: {branch!r}", own, empty)
        if own.device.type == "meta":
            return empty
        loaded, told = cls.from_pretrained(branch, dtype=own.dtype, output_loading_info=True)
    except (OSError, RuntimeError) as error:
        where = "" if Path(branch).is_dir() else "is no directory here, and from the Hub "
        raise ValueError(f"models: {branch!r} {where}cannot be loaded as {cls.__name__}: {error}") from error
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"models: {branch!r} is no {cls.__name__}: it lacks {missing[0]} and {len(missing) - 1} other weights. "
            "Give branches of the model that is upcycled."
        )
    module: nn.Module = loaded
    return module


def _warn_of_what_stays(model: nn.Module, home: str) -> None:
    inside = {id(parameter) for parameter in model.get_submodule(home).parameters()}
    outside = [name for name, parameter in model.named_parameters() if id(parameter) not in inside]
    if outside:
        warnings.warn(
            f"BranchTrainMixInit: {outside[0]} and {len(outside) - 1} other parameters are no part of the branches, "
            "and stay as they are in the model that is upcycled.",
            MoEWarning,
            stacklevel=4,
        )


def _home(model: nn.Module, branch: nn.Module, names: Sequence[str]) -> str:
    # the part of the model that a branch is a branch of
    wanted = {name for name, _ in branch.named_parameters()}
    for path, part in model.named_modules():
        if {name for name, _ in part.named_parameters()} == wanted:
            outside = [name for name in names if path and not name.startswith(f"{path}.")]
            if outside:
                raise ValueError(f"models: {outside[0]} is no part of {path}, which the branches are branches of.")
            return str(path)
    return ""


def _check_branch(label: str, own: nn.Module, branch: nn.Module) -> None:
    # what differs is told as (what, in the branch, in the model)
    wants = {name: tuple(parameter.shape) for name, parameter in own.named_parameters()}
    has = {name: tuple(parameter.shape) for name, parameter in branch.named_parameters()}
    different = _first_difference(has, wants) or _first_difference(_settings(branch), _settings(own))
    if different:
        what, theirs, ours = different
        raise ValueError(
            f"{label} is of another architecture: {what} is {theirs}, and in the {type(own).__name__} that is upcycled "
            f"{ours}. Give branches of one model, which compute the same with other weights."
        )
    ids = {id(parameter) for parameter in own.parameters()}
    if any(id(parameter) in ids for parameter in branch.parameters()):
        raise ValueError(
            f"{label} is the model that is upcycled, or shares parameters with it. include_dense=True makes it an "
            "expert; as a branch give a copy."
        )


def _first_difference(has: Mapping[str, Any], wants: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    for key in [*wants, *(key for key in has if key not in wants)]:
        theirs, ours = has.get(key, "missing"), wants.get(key, "missing")
        if theirs != ours:
            return key, theirs, ours
    return None


def _settings(model: nn.Module) -> dict[str, Any]:
    # What a model computes, beside its weights: the kind of each module with what it prints of itself (the epsilon of
    # a norm, the variant of a GELU), and the configuration of a Hugging Face model.
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        to_dict = getattr(getattr(module, "config", None), "to_dict", None)
        if callable(to_dict) and (not name or "config" not in found):
            found |= _computing(to_dict(), "config")
        # neither which numbers are dropped in training nor which token is padding changes what is computed
        if isinstance(module, nn.Embedding):
            found[name] = f"{type(module).__name__}(max_norm={module.max_norm})"
        elif not isinstance(module, nn.Dropout):
            found[name] = f"{type(module).__name__}({module.extra_repr()})"
    return found


def _computing(config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    # the entries of a configuration, nested ones too, without those that describe and do not compute
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in _DESCRIBING:
            found |= _computing(value, f"{prefix}.{key}")
        elif not (key.startswith(("_", "output_")) or key.endswith(("_token_id", "dropout")) or key in _DESCRIBING):
            found[f"{prefix}.{key}"] = value
    return found
