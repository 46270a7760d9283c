"""Runs a model on batches: for what initialisers look at, and for its outputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_moe.ffn import FFNWeights
from lightning_moe.initializers import ExpertInit, FFNStates, RouterInit

Batch = Mapping[str, Any] | Tensor | Sequence[Any]
"""Inputs of a model: keyword arguments, one tensor, or a tuple whose first entry is one, as datasets give them."""


def calibrate(
    model: nn.Module,
    dense: Mapping[str, FFNWeights],
    parts: Sequence[ExpertInit | RouterInit | None],
    batches: Sequence[Batch] | None,
) -> dict[str, FFNStates]:
    """Collects what the initialisers get to see of each FFN; nothing, if none of them looks, or on the meta device.

    Args:
        model: the dense model; its modes, gradients and random numbers stay as they are.
        dense: its FFNs, by name.
        parts: the initialisers.
        batches: inputs of the model. For the saliency they need labels: a mapping with ``labels``, or of a causal
            language model, whose ``input_ids`` are its labels.

    Raises:
        ValueError: if an initialiser looks and there is nothing to look at.
    """
    needy = [part for part in parts if part is not None and looks_at_states(part)]
    if not needy or next(iter(dense.values())).up.is_meta:
        return {}
    if not batches:
        raise ValueError(
            f"{type(needy[0]).__name__} looks at what passes through the model: give upcycle(..., calibration=[batch, "
            "...]) or MoEUpcycleCallback(..., calibration=...) some batches."
        )
    states = _hidden_states(model, list(dense), batches) if any(part.needs_inputs for part in needy) else {}
    saliency = _saliency(model, dense, batches) if any(_needs_saliency(part) for part in needy) else {}
    return {name: FFNStates(states.get(name, ()), saliency.get(name)) for name in dense}


def looks_at_states(part: ExpertInit | RouterInit | None) -> bool:
    """Whether an initialiser looks at what passes through the FFNs on calibration batches."""
    return part is not None and (part.needs_inputs or _needs_saliency(part))


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> Tensor:
    """Computes a model's logits, its last hidden states, or CLIP's logits per image, in evaluation mode.

    Raises:
        TypeError: if the model returns something else.
    """
    with evaluating(model):
        given = batch[0] if isinstance(batch, (list, tuple)) else batch
        out = model(**given) if isinstance(given, Mapping) else model(given)
    for key in ("logits", "last_hidden_state", "logits_per_image"):
        out = getattr(out, key, out)
    if not isinstance(out, Tensor):
        raise TypeError(f"batch: {type(model).__name__} returned {type(out).__name__}; wanted a tensor or `.logits`.")
    return out


def generates(module: nn.Module) -> bool:
    """Whether this is a causal language model of transformers."""
    can_generate = getattr(module, "can_generate", None)
    is_encoder_decoder = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    return callable(can_generate) and bool(can_generate()) and not is_encoder_decoder


def _needs_saliency(part: ExpertInit | RouterInit | None) -> bool:
    return isinstance(part, ExpertInit) and part.needs_saliency


def difference(before: Tensor, after: Tensor) -> float:
    """The largest absolute difference of two outputs, in float32."""
    return float((before.float() - after.float()).abs().max())


def as_labels(batch: Mapping[str, Any]) -> Tensor:
    """The ``input_ids`` as labels, padding left out: -100, as transformers' losses take it."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels: Tensor = ids if mask is None else ids.masked_fill(mask == 0, -100)
    return labels


def check_batches(name: str, batches: Any) -> None:
    """Raises a `TypeError` if this is no list of batches, or None; ``name`` is the argument's."""
    if batches is None:
        return
    wanted = f"wanted a list of inputs of the model, as {name}=[batch, ...]"
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Sequence):
        one = isinstance(batches, (Mapping, Tensor))
        raise TypeError(f"{name} is {'one batch' if one else repr(batches)}; {wanted}.")
    for number, batch in enumerate(batches):
        check_batch(f"{name}[{number}]", batch)


