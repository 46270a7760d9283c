"""A page of Markdown from what the code says."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from reading import (
    CATALOGUES,
    URL,
    address,
    addresses,
    argument_meanings,
    concept,
    docstring,
    flag_meanings,
    is_reference,
    listed_functions,
    literal,
    one_line,
    paragraphs,
    parameters,
    references,
    signature,
    type_name,
)

# what docstrings write otherwise than Markdown: literals, names, addresses
_INLINE = re.compile(r"``(?P<literal>.+?)``|`(?P<name>[^`]+)`|(?P<url>" + URL.pattern + ")", re.DOTALL)
_PAPER = re.compile(
    r"(?P<authors>[A-Z][^,;:*]*), \*(?P<title>[^*]+)\*(?: \([^)]*\))?, "
    r"(?P<year>\d{4})(?:(?! \*|http).)*(?P<url>" + URL.pattern + ")?"
)


@dataclass(frozen=True)
class Page:
    """One kind of class.

    Args:
        name: of the file and of the package or module.
        title: its heading.
        introduction: what is said before the table.
        base: the class whose flags are explained; None if it has none.
        columns: the overview beside name, concept and paper; the same values stand in each entry.
        usage: how to choose one.
        details: what each entry says beside the columns.
        legend: what columns mean that are no flags of the base.
    """

    name: str
    title: str
    introduction: str
    base: type | None
    columns: dict[str, Callable[[type], str]]
    usage: Callable[[type], str]
    details: dict[str, Callable[[type], str]] = field(default_factory=dict)
    legend: dict[str, str] = field(default_factory=dict)


def markdown(text: str) -> str:
    """Turns a docstring's literals, names and addresses into Markdown."""

    def inline(match: re.Match[str]) -> str:
        if match["literal"]:
            return f"`{match['literal']}`"
        if match["url"]:
            url = match["url"]
            return f"[arXiv:{url.rpartition('/')[2]}]({url})" if "arxiv.org/abs" in url else f"<{url}>"
        place = addresses().get(match["name"])
        return f"[`{match['name']}`]({place})" if place else f"`{match['name']}`"

    return _INLINE.sub(inline, text)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fence(language: str, code: str) -> str:
    """A block of code."""
    return f"```{language}\n{code}\n```"


def papers(cls: type) -> str:
    """Authors and years of the sources, as links; a dash where there are none."""
    found = []
    for match in (match for text in references(cls) for match in _PAPER.finditer(text)):
        name = f"{match['authors']} {match['year']}"
        found.append(f"[{name}]({match['url']})" if match["url"] else name)
    return "; ".join(dict.fromkeys(found)) or "-"


def argument_table(named: list[inspect.Parameter], meanings: dict[str, str]) -> str:
    """Arguments with types, defaults and meanings."""
    rows = [
        [
            f"`{p.name}`",
            f"`{type_name(p.annotation)}`",
            "" if p.default is p.empty else f"`{literal(p.default)}`",
            markdown(meanings.get(p.name, "")),
        ]
        for p in named
    ]
    return table(["argument", "type", "default", "meaning"], rows)


def raised(thing: Any) -> list[str]:
    """What is raised, and when."""
    return [f"Raises `{r.type_name}` {markdown(one_line(r.description))}" for r in docstring(thing).raises]


def example(thing: Any) -> list[str]:
    """The docstring's example."""
    return [fence("pycon", text) for e in docstring(thing).examples if (text := (e.description or "").strip())]


def overview(page: Page) -> str:
    """The table of all entries."""
    rows = [
        [
            f"[{entry.__name__}]({address(entry)})",
            markdown(concept(entry)),
            *(value(entry) for value in page.columns.values()),
            papers(entry),
        ]
        for entry in CATALOGUES[page.name]
    ]
    return table(["name", "concept", *page.columns, "paper"], rows)


def legend(page: Page) -> str:
    """What the columns mean."""
    meanings = dict(flag_meanings(page.base)) if page.base else {}
    meanings |= page.legend
    return "\n".join(f"- `{name}`: {markdown(text)}" for name, text in meanings.items())


def source_lines(cls: type) -> list[str]:
    """The references, each with the sentences on where we differ from it."""
    lines = []
    for text in references(cls):
        cited, differs, rest = text.partition("Differs from ")
        lines.append(f"**Reference.** {markdown(cited.strip())}")
        if differs:
            lines.append(f"**Differs from** {markdown(rest)}")
    return lines


def entry_section(page: Page, cls: type) -> str:
    """All that there is to say of one class."""
    parts = [f"## {cls.__name__}", markdown(concept(cls))]
    parts += [markdown(text) for text in paragraphs(cls) if not is_reference(text)]
    parts += source_lines(cls)
    parts.append("; ".join(f"{name}: {value(cls)}" for name, value in all_facts(page, cls).items()))
    if named := parameters(cls):
        parts.append(f"`{signature(cls.__init__, cls.__name__)}`")  # type: ignore[misc]
        parts.append(argument_table(named, argument_meanings(cls)))
    parts += raised(cls)
    parts.append(page.usage(cls))
    parts += example(cls)
    return "\n\n".join(part for part in parts if part)


def all_facts(page: Page, cls: type) -> dict[str, Callable[[type], str]]:
    """The columns, and the flags that the table leaves out where they are set."""
    flags = flag_meanings(page.base) if page.base else {}
    facts = page.columns | page.details
    for name in flags:
        if name not in facts and getattr(cls, name, False) is True:
            facts[name] = lambda _: "yes"
    return facts


def function_section(name: str, function: Callable[..., Any]) -> str:
    """A function in brief."""
    parsed = docstring(function)
    parts = [f"### {name}", f"`{signature(function, name)}`", markdown(one_line(parsed.short_description))]
    parts += [markdown(text) for text in paragraphs(function)]
    if parsed.params:
        parts.append("\n".join(f"- `{p.arg_name}`: {markdown(one_line(p.description))}" for p in parsed.params))
    if parsed.returns and parsed.returns.description:
        parts.append(f"Returns: {markdown(one_line(parsed.returns.description))}")
    return "\n\n".join([*parts, *raised(function), *example(function)])


def render(page: Page) -> str:
    """The whole page."""
    parts = [
        "<!-- Written by docs/generate.py from the code. Change the docstrings and run it again. -->",
        f"# {page.title}",
        page.introduction.strip(),
        overview(page),
        legend(page),
        *(entry_section(page, entry) for entry in CATALOGUES[page.name]),
    ]
    if listed := listed_functions(page.name):
        parts += ["## Functions", *(function_section(name, function) for name, function in listed.items())]
    return "\n\n".join(part for part in parts if part) + "\n"
