"""What the code says of itself: catalogues, signatures, flags, docstrings."""

import inspect
import pkgutil
import re
import types
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Literal, Union, get_args, get_origin

import torch
from docstring_parser import Docstring, DocstringStyle, parse, parse_from_object

from lightning_moe import BALANCE_LOSSES, INITIALIZERS, ROUTER_INITIALIZERS, ROUTERS, ROUTING_METRICS, Router

CATALOGUES: dict[str, tuple[type, ...]] = {
    "routers": ROUTERS,
    "losses": BALANCE_LOSSES,
    "metrics": ROUTING_METRICS,
    "initializers": (*INITIALIZERS, *ROUTER_INITIALIZERS),
}
"""By the name of the page, which is that of the package or module."""

NUM_EXPERTS = 8
"""E, where a value needs one."""

URL = re.compile(r"https?://[^\s,;)]*[^\s,;).]")
"""An address, without the punctuation behind it."""

_NAME = re.compile(r"(?<!`)`(\w+)`(?!`)")


def docstring(thing: Any) -> Docstring:
    """Takes apart the docstring of a class or function."""
    return parse(inspect.getdoc(thing) or "", style=DocstringStyle.GOOGLE)


def concept(cls: type) -> str:
    """The docstring's first line; with that of the function that it names, where the class is a thin shell."""
    text = one_line(docstring(cls).short_description)
    for function in cores(cls):
        text += f" {one_line(docstring(function).short_description)}"
    return text


def paragraphs(thing: Any) -> list[str]:
    """The long description, one line per paragraph."""
    return [one_line(part) for part in (docstring(thing).long_description or "").split("\n\n") if part.strip()]


def references(cls: type) -> list[str]:
    """The reference paragraphs of a class, and of the function that it is a shell of if that has another source."""
    found: list[str] = []
    for text in (text for thing in (cls, *cores(cls)) for text in paragraphs(thing) if is_reference(text)):
        url = URL.search(text)
        if not (url and any(url[0] in earlier for earlier in found)):
            found.append(text.removeprefix("Reference: "))
    return found


def is_reference(text: str) -> bool:
    """Whether a paragraph names the sources."""
    return text.startswith("Reference: ")


def cores(cls: type) -> list[Callable[..., Any]]:
    """The functions of the class's own package that the first line of its docstring names."""
    names = _NAME.findall(docstring(cls).short_description or "")
    own = functions(package_of(cls))
    return [own[name] for name in names if name in own]


def package_of(cls: type) -> str:
    """The first module below the top one, as ``"routers"``."""
    return cls.__module__.split(".")[1]


@cache
def functions(package: str) -> dict[str, Callable[..., Any]]:
    """All public functions that a package or module of ours defines, in the order of their names."""
    module = import_module(f"lightning_moe.{package}")
    parts = pkgutil.iter_modules(getattr(module, "__path__", []))
    modules = [module, *(import_module(f"{module.__name__}.{part.name}") for part in parts)]
    found = {
        name: thing
        for module in modules
        for name, thing in vars(module).items()
        if inspect.isfunction(thing) and not name.startswith("_") and thing.__module__ == module.__name__
    }
    return dict(sorted(found.items()))


def listed_functions(page: str) -> dict[str, Callable[..., Any]]:
    """The functions that a page describes: what the package exports, and what its entries speak of."""
    exported = getattr(import_module(f"lightning_moe.{page}"), "__all__", ())
    spoken_of = _NAME.findall(" ".join(inspect.getdoc(entry) or "" for entry in CATALOGUES[page]))
    return {name: f for name, f in functions(page).items() if name in exported or name in spoken_of}


def parameters(cls: type) -> list[inspect.Parameter]:
    """The arguments of ``__init__`` that have a name."""
    if cls.__init__ is object.__init__:  # type: ignore[misc]
        return []
    every = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    return [p for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def argument_meanings(cls: type) -> dict[str, str]:
    """What the docstrings say of the arguments: the class's own, then those it has ``__init__`` from."""
    meanings: dict[str, str] = {}
    for owner in cls.__mro__:
        if owner.__module__.startswith("lightning_moe"):
            described = {p.arg_name: one_line(p.description) for p in docstring(owner).params}
            meanings = described | meanings
        if "__init__" in vars(owner):
            break
    return meanings


def flag_meanings(base: type) -> dict[str, str]:
    """The flags that a base class declares, with their docstrings."""
    parsed = parse_from_object(base, style=DocstringStyle.GOOGLE)
    return {p.arg_name: one_line(p.description) for p in parsed.params if p.args[0] == "attribute"}


@cache
def default_router(cls: type) -> Router:
    """A router with default arguments, which leaves the random numbers as they were."""
    with torch.random.fork_rng(devices=[]):
        return cls(16, NUM_EXPERTS)  # type: ignore[no-any-return]


def one_line(text: str | None) -> str:
    """Joins the lines of a paragraph."""
    return " ".join((text or "").split())


def literal(value: Any) -> str:
    """A value as Python writes it, with double quotes."""
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def type_name(annotation: Any) -> str:
    """A type as the source writes it, the same in every version of Python."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        return "None"
    if origin in (Union, types.UnionType):
        return " | ".join(type_name(part) for part in inner)
    if origin is Literal:
        return f"Literal[{', '.join(literal(part) for part in inner)}]"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(type_name(part) for part in inner)}]"
    return getattr(annotation, "__name__", str(annotation)).replace("'", '"')


def signature(thing: Callable[..., Any], name: str) -> str:
    """A call with the names of all arguments and the defaults."""
    kept, starred = [], False
    for parameter in inspect.signature(thing).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            kept.append("*")
            starred = True
        prefix = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f"={literal(parameter.default)}"
        kept.append(f"{prefix}{parameter.name}{default}")
    return f"{name}({', '.join(kept)})"


@cache
def addresses() -> dict[str, str]:
    """Where each name has its heading."""
    places = {name: page for page in CATALOGUES for name in listed_functions(page)}
    places |= {entry.__name__: page for page, entries in CATALOGUES.items() for entry in entries}
    return {name: f"{page}.md#{name.lower()}" for name, page in places.items()}


def address(thing: Any) -> str:
    """Where a class or function has its heading."""
    return addresses()[thing.__name__]
