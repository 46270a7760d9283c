"""A page of HTML that needs nothing but itself: pictures are inside it, and there is no script."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_moe.analysis.definitions import Definition
from lightning_moe.canvas import Canvas

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1f2328; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 44px 0 8px; padding-top: 14px; border-top: 1px solid #d5dae0; }
h3 { font-size: 17px; margin: 26px 0 6px; }
p, ul, dl { max-width: 76ch; margin: 8px 0; }
a { color: #0b57a4; }
code { font: 13px/1.5 ui-monospace, monospace; background: #f3f5f7; padding: 1px 4px; border-radius: 3px;
       overflow-wrap: anywhere; }
nav ol { columns: 2; column-gap: 32px; padding-left: 22px; margin: 8px 0; max-width: 76ch; }
.about, .source, figcaption { color: #59636e; font-size: 14px; }
.verdict { font-size: 19px; font-weight: 600; margin: 18px 0 10px; max-width: 60ch; }
.findings { list-style: none; padding: 0; max-width: 88ch; }
.findings li { border-left: 4px solid #9aa4ae; padding: 4px 0 4px 12px; margin: 10px 0; }
.findings .good { border-color: #2a8a5f; } .findings .watch { border-color: #d9822b; }
.findings .bad { border-color: #b23a48; }
.findings b { text-transform: uppercase; font-size: 12px; letter-spacing: 0.04em; margin-right: 6px; }
dl.definitions dt { margin-top: 10px; font-weight: 600; } dl.definitions dd { margin: 0 0 0 14px; }
.gallery { display: flex; flex-wrap: wrap; gap: 8px 28px; align-items: flex-start; }
figure { margin: 14px 0; max-width: 100%; overflow-x: auto; }
figure img { display: block; height: auto; }
.scroll { overflow-x: auto; max-width: 100%; margin: 12px 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid #e4e8ec; white-space: nowrap; }
th { font-weight: 600; background: #f3f5f7; } th:first-child, td:first-child { text-align: left; }
table.text td { text-align: left; white-space: normal; } table.text th { text-align: left; }
details { margin: 10px 0; } summary { cursor: pointer; color: #0b57a4; }
@media (max-width: 600px) {
  body { font-size: 15px; } main { padding: 16px 12px 48px; } nav ol { columns: 1; }
  h1 { font-size: 22px; } h2 { font-size: 19px; } .verdict { font-size: 17px; }
}
"""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        key: for links to it.
        title: its heading.
        parts: pieces of HTML.
        figures: the pictures in it, by the names of their files.
    """

    key: str
    title: str
    parts: list[str] = field(default_factory=list)
    figures: dict[str, Canvas] = field(default_factory=dict)

    def add(self, *parts: str) -> None:
        """Adds HTML."""
        self.parts.extend(parts)

    def leave_out(self, reason: str | None) -> bool:
        """Says why something is left out, and whether it is: not without a reason."""
        if reason is not None:
            self.add(paragraph(f"Left out: {reason}"))
        return reason is not None

    def figure(self, file: str, canvas: Canvas, description: str) -> str:
        """HTML of a picture, which is kept to be written as a file too.

        Args:
            file: name of the file.
            canvas: the picture.
            description: for those who do not see it.
        """
        self.figures[file] = canvas
        data = base64.b64encode(canvas.png()).decode()
        # not narrower than drawn: on a phone the figure scrolls, and its letters stay legible
        return (
            f'<figure><img src="data:image/png;base64,{data}" width="{canvas.width}" height="{canvas.height}" '
            f'alt="{html.escape(description)}"></figure>'
        )


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def definitions(items: Sequence[Definition]) -> str:
    """A list of what numbers are, with formula and source."""
    rows = []
    for item in items:
        source = ""
        if item.source is not None:
            name = html.escape(item.source)
            link = f'<a href="{html.escape(item.address)}">{name}</a>' if item.address else name
            source = f' <span class="source">Source: {link}.</span>'
        rows.append(
            f"<dt>{html.escape(item.name)}</dt><dd><code>{html.escape(item.formula)}</code><br>"
            f"{html.escape(item.meaning)}{source}</dd>"
        )
    return f'<dl class="definitions">{"".join(rows)}</dl>'


def table(header: Sequence[str], rows: Sequence[Sequence[str | int | float | None]], *, of_text: bool = False) -> str:
    """A table; what was not measured is a dash."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(written(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="text"' if of_text else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(summary: str, content: str) -> str:
    """Content that is opened by a click."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def gallery(figures: Sequence[str]) -> str:
    """Pictures side by side, as many as fit."""
    return f'<div class="gallery">{"".join(figures)}</div>'


def written(value: str | int | float | None) -> str:
    """A cell of a table."""
    if value is None:
        return "-"
    if isinstance(value, float):
        # small numbers keep two digits that are no zeros
        return f"{value:.2g}" if 0 < abs(value) < 0.01 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else value


def page(title: str, opening: str, sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: its heading.
        opening: HTML of what comes before the table of contents.
        sections: the rest.
    """
    contents = "".join(f'<li><a href="#{one.key}">{html.escape(one.title)}</a></li>' for one in sections)
    body = "".join(
        f'<section id="{one.key}"><h2>{html.escape(one.title)}</h2>{"".join(one.parts)}</section>' for one in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1>{opening}<nav><h3>Contents</h3><ol>{contents}</ol></nav>{body}"
        "</main></body></html>\n"
    )
