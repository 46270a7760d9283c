"""The weights of a dense run, as the start of an upcycled one."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_moe.checkpoints import RECIPE_KEY, read_checkpoint
from lightning_moe.layer import moe_layers


def load_dense(pl_module: LightningModule, path: str | Path) -> None:
    """Loads the weights of a dense checkpoint, and nothing else of it: as ``load_from_checkpoint`` would, in place.

    Args:
        pl_module: the module, dense yet.
        path: what a dense run of it wrote, a file or a directory of shards.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        MisconfigurationException: if it is of an upcycled model, or its names or shapes are not the module's.
        ValueError: if it is no checkpoint.
    """
    place = f"dense_checkpoint={str(path)!r}"
    if layers := moe_layers(pl_module):
        raise MisconfigurationException(
            f"{place}: {next(iter(layers))} is upcycled already. Give it to the first MoEUpcycleCallback, with a dense "
            "module, or load the weights before upcycle(model, config)."
        )
    checkpoint = read_checkpoint(path, optimizers=False)
    if RECIPE_KEY in checkpoint:
        raise MisconfigurationException(
            f"{place} is of an upcycled model. Go on with it by trainer.fit(..., ckpt_path={str(path)!r})."
        )
    pl_module.on_load_checkpoint(checkpoint)
    weights, own = checkpoint["state_dict"], pl_module.state_dict()
    strict = pl_module.strict_loading
    problems = [f"it has no {_some([name for name in own if name not in weights])}"] if strict else []
    problems += [f"the module has no {_some([name for name in weights if name not in own])}"] if strict else []
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ][:1]
    if problems := [problem for problem in problems if not problem.endswith(" no ")]:
        raise MisconfigurationException(
            f"{place} does not fit {type(pl_module).__name__}: {'; '.join(problems)}. Give a checkpoint of the dense "
            "module as it is here."
        )
    pl_module.load_state_dict(weights, strict=strict)


def _some(names: list[Any]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
