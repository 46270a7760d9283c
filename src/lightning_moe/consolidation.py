"""Any Lightning checkpoint of an upcycled model, sharded or not, as one: safetensors, or a file to go on from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_moe.checkpoints import RECIPE_KEY, read_checkpoint
from lightning_moe.checks import check_free
from lightning_moe.description import describe_model, empty_model
from lightning_moe.layer import plain_name
from lightning_moe.replacing import replacing
from lightning_moe.saving import apply_recipe, write_moe


@dataclass(frozen=True)
class Consolidated:
    """What `consolidate` wrote.

    Args:
        path: the directory or file.
        model: the class of the Hugging Face model in it, which `load_moe` builds by itself; None for any other module.
        num_parameters: how many.
        global_step: optimizer steps that the model was trained for; None if the checkpoint does not say.
    """

    path: str
    model: str | None
    num_parameters: int
    global_step: int | None

    def __str__(self) -> str:
        kind = self.model or ("a checkpoint" if self.path.endswith(".ckpt") else "a LightningModule's weights")
        steps = "" if self.global_step is None else f", after {self.global_step} steps"
        return f"{self.path}: {kind}, {self.num_parameters / 1e6:.1f} M parameters{steps}."


def consolidate(
    path: str | Path, output: str | Path, *, model: transformers.PreTrainedModel | None = None
) -> Consolidated:
    """Makes one of a checkpoint: whichever strategy wrote it, on however many processes.

    The name of the output says what is written: a directory, what `save_moe` writes, for `load_moe`,
    ``lightning-moe export`` and ``evaluate``; ``*.safetensors``, one file of weights, with the recipe in a JSON beside
    it; ``*.ckpt``, one file that ``trainer.fit(ckpt_path=...)`` goes on from with any strategy, optimizer states
    included.

    The Hugging Face model in the LightningModule is found, and what is around it left out. Where there is none, all
    weights are written under their names in the LightningModule, for ``load_moe(output, model=<the dense module>)``.

    Args:
        path: the checkpoint, see `read_checkpoint`.
        output: the directory or file to write, which must not exist.
        model: the dense model that was upcycled, for a checkpoint that does not describe it; its weights are not used.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        FileExistsError: if the output exists.
        ValueError: if this is no checkpoint of an upcycled model, or ``model`` is not the one that it is of.

    Example:
        >>> import tempfile
        >>> from lightning_moe import UpcycleConfig, upcycle
        >>> from lightning_moe.saving import moe_recipe
        >>> net = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
        >>> receipt = upcycle(net, UpcycleConfig(num_experts=4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": net.state_dict(), "lightning_moe": moe_recipe(net)}, f"{folder}/last.ckpt")
        ...     print(consolidate(f"{folder}/last.ckpt", f"{folder}/moe").num_parameters)
        1152
    """
    target = Path(output).expanduser()
    check_free("output", target)
    if target.suffix == ".safetensors":
        check_free("output", target.with_suffix(".json"))
    checkpoint = read_checkpoint(path, optimizers=target.suffix == ".ckpt")
    if target.suffix == ".ckpt":
        with replacing(target) as temporary:
            torch.save(checkpoint, temporary)
        return _told(target, checkpoint, None, checkpoint["state_dict"])
    recipe = _recipe(path, checkpoint)
    prefix, described = _find_model(recipe, model)
    weights = _in_memory(_inside({plain_name(name): value for name, value in checkpoint["state_dict"].items()}, prefix))
    recipe = {key: recipe[key] for key in ("format", "lightning_moe", "family")} | {
        "layers": _inside(recipe["layers"], prefix)
    }
    found = weights if described is None else _load(path, described, recipe, weights)
    if isinstance(found, transformers.PreTrainedModel):
        # in the dtype that the weights have
        described = describe_model(found)
    config = {"recipe": recipe, "model": described, **_facts(checkpoint)}
    if target.suffix == ".safetensors":
        write_moe(found, target, config)
    else:
        with replacing(target) as temporary:
            write_moe(found, temporary, config)
    return _told(target, checkpoint, described, weights)


def _recipe(path: str | Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    recipe = checkpoint.get(RECIPE_KEY)
    if recipe is not None:
        return {**recipe, "layers": {plain_name(name): layer for name, layer in recipe["layers"].items()}}
    if any(".experts." in name for name in checkpoint["state_dict"]):
        raise ValueError(
            f"{path} has experts, but no recipe of them: it was saved without MoEUpcycleCallback. Load its weights "
            "into the upcycled module, and call save_moe(model, directory)."
        )
    raise ValueError(f"{path} is that of a dense model: there is no MoE layer in it. Write it with save_pretrained.")


def _find_model(
    recipe: Mapping[str, Any], model: transformers.PreTrainedModel | None
) -> tuple[str, dict[str, Any] | None]:
    # the path of the Hugging Face model that has all the MoE layers, with its dot, and what it is
    names = list(recipe["layers"])
    if model is not None:
        known = {name for name, _ in model.named_modules()}
        for start in _starts(names[0]):
            if all(name.startswith(start) and name.removeprefix(start) in known for name in names):
                return start, describe_model(model)
        raise ValueError(
            f"model: {type(model).__name__} has no module that is {names[0]} in the checkpoint, with or without what "
            "stands before. Give the dense model that was upcycled."
        )
    for path, described in recipe.get("models", {}).items():
        start = f"{path}." if path else ""
        if all(name.startswith(start) for name in names):
            return start, described
    return "", None


def _starts(name: str) -> list[str]:
    # "", "net.", "net.inner.", ...
    parts = name.split(".")
    return ["".join(f"{part}." for part in parts[:end]) for end in range(len(parts))]


def _inside(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _in_memory(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # a mapped tensor is a view of the whole file, which safetensors refuses; what was tied stays so
    copies = {(value.data_ptr(), value.shape): value for value in weights.values()}
    copies = {key: value.clone(memory_format=torch.contiguous_format) for key, value in copies.items()}
    return {name: copies[value.data_ptr(), value.shape] for name, value in weights.items()}


def _load(path: str | Path, described: dict[str, Any], recipe: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    # the weights in a model, so that what does not fit is seen before anything is written
    model: Any = empty_model(described, meta=True)
    apply_recipe(model, recipe)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    foreign = [name for name in weights if name not in shapes]
    other = [name for name, value in weights.items() if name in shapes and value.shape != shapes[name]]
    model.load_state_dict(
        {name: value for name, value in weights.items() if name not in other}, strict=False, assign=True
    )
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta and name not in other]
    problems = [f"it has no {name}" for name in missing[:1]] + [f"{name} is not in the model" for name in foreign[:1]]
    problems += [f"{name} is {tuple(weights[name].shape)}, not {tuple(shapes[name])}" for name in other[:1]]
    if problems:
        raise ValueError(
            f"{path} does not fit {described['class']}: {'; '.join(problems)}. Give the dense model that was upcycled."
        )
    return model  # type: ignore[no-any-return]


def _facts(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {key: checkpoint[key] for key in ("epoch", "global_step") if key in checkpoint}
    try:
        facts["hyper_parameters"] = json.loads(json.dumps(dict(checkpoint.get("hyper_parameters", {}))))
    except (TypeError, ValueError):
        facts["hyper_parameters"] = None
    receipts = list(checkpoint[RECIPE_KEY].get("receipts", {}).values())
    return {"checkpoint": facts} | ({"receipt": receipts[0]} if len(receipts) == 1 else {})


def _told(
    target: Path, checkpoint: Mapping[str, Any], described: dict[str, Any] | None, weights: Mapping[str, Tensor]
) -> Consolidated:
    # tied weights are one tensor under two names
    sizes = {(value.data_ptr(), value.shape): value.numel() for value in weights.values()}
    model = None if described is None else str(described["class"])
    return Consolidated(str(target), model, sum(sizes.values()), checkpoint.get("global_step"))
