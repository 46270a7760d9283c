"""Checks of arguments: each raises one error that names the argument, its value and what was wanted."""

import math
from collections.abc import Sequence
from pathlib import Path


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raises if ``value`` is none of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: wanted one of {', '.join(map(repr, choices))}.")


def check_not_negative(**numbers: int | float) -> None:
    """Raises if one of the numbers, given under its argument's name, is below 0 or not finite."""
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value}: wanted a number >= 0.")


def check_positive(**numbers: int | float) -> None:
    """Raises if one of the numbers, given under its argument's name, is not above 0 or not finite."""
    for name, value in numbers.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value}: wanted a number > 0.")


def check_whole(**numbers: object) -> None:
    """Raises if one of the numbers, given under its argument's name, is no whole number of 1 or more."""
    for name, value in numbers.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: wanted a whole number, 1 or more.")


def check_free(name: str, path: str | Path, way_out: str = "give another name") -> None:
    """Raises FileExistsError, naming the argument, if a directory that is to be written holds something."""
    directory = Path(path).expanduser()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise FileExistsError(f"{name}={str(path)!r} exists and is not an empty directory. Remove it, or {way_out}.")
