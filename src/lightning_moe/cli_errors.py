"""Short errors for the command line: what is wrong and what was probably meant, not every alternative."""

import inspect
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

# What jsonargparse says of a name that it does not know, in its several places.
_UNKNOWN = re.compile(
    r"option '([^']+)'|Option '([^']+)' is not accepted|Expected a dot import path string: (\S+)"
    r"|unrecognized arguments: --(\S+)"
)


def explain(message: str, known: Iterable[Callable[..., Any]]) -> str:
    """Shortens a message of jsonargparse and adds the name that was probably meant.

    Args:
        message: as jsonargparse gives it.
        known: the classes and functions whose names and arguments a user may write.
    """
    # jsonargparse reports every alternative of a union; what the user meant is the one that names a class_path, or else
    # the first that says more than what kind of thing was expected
    place = message.splitlines()[0].rstrip(":")
    problem = re.search(r"- (Problem with given class_path .*?)(?=\n    - |\n  Given value|\Z)", message, re.DOTALL)
    unknown_class = re.search(r"- (Expected a dot import path string: \S+)", message)
    found = problem or unknown_class
    text = f"{place}: {found.group(1)}" if found else message
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if unknown := _UNKNOWN.search(text):
        name = next(group for group in unknown.groups() if group).split("=")[0].rpartition(".")[2]
        if meant := nearest(name, _names(known)):
            lines.append(f"Did you mean {meant!r}?")
    return "\n  ".join(lines)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of several names that is spelled most like this; None if none is.

    Example:
        >>> nearest("topkrouter", ["TopPRouter", "TopKRouter"])
        'TopKRouter'
    """
    # a wrong capital is no wrong letter
    known = {known.lower(): known for known in sorted(names)}
    close = get_close_matches(name.lower(), known, n=1)
    return known[close[0]] if close else None


def told_by(error: ValueError) -> str | None:
    """What a class said that refused its arguments, where jsonargparse wrapped it into the alternatives it tried."""
    found = re.search(r"Errors:\n\s+- (?!Expected a)(.+?)(?=\n\s+- |\n\s*Given value)", str(error), re.DOTALL)
    return found.group(1) if found else None


def _names(known: Iterable[Callable[..., Any]]) -> set[str]:
    known = tuple(known)
    parameters = {parameter for one in known for parameter in inspect.signature(one).parameters}
    return {one.__name__ for one in known} | parameters
