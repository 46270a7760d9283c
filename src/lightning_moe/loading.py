"""``load_from_checkpoint`` for LightningModules that know nothing of this package."""

import io
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule

from lightning_moe.checkpoints import RECIPE_KEY, read_checkpoint
from lightning_moe.description import empty_model
from lightning_moe.layer import moe_layers
from lightning_moe.module import MoEModule
from lightning_moe.saving import apply_recipe

Module = TypeVar("Module", bound=LightningModule)


def load_from_checkpoint(
    cls: type[Module], path: str | Path, *, map_location: Any = None, strict: bool | None = None, **kwargs: Any
) -> Module:
    """Loads an upcycled LightningModule: ``cls.load_from_checkpoint(path)``, for checkpoints of `MoEUpcycleCallback`.

    The module is built as Lightning does it, from the saved hyper-parameters, is upcycled as it was when the checkpoint
    was written, and gets the weights. Of `MoEModule`, which needs this only for a directory of shards, the model is
    built from its description in the checkpoint, unless ``model`` is given.

    Args:
        cls: the class of the LightningModule, whose ``__init__`` or ``configure_model`` builds the dense model.
        path: the checkpoint, a file or a directory of shards, see `lightning_moe.checkpoints.read_checkpoint`.
        map_location: where to put the tensors, as for ``torch.load``.
        strict: whether names must match exactly; None as the module says.
        **kwargs: arguments of ``cls``, in the place of saved ones.

    Returns:
        The module.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is none, or the module has not the layers that were upcycled.

    Example:
        >>> import tempfile
        >>> from lightning.pytorch import Trainer
        >>> from lightning_moe import MoEUpcycleCallback, UpcycleConfig
        >>> class Dense(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.ffn = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))
        ...     def predict_step(self, batch, batch_idx):
        ...         return self.ffn(batch)
        >>> callback = MoEUpcycleCallback(UpcycleConfig(num_experts=4))
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        >>> trainer = Trainer(callbacks=[callback], accelerator="cpu", devices=1, **quiet)
        >>> outputs = trainer.predict(Dense(), torch.utils.data.DataLoader(torch.randn(2, 8)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer.save_checkpoint(f"{folder}/moe.ckpt")
        ...     load_from_checkpoint(Dense, f"{folder}/moe.ckpt").ffn.num_experts
        4
    """
    checkpoint = read_checkpoint(path, optimizers=False)
    recipe = checkpoint.get(RECIPE_KEY)
    if issubclass(cls, MoEModule) and "model" not in {*kwargs, *checkpoint.get("hyper_parameters", {})}:
        described = (recipe or {}).get("models", {})
        kwargs |= {name: empty_model(model) for name, model in described.items() if name == "model"}
    source: Any = str(Path(path).expanduser())
    if Path(source).is_dir():
        source = io.BytesIO()
        torch.save(checkpoint, source)
        source.seek(0)
    with _upcycled_at_loading(_class_of(cls, checkpoint), recipe):
        return cls.load_from_checkpoint(source, map_location=map_location, strict=strict, weights_only=True, **kwargs)


def _class_of(cls: type[LightningModule], checkpoint: Mapping[str, Any]) -> type[LightningModule]:
    # LightningCLI saves the class that the configuration named, and Lightning builds that, if it is imported already
    path = checkpoint.get("hyper_parameters", {}).get("_class_path") or ""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) and issubclass(found, cls) else cls


@contextmanager
def _upcycled_at_loading(cls: type[LightningModule], recipe: dict[str, Any] | None) -> Iterator[None]:
    # the last hook before Lightning loads the weights
    own, hook = cls.__dict__.get("on_load_checkpoint"), cls.on_load_checkpoint

    def on_load_checkpoint(module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if recipe is not None and not moe_layers(module):
            apply_recipe(module, recipe)
        hook(module, checkpoint)

    type.__setattr__(cls, "on_load_checkpoint", on_load_checkpoint)
    try:
        yield
    finally:
        if own is None:
            type.__delattr__(cls, "on_load_checkpoint")
        else:
            type.__setattr__(cls, "on_load_checkpoint", own)
