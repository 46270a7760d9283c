"""Branch-train-mix: experts from several fine-tuned models."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_moe.experts import Experts
from lightning_moe.ffn import FFNFamily, FFNWeights
from lightning_moe.ffn_search import find_ffns
from lightning_moe.initializers.base import ExpertInit, FFNStates, copy_neurons
from lightning_moe.routers import Router


class BranchTrainMixInit(ExpertInit):
    """Makes each expert of the FFN of another fine-tuned model, and averages all that is not an expert.

    The models are of one architecture, branches of one dense model, each trained on a domain of its own. Expert e of
    every layer is the FFN of model e; embeddings, attention, norms, heads, and FFNs that stay dense become the mean
    over all of them. The router is new. Shared experts, where there are any, are the dense model's.

    Reference: Sukhbaatar et al., *Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM*, 2024, section
    3.2, https://arxiv.org/abs/2403.07816, where the model that the branches began with is an expert too.

    Args:
        models: the branches: of a Hugging Face model names on the Hub or paths, of any model the modules themselves,
            which are only read.
        include_dense: whether the model that is upcycled is the first expert, and part of the mean.

    Raises:
        ValueError: if there is no branch; at `upcycle`, if a branch cannot be loaded or is of another architecture, or
            if ``num_experts`` is not the number of models.

    Example:
        >>> BranchTrainMixInit(["my-math-model", "my-code-model"]).expert_size(1536, num_experts=3)
        1536
    """

    def __init__(self, models: Sequence[str | nn.Module], include_dense: bool = True) -> None:
        if isinstance(models, str) or len(models) == 0:
            raise ValueError(f"models={models!r}: wanted a list of one model or more.")
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
        for number, branch in enumerate(found._branches):
            _check_branch(_label(self.models, number), model.get_submodule(found._home), branch)
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
            raise ValueError(
                f"num_experts={num_experts}, and BranchTrainMixInit has {len(self.models)} models{with_dense}; set "
                f"num_experts={wanted}."
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


def _label(models: Sequence[str | nn.Module], number: int) -> str:
    model = models[number]
    return f"models: {model!r}" if isinstance(model, str) else f"models: number {number}, a {type(model).__name__},"


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
    try:
        with torch.device("meta"):
            empty: nn.Module = cls(cls.config_class.from_pretrained(branch))
        # before any weight is loaded: what another architecture's directory lacks would be made anew, at default sizes
        _check_branch(f"models: {branch!r}", own, empty)
        if own.device.type == "meta":
            return empty
        loaded, told = cls.from_pretrained(branch, dtype=own.dtype, output_loading_info=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"models: {branch!r} cannot be loaded as {cls.__name__}: {error}") from error
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"models: {branch!r} is no {cls.__name__}: it lacks {missing[0]} and {len(missing) - 1} other weights. "
            "Give branches of the model that is upcycled."
        )
    module: nn.Module = loaded
    return module


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
    wanted = {name: tuple(parameter.shape) for name, parameter in own.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in branch.named_parameters()}
    for name in [*wanted, *shapes]:
        if wanted.get(name) != shapes.get(name):
            has, wants = shapes.get(name, "missing"), wanted.get(name, "missing")
            raise ValueError(
                f"{label} is of another architecture: {name} is {has}, and in {type(own).__name__} {wants}. Give "
                "branches of the model that is upcycled."
            )
