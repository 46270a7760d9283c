"""Writes what an analysis found: one page, its pictures, and all numbers."""

import html
from pathlib import Path

from lightning_moe.__about__ import __version__
from lightning_moe.analysis.page import Section, page, paragraph
from lightning_moe.analysis.results import Analysis
from lightning_moe.analysis.sections_experts import (
    domains_section,
    likeness_section,
    studies_section,
    vocabulary_section,
)
from lightning_moe.analysis.sections_routing import (
    certainty_section,
    checkpoints_section,
    coactivation_section,
    load_section,
)
from lightning_moe.analysis.tables import write_tables
from lightning_moe.analysis.verdict import findings, verdict


def write_report(analysis: Analysis, directory: str | Path) -> Path:
    """Writes ``report.html``, its pictures as PNG files, ``analysis.json`` and a CSV of each table.

    The page holds its pictures itself and needs no other file and no network.

    Args:
        analysis: what `analyze` returned.
        directory: where to, made if it does not exist; files of the same names are written over.

    Returns:
        The page.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    tables = write_tables(analysis, target)
    sections = [
        load_section(analysis),
        certainty_section(analysis),
        domains_section(analysis),
        vocabulary_section(analysis),
        coactivation_section(analysis),
        checkpoints_section(analysis),
        likeness_section(analysis),
        studies_section(analysis),
    ]
    for section in sections:
        for name, canvas in section.figures.items():
            (target / name).write_bytes(canvas.png())
    file = target / "report.html"
    text = page(f"Routing of {analysis.model}", _opening(analysis), [*sections, _files_section(sections, tables)])
    file.write_text(text, "utf-8")
    return file


def _opening(analysis: Analysis) -> str:
    found = findings(analysis)
    items = "".join(
        f'<li class="{one.status}"><b>{one.status}</b><strong>{html.escape(one.title[0].upper() + one.title[1:])}.'
        f"</strong> {html.escape(one.text)}</li>"
        for one in found
    )
    texts = ", ".join(f"{tokens:,} tokens of {domain}" for domain, tokens in analysis.tokens.items())
    experts = sorted({layer.num_experts for layer in analysis.layers})
    about = (
        f"{len(analysis.layers)} MoE layers of {' or '.join(map(str, experts))} experts; {texts}, in sequences of "
        f"{analysis.sequence_length}. lightning-moe {__version__}."
    )
    return (
        f'<p class="about">{html.escape(about)}</p><p class="verdict">{html.escape(verdict(found))}</p>'
        f'<ul class="findings">{items}</ul>'
    )


def _files_section(sections: list[Section], tables: list[str]) -> Section:
    pictures = [name for section in sections for name in section.figures]
    section = Section("files", "Files beside this page")
    section.add(
        paragraph(f"All numbers, with all their digits: {', '.join(tables)}."),
        paragraph(f"The pictures: {', '.join(pictures)}."),
    )
    return section
