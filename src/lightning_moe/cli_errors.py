"""Short errors for the command line: where, what is wrong, what was probably meant; not every alternative."""

import dis
import inspect
import os
import re
import sys
import traceback
from argparse import ArgumentError, ArgumentParser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from types import FrameType, TracebackType
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_moe.config import UpcycleConfig
from lightning_moe.initializers import ExpertInit, RouterInit
from lightning_moe.losses import BalanceLoss
from lightning_moe.routers import Router

# each kind with the keys that take it
_PLACES: tuple[tuple[type, tuple[str, ...]], ...] = (
    (ExpertInit, ("init",)),
    (RouterInit, ("router_init",)),
    (Router, ("router",)),
    (BalanceLoss, ("balance_losses", "losses")),
    (UpcycleConfig, ("config",)),
    (Callback, ("trainer.callbacks", "callbacks")),
    (LightningModule, ("model",)),
    (LightningDataModule, ("data",)),
    (Trainer, ("trainer",)),
)
# a longer list tells less than --help
_MAX_KNOWN = 12

# What jsonargparse says of a name that it does not know, in its several places and versions.
_UNKNOWN_KEY = re.compile(
    r"(?:Validation failed: )?(?:(?:Group|Subcommand) '(?P<group>[^']+)' does not accept (?:option|nested key)"
    r"|Option|Key|unrecognized arguments:) '?(?:--)?(?P<key>[\w.]+)",
    re.IGNORECASE,
)
_UNKNOWN_CLASS = re.compile(
    r"Expected a dot import path string: (?P<name>\S+)"
    r"|(?P<wrong>Import path (?P<path>\S+) does not correspond to a subclass of \S+)"
)
_PROBLEM = re.compile(r"- (Problem with given class_path .*?)(?=\n *- |\n *Given value|\Z)", re.DOTALL)
_UNION = re.compile(
    r"Does not validate .*?Subtypes: \[(?P<kinds>.*?)\]\n *Errors:\n(?P<errors>.*)\n *Given value: (?P<value>.*)\Z",
    re.DOTALL,
)
# the first alternative that says more than what kind of thing was expected
_REASON = re.compile(
    r"^ *- (?!Expected a |Not a valid subclass|Does not validate|a class path|a dict)(.+)", re.MULTILINE
)


