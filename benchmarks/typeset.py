"""Writes the same page as Markdown and as LaTeX: headings, paragraphs, lists, tables and pictures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

# a true minus, and a dash in cells without a value
MINUS, NOTHING = "\u2212", "\u2013"


class Bold(str):
    """Text of a cell that stands out."""


@dataclass(frozen=True)
class Heading:
    """Of a section, or of a part of one.

    Args:
        text: it.
        level: 2 of a section, 3 of a part.
    """

    text: str
    level: int = 2


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """A file beside the page. LaTeX leaves it out: a paper places its figures itself."""

    file: str
    about: str


@dataclass(frozen=True)
class Table:
    """A table whose columns are explained below it.

    Args:
        label: unique on the page, of letters and hyphens.
        caption: what it shows.
        columns: title of each, and one sentence on it; none where the title says all.
        rows: text of the cells.
        note: what else to say above it.
    """

    label: str
    caption: str
    columns: Mapping[str, str]
    rows: Sequence[Sequence[str]]
    note: str = ""


Block = str | Heading | Items | Picture | Table

# letters of a small font in a line of LaTeX's article, and between columns
_PAGE, _GAP = 104, 3

# what LaTeX reads as a command, and what its usual fonts and encodings lack
_TEX = {
    **{character: f"\\{character}" for character in "{}&%$#_"},
    # behind the end of a row, or an item, it would be an argument
    **{character: f"{{{character}}}" for character in "[]*"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    "±": r"$\pm$",
    MINUS: "$-$",
    "→": r"$\to$",
    "·": r"$\cdot$",
    NOTHING: "--",
    "—": "---",
    "…": r"\dots{}",
    "“": "``",
    "”": "''",
}
_LETTERS = {chr(code) for code in range(0xC0, 0x100)} - set("ÐÞðþ")


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page as Markdown."""
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, Heading):
            parts.append(f"{'#' * block.level} {escape_markdown(block.text)}")
        elif isinstance(block, Items):
            parts.append("\n".join(f"- {escape_markdown(text)}" for text in block.texts))
        elif isinstance(block, Picture):
            parts.append(f"![{escape_markdown(block.about)}]({block.file})")
        elif isinstance(block, Table):
            parts += _markdown_table(block)
        else:
            parts.append(escape_markdown(block))
    return "\n\n".join(parts) + "\n"


def latex(title: str, blocks: Sequence[Block]) -> str:
    r"""The page as LaTeX, to be read with ``\input``; needs the packages booktabs and graphicx."""
    parts = [
        f"% {' '.join(title.split())}",
        r"% Read with \input; the preamble needs \usepackage{booktabs} and \usepackage{graphicx}.",
    ]
    for block in blocks:
        if isinstance(block, Heading):
            # with each section on a new page, no table drifts into the next one
            command = "clearpage\\section" if block.level == 2 else "subsection"
            parts.append(rf"\{command}{{{escape_tex(block.text)}}}")
        elif isinstance(block, Items):
            lines = [f"  \\item {escape_tex(text)}" for text in block.texts]
            parts.append("\n".join([r"\begin{itemize}", *lines, r"\end{itemize}"]))
        elif isinstance(block, Table):
            parts += map(_latex_table, _narrow(block))
        elif isinstance(block, str):
            parts.append(escape_tex(block))
    return "\n\n".join(parts) + "\n"


def without_repeats(blocks: Iterable[Block]) -> list[Block]:
    """The same, with each column explained below the first table that has it."""
    explained: set[tuple[str, str]] = set()
    found: list[Block] = []
    for block in blocks:
        if isinstance(block, Table):
            columns = {k: "" if (k, about) in explained else about for k, about in block.columns.items()}
            explained.update(block.columns.items())
            found.append(replace(block, columns=columns))
        else:
            found.append(block)
    return found


def escape_markdown(text: str) -> str:
    r"""Text that Markdown shows as it is.

    Example:
        >>> escape_markdown("a|b <c>_d")
        'a\\|b &lt;c&gt;\\_d'
    """
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plain = "".join(f"\\{c}" if c in "\\|*_`[]~" else c for c in plain)
    return f"**{plain}**" if isinstance(text, Bold) else plain


def escape_tex(text: str) -> str:
    r"""Text that LaTeX sets as it is.

    Example:
        >>> escape_tex("50 % of a_b")
        '50 \\% of a\\_b'
    """
    # pdflatex stops at a letter that its fonts do not have
    plain = "".join(_TEX.get(c, c if c.isascii() or c in _LETTERS else "?") for c in " ".join(text.split()))
    return rf"\textbf{{{plain}}}" if isinstance(text, Bold) else plain


def signed(value: float, digits: int) -> str:
    """A difference, with its sign.

    Example:
        >>> signed(-0.02, 1), signed(-0.5, 1)
        ('0.0', '−0.5')
    """
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def p_text(p_value: float) -> str:
    """A p value as one reads it.

    Example:
        >>> p_text(0.00004), p_text(0.0123), p_text(0.4321)
        ('<0.001', '0.012', '0.43')
    """
    if p_value < 0.001:
        return "<0.001"
    return f"{p_value:.3f}" if p_value < 0.1 else f"{p_value:.2f}"


def _markdown_table(table: Table) -> list[str]:
    rows = [list(table.columns), ["---", *["---:"] * (len(table.columns) - 1)]]
    lines = ["| " + " | ".join(map(escape_markdown, rows[0])) + " |", "|" + "|".join(rows[1]) + "|"]
    lines += ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in table.rows]
    found = [escape_markdown(f"{table.caption} {table.note}"), "\n".join(lines)]
    explained = _explained(table, escape_markdown)
    return [*found, explained] if explained else found


def _narrow(table: Table) -> list[Table]:
    # parts that fit a page of LaTeX, each with the first column
    wide = [max(map(len, column)) + _GAP for column in zip(table.columns, *table.rows, strict=True)]
    parts: list[list[int]] = [[]]
    for place in range(1, len(wide)):
        if parts[-1] and wide[0] + sum(wide[each] for each in parts[-1]) + wide[place] > _PAGE:
            parts.append([])
        parts[-1].append(place)
    if len(parts) == 1:
        return [table]
    titles, found = list(table.columns), []
    for number, part in enumerate(parts):
        kept = [0, *part]
        columns = {titles[each]: table.columns[titles[each]] if each or not number else "" for each in kept}
        caption = table.caption if not number else f"{table.caption.removesuffix('.')}, continued."
        rows = [[row[each] for each in kept] for row in table.rows]
        found.append(
            Table(
                table.label + (f"-{number + 1}" if number else ""), caption, columns, rows, "" if number else table.note
            )
        )
    return found


def _latex_table(table: Table) -> str:
    rows = [" & ".join(map(escape_tex, row)) + r" \\" for row in [list(table.columns), *table.rows]]
    # never wider than the page, whatever the class and the font
    fit = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
    lines = [
        r"\begin{table}[htbp]",
        rf"\caption{{{escape_tex(table.caption + ' ' + table.note)}}}",
        rf"\label{{tab:{table.label}}}",
        r"\centering\footnotesize",
        fit,
        rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
        r"\toprule",
        rows[0],
        r"\midrule",
        *rows[1:],
        r"\bottomrule",
        r"\end{tabular}}",
    ]
    explained = _explained(table, escape_tex)
    if explained:
        lines += [r"\par\smallskip\raggedright", explained]
    return "\n".join([*lines, r"\end{table}"])


def _explained(table: Table, escape: Callable[[str], str]) -> str:
    return " ".join(f"{escape(Bold(title))}: {escape(about)}" for title, about in table.columns.items() if about)
