"""Reads a checkpoint that Lightning wrote, one file or a directory of shards, without unpickling foreign objects."""

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path, PurePath
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lightning_moe.zero_checkpoints import read_zero_optimizer

RECIPE_KEY = "lightning_moe"
# what Lightning writes beside the shards of torch.distributed.checkpoint
META_FILE = "meta.pt"
# FSDP1 calls the weights "model", FSDP2 "state_dict"
_WEIGHTS_KEYS = ("state_dict", "model")
_ZERO_FILES = "*_model_states.pt"


def read_checkpoint(path: str | Path, *, optimizers: bool = True) -> dict[str, Any]:
    """Reads a checkpoint as Lightning would have written it into one file, whichever strategy it is of.

    One file, and directories of FSDP (``state_dict_type="sharded"``), of ModelParallelStrategy and `MoEFSDP2Strategy`,
    and of DeepSpeed's ZeRO. All of it must fit into memory; the tensors of one file are mapped, not copied. Optimizer
    states of a directory name their parameters instead of counting them, which torch and Lightning read as well.

    Args:
        path: the file or directory.
        optimizers: whether to read the states of the optimizers too.

    Returns:
        ``state_dict``, ``optimizer_states`` and what else Lightning keeps, on the CPU.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if it is no checkpoint, or has an object in it that is neither a tensor nor plain Python.
        ModuleNotFoundError: if it is DeepSpeed's, which is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"state_dict": {"weight": torch.ones(2)}, "global_step": 3}, f"{folder}/last.ckpt")
        ...     read_checkpoint(f"{folder}/last.ckpt")["global_step"]
        3
    """
    place = Path(path).expanduser()
    kind = kind_of(place)
    if kind == "file":
        checkpoint = _load(place)
    elif kind == "zero":
        checkpoint = _read_zero(place, optimizers)
    else:
        checkpoint = _read_shards(place, optimizers)
    _check_weights(path, checkpoint)
    return checkpoint if optimizers else {key: value for key, value in checkpoint.items() if key != "optimizer_states"}


def read_outline(path: str | Path) -> tuple[dict[str, Any] | None, dict[str, torch.Size]]:
    """Reads what tells whether a checkpoint fits a model, and no weights: the recipe, and the shapes of its tensors.

    Args:
        path: the file or directory; not of DeepSpeed, whose shards say no shapes.

    Returns:
        The recipe, None where there is none, and the shapes under the names of the tensors.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if it is no checkpoint.
    """
    place = Path(path).expanduser()
    if kind_of(place) == "file":
        checkpoint = _load(place)
        _check_weights(path, checkpoint)
        return checkpoint.get(RECIPE_KEY), {key: value.shape for key, value in checkpoint["state_dict"].items()}
    metadata = _Reader(place).read_metadata()
    shapes = {
        name.partition(".")[2]: entry.size
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.partition(".")[0] in _WEIGHTS_KEYS
    }
    meta = _load(place / META_FILE) if (place / META_FILE).is_file() else {}
    return meta.get(RECIPE_KEY), shapes