def check_batch(name: str, batch: Any) -> None:
    """Raises if this is not the inputs of a model, or if they are empty; ``name`` is the argument's."""
    inside = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not isinstance(inside, (Mapping, Tensor)):
        raise TypeError(
            f"{name} is {batch!r}, a {type(batch).__name__}; wanted inputs of the model: a mapping of keyword "
            "arguments, as a tokenizer's output, or a tensor."
        )
    values = inside.values() if isinstance(inside, Mapping) else [inside]
    if any(isinstance(value, Tensor) and value.numel() == 0 for value in values):
        raise ValueError(f"{name} holds no token, or padding only. Give each batch some text.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode, and each of its modules back into its own mode."""
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training:
            module.training = training


@contextmanager
def _hooked(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _unpadded(x: Tensor, batch: Batch) -> Tensor:
    rows = x.detach().flatten(0, -2)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return rows[mask.reshape(-1).bool()] if mask is not None and mask.numel() == len(rows) else rows


def _hidden_states(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, list[Tensor]]:
    # what reaches each FFN, one tensor for each batch
    collected: dict[str, list[Tensor]] = {name: [] for name in names}
    current: list[Batch] = []

    def keeper(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = _unpadded(given[0], current[0])
            if not len(rows):
                raise ValueError(
                    f"calibration[{len(collected[name])}] holds no token, or padding only. Give each batch some text."
                )
            if not bool(rows.isfinite().all()):
                raise ValueError(
                    f"calibration[{len(collected[name])}]: the hidden states before {name} are not all finite numbers. "
                    "Give other batches, or look at the weights of the model."
                )
            collected[name].append(rows)

        return keep

    with _hooked([model.get_submodule(name).register_forward_pre_hook(keeper(name)) for name in names]):
        for batch in batches:
            current[:] = [batch]
            outputs(model, batch)
    return collected


@torch.enable_grad()
def _saliency(model: nn.Module, dense: Mapping[str, FFNWeights], batches: Sequence[Batch]) -> dict[str, Tensor]:
    # h * dL/dh at the input h of each down projection, which is found by its weight
    owners = {id(weight): module for module in model.modules() for weight in module._parameters.values()}
    downs = {name: owners[id(dict(ffn.sources)["down"])] for name, ffn in dense.items()}
    collected: dict[str, list[Tensor]] = {name: [] for name in dense}
    for number, batch in enumerate(batches):
        hidden: dict[str, Tensor] = {}

        def keeper(name: str, into: dict[str, Tensor] = hidden) -> Callable[[nn.Module, tuple[Tensor, ...]], Any]:
            def keep(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                # of a frozen model nothing has a gradient yet
                into[name] = given[0] if given[0].requires_grad else given[0].detach().requires_grad_()
                return (into[name], *given[1:])

            return keep

        with _hooked([down.register_forward_pre_hook(keeper(name)) for name, down in downs.items()]):
            loss = _loss(model, batch)
        if not bool(loss.isfinite().all()):
            raise ValueError(
                f"calibration[{number}]: the loss is {float(loss.detach())}, and importance by gradient needs a finite "
                "one. Give batches with labels that are not all -100, or look at the weights of the model."
            )
        # and not backward(), which would add to the parameters' gradients
        gradients = torch.autograd.grad(loss, list(hidden.values()), allow_unused=True)
        for (name, h), gradient in zip(hidden.items(), gradients, strict=True):
            product = torch.zeros_like(h) if gradient is None else h * gradient
            collected[name].append(_unpadded(product, batch))
    return {name: torch.cat(parts) for name, parts in collected.items()}


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    # the loss wants the logits of all tokens, where hidden states did not
    given = {key: v for key, v in batch.items() if key != "logits_to_keep"} if isinstance(batch, Mapping) else {}
    if "labels" not in given and "input_ids" in given and any(generates(module) for module in model.modules()):
        given["labels"] = as_labels(given)
    with evaluating(model):
        out = model(**given) if "labels" in given else None
    loss = getattr(out, "loss", None)
    if not isinstance(loss, Tensor):
        has = f"with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else "that are no mappings"
        raise ValueError(
            f"calibration: {type(model).__name__} gives no loss on batches {has}, and importance by gradient needs "
            'one. Give "labels", or a causal language model its "input_ids", or take method="activation".'
        )
    return loss
