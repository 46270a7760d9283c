"""Writes a file or directory so that its name always stands for a whole one: the old, or the new."""

import ctypes
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# beside what is written, and a directory: nothing that lists checkpoints looks into it
UNFINISHED = ".unfinished"
_OLD = ".old"
_STARTED = time.time()
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of ``path`` when all is written, and not before.

    The temporary stands in ``.unfinished`` beside it and is gone afterwards, after an exception too. What a killed
    process has left there is removed by the next one that writes.

    Args:
        path: a file or directory; it may exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/last.ckpt") as temporary:
        ...         written = temporary.write_text("all of it")
        ...     os.listdir(folder)
        ['last.ckpt']
    """
    if Path(path).parent.name == UNFINISHED:
        # is a temporary itself
        yield Path(path)
        return
    temporary = begin(path)
    try:
        yield temporary
        finish(temporary, path)
    finally:
        discard(temporary)


def begin(path: str | Path) -> Path:
    """The temporary path for ``path``; nothing is there, and nothing of earlier runs. See `replacing`."""
    target = Path(path)
    folder = target.parent / UNFINISHED
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        old = target.parent / left.name.removesuffix(_OLD)
        if left.name.endswith(_OLD) and not os.path.lexists(old):
            # killed in the middle of `_exchange`
            os.replace(left, old)
        elif left.name == target.name or _newest(left) < _STARTED:
            _remove(left)
    return folder / target.name


def finish(temporary: Path, path: str | Path) -> None:
    """Puts what was written in the place of ``path``, once it is on the disk. See `replacing`."""
    target = Path(path)
    for file in [temporary, *temporary.rglob("*")]:
        _flush(file)
    if os.path.lexists(target) and (temporary.is_dir() or (target.is_dir() and not target.is_symlink())):
        # a directory cannot be renamed onto one that holds something
        _exchange(temporary, target)
    else:
        os.replace(temporary, target)
    _flush(target.parent)


def discard(temporary: Path) -> None:
    """Removes a temporary, or the old content that came into its place, and the folder if that is empty."""
    _remove(temporary)
    try:
        temporary.parent.rmdir()
    except OSError:
        # another checkpoint is being written, or the folder is gone
        return


def remove(path: str | Path) -> None:
    """Removes a file or directory, under its name at once, so that no half of it is left there."""
    if not os.path.lexists(path):
        return
    temporary = begin(path)
    os.replace(path, temporary)
    discard(temporary)


def _exchange(first: Path, second: Path) -> None:
    if _exchange_at_once(first, second):
        return
    # between the two the old one is in `.unfinished`, whole, and `begin` finds it
    old = first.with_name(f"{first.name}{_OLD}")
    os.replace(second, old)
    os.replace(first, second)
    os.replace(old, first)


def _exchange_at_once(first: Path, second: Path) -> bool:
    # Linux can, but not on every file system, and Python has no function for it
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    done: int = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return done == 0


def _flush(path: Path) -> None:
    if os.name != "posix":
        # a directory cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _newest(path: Path) -> float:
    try:
        return max(one.lstat().st_mtime for one in [path, *path.rglob("*")])
    except FileNotFoundError:
        # somebody is at work in there
        return time.time()
