"""Checkpoints that are whole or not there: what is written takes the place of the old when all of it is on the disk.

Lightning writes one file through a temporary in ``$TMPDIR``, which is copied where that is another file system, and the
shards of a directory into their place, over the old ones: a run that is killed meanwhile has no checkpoint left.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from fsspec.utils import get_protocol
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer

from lightning_moe.checkpoints import kind_of, read_checkpoint, read_outline
from lightning_moe.layer import plain_name
from lightning_moe.replacing import begin, discard, finish, remove, replacing
from lightning_moe.saving import check_recipe


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint of one file in one step, and reads directories of shards as if they were one file.

    `MoEUpcycleCallback` gives it to the Trainer, unless that has a ``CheckpointIO`` of its own. On remote file systems
    it does what Lightning does.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(plugins=[AtomicCheckpointIO()], logger=False)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Writes the file beside its place, waits until it is on the disk, and renames it."""
        if storage_options is not None or not _is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a file as Lightning does; of a directory of shards every process reads all."""
        if _is_local(path) and Path(path).is_dir():
            return read_checkpoint(path)
        loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only)
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes it, under its name in one step."""
        if _is_local(path):
            remove(path)
        else:
            super().remove_checkpoint(path)


def make_atomic(trainer: Trainer) -> None:
    """Gives the Trainer an `AtomicCheckpointIO`, if it has Lightning's plain one."""
    # by name: it may be that of pytorch_lightning
    if type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO":
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()


class AtomicSave:
    """For strategies that write directories: the shards of all ranks take the place of the old ones in one step.

    To be inherited from before the strategy, as in ``class Mine(AtomicSave, ModelParallelStrategy)``. A checkpoint
    whose experts are others is refused in one line, and a directory of another strategy is read too, through one file.
    """

    reads: ClassVar[tuple[str, ...]] = ("file", "state_dict")
    """The kinds of checkpoints that the strategy reads by itself, see `lightning_moe.checkpoints.kind_of`."""

    def save_checkpoint(
        self: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Lets every rank write into a directory beside its place; then rank 0 renames that."""
        save = super().save_checkpoint  # type: ignore[misc]
        if not _is_local(filepath):
            save(checkpoint, filepath, storage_options)
            return
        path = self.broadcast(str(filepath))
        temporary = Path(self.broadcast(str(begin(path)) if self.is_global_zero else ""))
        try:
            save(checkpoint, temporary, storage_options)
            self.barrier()
            if self.is_global_zero:
                finish(temporary, path)
        finally:
            if self.is_global_zero:
                discard(temporary)
        self.barrier()

    def load_checkpoint(self: Any, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads what any strategy wrote, once its recipe is the module's; tensors and plain Python only by default."""
        load = super().load_checkpoint  # type: ignore[misc]
        weights_only = True if weights_only is None else weights_only
        path = Path(self.broadcast(str(checkpoint_path)))
        kind = kind_of(path)
        if kind != "zero" and self.lightning_module.strict_loading:
            check_recipe(self.lightning_module, *read_outline(path))
        if kind in self.reads and not (kind == "file" and self._misnames_optimizer_states(path)):
            return load(path, weights_only)  # type: ignore[no-any-return]
        temporary = Path(self.broadcast(str(begin(f"{path}.one")) if self.is_global_zero else ""))
        try:
            problem = ""
            if self.is_global_zero:
                try:
                    torch.save(self._as_file(path), temporary)
                except ValueError as error:
                    problem = str(error)
            # on all ranks, or the others wait
            if problem := self.broadcast(problem):
                raise ValueError(problem)
            return load(temporary, weights_only)  # type: ignore[no-any-return]
        finally:
            self.barrier()
            if self.is_global_zero:
                discard(temporary)

    def remove_checkpoint(self: Any, filepath: Any) -> None:
        """Removes it, under its name in one step."""
        if not _is_local(filepath):
            super().remove_checkpoint(filepath)  # type: ignore[misc]
        elif self.is_global_zero:
            remove(filepath)

    def _as_file(self: Any, path: Path) -> dict[str, Any]:
        checkpoint = read_checkpoint(path)
        states = checkpoint.get("optimizer_states", [])
        for state, names in zip(states, self._optimizer_names(states), strict=False):
            state["state"] = {names[label]: value for label, value in state["state"].items()}
            for group in state["param_groups"]:
                group["params"] = [names[label] for label in group["params"]]
        return checkpoint

    def _misnames_optimizer_states(self: Any, path: Path) -> bool:
        # Lightning takes the number of a state for a place among all parameters of the module. It is the place in the
        # optimizer, which may hold them in groups, or those alone that train.
        in_order = dict(enumerate(plain_name(name) for name, _ in self.lightning_module.named_parameters()))
        states = read_checkpoint(path).get("optimizer_states", [])
        return any(
            isinstance(label, int) and in_order.get(label) != name
            for names in self._optimizer_names(states)
            for label, name in names.items()
        )

    def _optimizer_names(self: Any, states: list[dict[str, Any]]) -> list[dict[Any, str]]:
        # of each optimizer, what the checkpoint calls its parameters and what the module does
        names = {id(p): plain_name(name) for name, p in self.lightning_module.named_parameters()}
        found = []
        for state, optimizer in zip(states, self.optimizers, strict=False):
            labels = [label for group in state["param_groups"] for label in group["params"]]
            own = [names.get(id(p), "") for group in optimizer.param_groups for p in group["params"]]
            # what does not fit is Lightning's to refuse
            fits = len(own) == len(labels) and all(own)
            found.append(dict(zip(labels, own if fits else labels, strict=True)))
        return found


def _is_local(path: Any) -> bool:
    return str(get_protocol(str(path))) in ("file", "local")