def kind_of(path: str | Path) -> Literal["file", "state_dict", "model", "zero"]:
    """Says what kind of checkpoint stands at a path.

    Returns:
        ``"file"``; ``"state_dict"`` or ``"model"`` for a directory of FSDP2 or FSDP1, which keep the weights under that
        name; or ``"zero"`` for one of DeepSpeed.

    Raises:
        FileNotFoundError: if there is no such path.
        ValueError: if it is a directory that holds none.
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"{path} does not exist. Give a checkpoint: a .ckpt file, or a directory of shards.")
    if place.is_file():
        return "file"
    if (place / ".metadata").is_file():
        names = _Reader(place).read_metadata().state_dict_metadata
        return "model" if any(name.startswith("model.") for name in names) else "state_dict"
    if any(place.glob(f"*/{_ZERO_FILES}")):
        return "zero"
    raise ValueError(f"{path} is a directory, but no checkpoint: it holds neither .metadata nor {_ZERO_FILES}.")


def zero_layout(path: str | Path) -> tuple[int, int]:
    """The stage of ZeRO that wrote a checkpoint of DeepSpeed's, and on how many processes.

    Args:
        path: the directory, of the kind ``"zero"``.
    """
    states = _load(_first_zero_file(Path(path).expanduser()))
    return states["ds_config"]["zero_optimization"]["stage"], states["dp_world_size"]


def _load(file: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file} is no checkpoint: torch.save writes another kind of file. It may be cut short.")
    try:
        checkpoint: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_told_of_object(file, error)) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{file} holds a {type(checkpoint).__name__}, where a checkpoint is a dictionary.")
    return checkpoint


def _told_of_object(path: Path, error: pickle.UnpicklingError) -> str:
    name = str(error).partition("GLOBAL ")[2].partition(" ")[0] or "an object"
    return (
        f"{path} holds {name}, and loading it could run code. If you trust the file, allow it with "
        "torch.serialization.add_safe_globals([...]), or save plain hyper-parameters."
    )


def _check_weights(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    weights = checkpoint.get("state_dict")
    if isinstance(weights, Mapping) and weights:
        return
    if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise ValueError(f"{path} holds tensors only. Wanted what Trainer.save_checkpoint or ModelCheckpoint wrote.")
    found = ", ".join(sorted(str(key) for key in checkpoint if key != "state_dict")) or "nothing"
    raise ValueError(f"{path} holds no weights, only: {found}. Wanted what Trainer.save_checkpoint wrote.")


class _MetadataUnpickler(pickle.Unpickler):
    # `.metadata` is a pickle by torch's design: of these classes, and of no others
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module.startswith(("torch", "pathlib")) else None
        is_record = isinstance(found, type) and module.startswith("torch.distributed.checkpoint.")
        is_plain = isinstance(found, torch.dtype) or found in (torch.Size, torch.serialization._get_layout)
        if is_record or is_plain or (isinstance(found, type) and issubclass(found, PurePath)):
            return found
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name} ")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{file} is not what torch.distributed.checkpoint writes ({error}).") from error
        assert isinstance(metadata, Metadata)
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def _read_shards(directory: Path, optimizers: bool) -> dict[str, Any]:
    reader = _Reader(directory)
    metadata = reader.read_metadata()
    entries = {
        name: entry
        for name, entry in metadata.state_dict_metadata.items()
        if optimizers or name.partition(".")[0] in _WEIGHTS_KEYS
    }
    flat: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        if isinstance(entry, TensorStorageMetadata)
        else None
        for name, entry in entries.items()
    }
    planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        # each process that asks reads all of it, whether or not it is one of several
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(flat, storage_reader=reader, planner=planner, no_dist=True)
        except dcp.api.CheckpointException as error:
            raise ValueError(_told_of_shards(directory, error)) from error
    paths = metadata.planner_data or {}
    found = _nested({paths.get(name, (name,)): value for name, value in flat.items()})
    meta = directory / META_FILE
    checkpoint = _load(meta) if meta.is_file() else {}
    for key in _WEIGHTS_KEYS:
        checkpoint |= {"state_dict": found[key]} if key in found else {}
    if optimizers:
        states = {int(key.removeprefix("optimizer_")): found[key] for key in found if key.startswith("optimizer_")}
        checkpoint["optimizer_states"] = [states[index] for index in sorted(states)]
    return checkpoint


def _told_of_shards(directory: Path, error: dcp.api.CheckpointException) -> str:
    first = next(failure[0] for failure in error.failures.values())
    if isinstance(first, pickle.UnpicklingError):
        return _told_of_object(directory, first)
    return f"{directory} cannot be read, it may be cut short: {(str(first) or type(first).__name__).splitlines()[0]}"


def _nested(flat: Mapping[tuple[Any, ...], Any]) -> dict[Any, Any]:
    # a whole number in a path is a place in a list
    root: dict[Any, Any] = {}
    for path, value in flat.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return {key: _lists(value) for key, value in root.items()}


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    if node and all(isinstance(key, int) for key in node):
        return [_lists(node[key]) for key in sorted(node)]
    return {key: _lists(value) for key, value in node.items()}


def _first_zero_file(directory: Path) -> Path:
    return min(directory.glob(f"*/{_ZERO_FILES}"))


def _read_zero(directory: Path, optimizers: bool) -> dict[str, Any]:
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{directory} was written by DeepSpeed, which is not installed. Run: pip install 'lightning-moe[deepspeed]'"
        ) from error
    # of its own classes these are beside the weights; its reader asks for any, and gets no others
    known: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    with torch.serialization.safe_globals(known), _weights_only_everywhere(), redirect_stdout(io.StringIO()):
        weights = get_fp32_state_dict_from_zero_checkpoint(str(directory))
        file = _first_zero_file(directory)
        checkpoint = _load(file)
        state = read_zero_optimizer(file.parent, checkpoint["param_shapes"]) if optimizers else None
    own = {"module", "param_shapes", "frozen_param_shapes", "frozen_param_fragments", "optimizer", "ds_config"}
    return {key: value for key, value in checkpoint.items() if key not in own} | {
        "state_dict": {name: weight.detach() for name, weight in weights.items()},
        **({} if state is None else {"optimizer_states": [state]}),
    }


@contextmanager
def _weights_only_everywhere() -> Iterator[None]:
    # torch reads the environment at each torch.load, whatever its caller asked for
    on, off = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {name: os.environ.pop(name) for name in (on, off) if name in os.environ}
    os.environ[on] = "1"
    try:
        yield
    finally:
        del os.environ[on]
        os.environ.update(before)
