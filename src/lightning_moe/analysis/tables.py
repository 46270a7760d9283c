"""All numbers of an analysis as rows, for CSV files."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_moe.analysis.results import Analysis, Chance

Row = dict[str, Any]


def layer_rows(analysis: Analysis) -> list[Row]:
    """One row for each layer, with the numbers that it has one of."""
    plain = [
        "num_experts", "experts_per_token", "max_violation", "batch_max_violation", "dead_experts", "load_entropy",
        "effective_experts", "routing_entropy", "router_margin",
    ]  # fmt: skip
    chances = ["domain_total_variation", "domain_mutual_information", "vocabulary_specialization"]
    likeness = ["weight_cosine", "router_row_cosine", "output_cosine", "output_cka", "output_cka_chance"]
    rows = []
    for layer in analysis.layers:
        row: Row = {"layer": layer.name} | {name: getattr(layer, name) for name in plain}
        for name in chances:
            row |= _chance(name, getattr(layer, name))
        rows.append(row | {name: getattr(layer, name) for name in likeness})
    return rows


def expert_rows(analysis: Analysis) -> list[Row]:
    """One row for each expert: its load, and its share of each domain's tokens."""
    return [
        {"layer": layer.name, "expert": expert, "load": layer.load[expert], "relative_load": relative}
        | {
            f"share_of_{domain}": shares[expert]
            for domain, shares in zip(analysis.domains, layer.domain_shares, strict=True)
        }
        for layer in analysis.layers
        for expert, relative in enumerate(layer.relative_load)
    ]


def token_rows(analysis: Analysis) -> list[Row]:
    """The most specialised token ids of each expert."""
    return [
        {
            "layer": layer.name,
            "expert": expert,
            "token_id": token.token_id,
            "text": token.text,
            "count": token.count,
            "share": token.share,
        }
        for layer in analysis.layers
        for expert, tokens in enumerate(layer.specialized_tokens)
        for token in tokens
    ]


def coactivation_rows(analysis: Analysis) -> list[Row]:
    """One row for each ordered pair of experts of a layer."""
    return [
        {"layer": layer.name, "expert": expert, "other": other, "share": share}
        for layer in analysis.layers
        for expert, shares in enumerate(layer.coactivation)
        for other, share in enumerate(shares)
        if expert != other
    ]


def study_rows(analysis: Analysis) -> list[Row]:
    """The loss of each domain in each study."""
    return [
        {
            "study": study.name,
            "setting": study.setting,
            "domain": domain,
            "loss": loss,
            "difference": loss - analysis.studies[0].loss[domain],
        }
        for study in analysis.studies
        for domain, loss in study.loss.items()
    ]


def checkpoint_rows(analysis: Analysis) -> list[Row]:
    """One row for each layer of each checkpoint."""
    return [
        {
            "checkpoint": checkpoint.name,
            "layer": layer.name,
            "saturation": checkpoint.saturation[place],
            "saturation_top1": checkpoint.saturation_top1[place],
            "change": None if checkpoint.change is None else checkpoint.change[place],
            "max_violation": checkpoint.max_violation[place],
            "routing_entropy": checkpoint.routing_entropy[place],
        }
        for checkpoint in analysis.checkpoints
        for place, layer in enumerate(analysis.layers)
    ]


TABLES = {
    "layers": layer_rows,
    "experts": expert_rows,
    "tokens": token_rows,
    "coactivation": coactivation_rows,
    "studies": study_rows,
    "checkpoints": checkpoint_rows,
}


def write_tables(analysis: Analysis, directory: Path) -> list[str]:
    """Writes ``analysis.json``, with everything, and a CSV of each table that has rows.

    Returns:
        The names of the files.
    """
    (directory / "analysis.json").write_text(
        json.dumps(analysis.to_dict(), indent=1, ensure_ascii=False) + "\n", "utf-8"
    )
    names = ["analysis.json"]
    for name, rows_of in TABLES.items():
        if rows := rows_of(analysis):
            _write_csv(directory / f"{name}.csv", rows)
            names.append(f"{name}.csv")
    return names


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    # numbers with all their digits; what was not measured is an empty field
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _chance(name: str, chance: Chance | None) -> Row:
    return {
        name: None if chance is None else chance.value,
        f"{name}_chance": None if chance is None else chance.mean,
        f"{name}_chance_limit": None if chance is None else chance.limit,
    }