class ConfigError(ArgumentError):
    """What is wrong with one key of a configuration, in words; raised through the parsers of the keys around it."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(None, f"{key}: {text}" if key else text)
        self.key, self.text = key, text


def config_error(parser: ArgumentParser, message: str, cause: Exception | None, known: Sequence[type]) -> ConfigError:
    """Shortens an error of jsonargparse.

    Args:
        parser: which has it: that of all options, or of the arguments of one class inside.
        message: as jsonargparse gives it.
        cause: what it comes from, if anything.
        known: the classes whose names and arguments a user may write.
    """
    place = re.match(r'Parser key "([^"]+)":?\s*', message)
    key, text = (place[1], message[place.end() :]) if place else ("", message)
    for inner in _causes(cause):
        if isinstance(inner, ConfigError):
            # the parser of a class inside knows best; the keys around it are here
            return ConfigError(".".join(filter(None, (key, inner.key))), inner.text)
    lines = [line.strip() for line in _explain(parser, key, text, known).splitlines() if line.strip()]
    return ConfigError(key, re.sub(r"<class '([\w.]+)'>", r"\1", "\n  ".join(lines)))


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


def exit_if_refused(error: Exception, config: Any) -> None:
    """Ends the program with one line, if the error is a refusal of what the user asked for; else returns.

    A refusal is raised on purpose, by this package or by the constructor of something that the configuration names, or
    is Lightning's word for it, or the system's about a file. All else may be a bug, which only its traceback tells.

    Args:
        error: what ended the run.
        config: what was parsed.
    """
    verb = getattr(config, "subcommand", None)
    config = config if verb is None else config[verb]
    if not wants_traceback() and (told := _told_by(error, config)) is not None:
        sys.exit(f"error: {told}")


def wants_traceback() -> bool:
    """Whether the user asks for tracebacks of refusals too: LIGHTNING_MOE_TRACEBACK=1."""
    return os.environ.get("LIGHTNING_MOE_TRACEBACK", "0") not in ("", "0")


def _explain(parser: ArgumentParser, key: str, text: str, known: Sequence[type]) -> str:
    # of a union jsonargparse reports every alternative; what the user meant is the one that names a class_path, or else
    # the first that says more than what kind of thing was expected
    if "Expected an instantiatable class" in text:
        # arguments were given, and no class that takes them
        return f"Wanted a class, with its arguments under init_args, as {_example(key.rpartition('.')[2], known)}."
    if problem := _PROBLEM.search(text):
        return problem[1]
    if unknown := _UNKNOWN_CLASS.search(text):
        name = unknown["name"] or unknown["path"]
        wrong = unknown["wrong"] or f"No class {name!r} is known here"
        return f"{wrong}\n{_class_meant(name, key.rpartition('.')[2], known)}"
    if union := _UNION.match(text):
        reason = _REASON.search(union["errors"])
        return reason[1] if reason else f"Expected one of {union['kinds']}. Got value: {union['value']}"
    if not (found := _UNKNOWN_KEY.match(text)):
        return text
    group, name = found["group"] or "", found["key"]
    for action in parser._actions:
        if isinstance(action.choices, Mapping) and group in action.choices:
            # the verb's options are in a parser of its own
            parser, group = action.choices[group], ""
    group, _, name = f"{group}.{name}".lstrip(".").rpartition(".")
    return f"{text}\n{_key_meant(name, group, [action.dest for action in parser._actions], known)}"


def _example(key: str, known: Sequence[type]) -> str:
    kinds = tuple(kind for kind, places in _PLACES if key in places)
    names = [cls.__name__ for cls in known if issubclass(cls, kinds)] if kinds else []
    return f"{{class_path: {names[0] if names else 'DropInit'}, init_args: {{...}}}}"


def _key_meant(name: str, group: str, options: Sequence[str], known: Sequence[type]) -> str:
    options = [option for option in options if option.rpartition(".")[2] != "help"]
    inside = [option.removeprefix(f"{group}.") for option in options if option.startswith(f"{group}." if group else "")]
    here = dict.fromkeys(option.partition(".")[0] for option in inside)
    owners = [cls for cls in known if name in inspect.signature(cls).parameters]
    lines = []
    for places in (here, inside, options):
        last = {option.rpartition(".")[2]: option for option in places}
        # a word that is known elsewhere is no misspelling of an option far off
        if meant := nearest(name, last if places is here or not owners else {name} & set(last)):
            outside = f", outside {group!r}" if places is options else ""
            lines.append(f"Did you mean {last[meant]!r}{outside}?")
            break
    if owners and meant != name:
        others = " and others" if any(_kind(cls) is _kind(owners[0]) for cls in owners[1:]) else ""
        lines.append(f"{name!r} belongs to {owners[0].__name__}{others}, under {_place(owners[0], known)!r}.")
    if not lines:
        arguments = {argument for cls in known for argument in inspect.signature(cls).parameters}
        lines += [f"Did you mean {other!r}, elsewhere?" for other in [nearest(name, arguments)] if other]
    return "\n".join(lines if meant else [*lines, _listed(here)])


def _class_meant(name: str, key: str, known: Sequence[type]) -> str:
    kind = next((kind for kind, keys in _PLACES if key in keys), object)
    every, fitting = {cls.__name__: cls for cls in known}, [cls.__name__ for cls in known if issubclass(cls, kind)]
    last = name.rpartition(".")[2]
    if last in every and last not in fitting:
        return f"{last!r} belongs under {_place(every[last], known)!r}.\n{_listed(fitting)}"
    if meant := nearest(last, fitting):
        return f"Did you mean {meant!r}?"
    if elsewhere := nearest(last, every):
        return f"Did you mean {elsewhere!r}? It belongs under {_place(every[elsewhere], known)!r}.\n{_listed(fitting)}"
    if "." in name:
        return _listed(fitting)
    return f"{_listed(fitting)}\nA class of your own is named with its module, as my_package.MyClass."


def _listed(names: Iterable[str]) -> str:
    names = tuple(names)
    return f"Known here: {', '.join(names)}." if len(names) <= _MAX_KNOWN else ""


def _kind(cls: type) -> type:
    return next((kind for kind, _ in _PLACES if issubclass(cls, kind)), cls)


def _place(cls: type, known: Sequence[type]) -> str:
    place = next((keys[0] for kind, keys in _PLACES if issubclass(cls, kind)), cls.__name__)
    # what the program has no option for is an argument of something else
    around = [one.__name__ for one in known if issubclass(one, Callback) and place in inspect.signature(one).parameters]
    return f"{around[0]}.{place}" if around else place


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _told_by(error: BaseException, config: Any) -> str | None:
    # jsonargparse wraps what a class said into all the alternatives that it tried, and keeps the error of the first
    first = error
    while _package(first) == "jsonargparse" and first.__cause__ is not None:
        first = first.__cause__
    if _package(first) == "jsonargparse":
        reason = _REASON.search(str(error))
        return reason[1] if reason else None
    error = first
    if isinstance(error, OSError) and error.filename is not None:
        return str(error)
    if not _is_raised_on_purpose(error):
        return None
    causes = [frame for cause in _causes(error) for frame, _ in traceback.walk_tb(cause.__traceback__)]
    place = next((place for frame in reversed(causes) if (place := _place_of(frame, config))), None)
    ours = place is not None or _package(error) == "lightning_moe"
    kinds = (
        MisconfigurationException,
        FileNotFoundError,
        # of an optional package, whose extra it names
        *((ValueError, TypeError, OSError, ModuleNotFoundError) if ours else ()),
    )
    if not isinstance(error, kinds):
        return None
    # some say it themselves
    return str(error) if place is None or str(error).startswith(f"{place}=") else f"{place}: {error}"


def _last(error: BaseException) -> TracebackType | None:
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    return step


def _package(error: BaseException) -> str:
    # whose code raised it
    step = _last(error)
    return "" if step is None else str(step.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_raised_on_purpose(error: BaseException) -> bool:
    # by a `raise`, and not by an operation that failed, such as zip(strict=True) or a call with wrong arguments
    step, cause = _last(error), error.__cause__
    if step is None or step.tb_frame.f_code.co_code[step.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return False
    # what only adds where it was is no more on purpose than what it tells again
    return cause is None or not str(error).endswith(str(cause)) or _is_raised_on_purpose(cause)


def _place_of(frame: FrameType, config: Any) -> str | None:
    # Where in the configuration the object is whose constructor this is: something of its class, or, for what needs no
    # class_path, something with just its arguments; among several of a kind the one with these values.
    if frame.f_code.co_name != "__init__" or "self" not in frame.f_locals:
        return None
    cls = type(frame.f_locals["self"])
    given = {key: value for key, value in frame.f_locals.items() if isinstance(value, (int, float, str))}
    found = [
        (sum(key in given and given[key] == value for key, value in arguments.items()), place)
        for place, name, arguments in _objects(config, "")
        if (name or "").rpartition(".")[2] == cls.__name__
        or (name is None and set(arguments) == set(inspect.signature(cls).parameters))
    ]
    return max(found, key=lambda match: match[0])[1] if found else None


def _objects(node: Any, place: str) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    # each with its place, class_path and arguments
    if isinstance(node, (list, tuple)):
        for entry in node:
            yield from _objects(entry, place)
        return
    arguments = dict(node if isinstance(node, Mapping) else getattr(node, "__dict__", {}))
    name = arguments.get("class_path")
    if name is not None:
        inner = arguments.get("init_args") or {}
        arguments = dict(inner if isinstance(inner, Mapping) else vars(inner))
    if arguments and place:
        yield place, name, arguments
    for key, value in arguments.items():
        yield from _objects(value, f"{place}.{key}".lstrip("."))
