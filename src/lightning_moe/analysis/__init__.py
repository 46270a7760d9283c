"""What a model's routing looks like: over texts of several domains, over checkpoints, and what it is worth."""

from lightning_moe.analysis.analyze import analyze
from lightning_moe.analysis.report import write_report
from lightning_moe.analysis.results import Analysis

__all__ = ["Analysis", "analyze", "write_report"]
