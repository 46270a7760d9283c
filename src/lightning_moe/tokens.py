"""What the layers must know of the tokens: ids, padding, sequences; and how it reaches them from the model's inputs."""

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_moe.routing import MoEWarning, is_recomputing


@dataclass(frozen=True)
class Tokens:
    """What is known of the T tokens that a router sees, beside their hidden states.

    Args:
        ids: token ids, where the model got them.
        mask: False marks padding; None means that all tokens are real.
        previous_logits: what the router of the MoE layer before gave for these tokens, where the router asks for it.
    """

    ids: Int[Tensor, " T"] | None = None
    mask: Bool[Tensor, " T"] | None = None
    previous_logits: Float[Tensor, "T choices"] | None = None


@dataclass
class TokenContext:
    """Carries ``input_ids`` and ``attention_mask`` from a model's inputs to the MoE layers inside it.

    One object is shared by the layers of one model. It keeps the inputs of the last forward, and of the last one with
    gradients: activation checkpointing repeats a layer during the backward, when the model's forward has long ended.
    Two forwards with different masks before one backward cannot be told apart then, which gives a warning.

    Layers whose routers build on each other's logits leave theirs in ``logits``, with their own position.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    inputs_with_grad: dict[str, Tensor] = field(default_factory=dict)
    recomputed: bool = True
    ambiguous: bool = False
    logits: tuple[int, Tensor] | None = None

    def tokens(self, batch_size: int, sequence_length: int) -> Tokens:
        """Returns what is known of a (B, S) batch, flattened to T = B·S tokens.

        With a key-value cache the mask covers the past too; the last S columns belong to the tokens at hand.
        """
        found = {}
        for key, value in self._inputs_of_this_forward().items():
            # some models flatten to (T, D) before their FFNs
            if value.numel() == batch_size * sequence_length:
                found[key] = value.reshape(-1)
            elif value.shape[0] == batch_size and value.shape[1] > sequence_length:
                found[key] = value[:, -sequence_length:].reshape(-1)
        mask = found.get("attention_mask")
        return Tokens(found.get("input_ids"), None if mask is None else mask.bool())

    def watch(self, model: nn.Module) -> RemovableHandle:
        """Notes ``input_ids`` and ``attention_mask`` of each forward of a model, given by name or position.

        Returns:
            What ends it.
        """
        parameters = tuple(inspect.signature(model.forward).parameters)
        # no closure: a deep copy or a pickle of the model takes its own context along
        return model.register_forward_pre_hook(partial(self._note_inputs, parameters), with_kwargs=True)

    def _note_inputs(
        self, parameters: tuple[str, ...], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        self.inputs = {
            key: value
            for key in ("input_ids", "attention_mask")
            if isinstance(value := given.get(key), Tensor) and value.dim() == 2
        }
        if torch.is_grad_enabled():
            masks = self.inputs.get("attention_mask"), self.inputs_with_grad.get("attention_mask")
            self.ambiguous = not self.recomputed and masks[0] is not masks[1]
            self.inputs_with_grad, self.recomputed = self.inputs, False

    def _inputs_of_this_forward(self) -> dict[str, Tensor]:
        if not self.inputs or torch.compiler.is_compiling() or not is_recomputing():
            return self.inputs
        if self.ambiguous:
            warnings.warn(
                "Activation checkpointing recomputes the MoE layers of two forwards with different attention masks "
                "before one backward: the balance losses of the first take the mask of the second. Join the two in one "
                "batch, or turn checkpointing or the balance losses off.",
                MoEWarning,
                stacklevel=2,
            )
            self.ambiguous = False
        self.recomputed = True
        return self.inputs_with_grad


def takes_tokens(module: nn.Module) -> bool:
    """Whether a module is a text model: its forward takes ``input_ids``."""
    return "input_ids" in inspect.signature(module.forward).parameters


def takes_pixels(module: nn.Module) -> bool:
    """Whether a module is a vision model: its forward takes ``pixel_values``."""
    return "pixel_values" in inspect.signature(module.forward).parameters


def paths_above(name: str) -> list[str]:
    """The paths of the modules that a module is part of, the innermost first.

    Example:
        >>> paths_above("model.layers.0")
        ['model.layers', 'model', '']
    """
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]


def text_model_around(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Finds the innermost text model that a module is part of, by its path; None in a vision tower, or alone.

    In a vision-language model the vision tower has no token ids, and its patches must not meet the text's padding mask.

    Args:
        modules: all modules of the model, by path.
        name: path of the module.
    """
    # A vision tower ends the search; and so does a model of both, whose text has a model of its own inside.
    homes = (path for path in paths_above(name) if takes_tokens(modules[path]) or takes_pixels(modules[path]))
    home = next(homes, None)
    return None if home is None or takes_pixels(modules[home]) else home
