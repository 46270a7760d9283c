"""The one place that knows what each logger can show: numbers, pictures, histograms, text."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from lightning.pytorch import Trainer
from torch import Tensor

# By what a logger or its writer offers, and not by its class: a SummaryWriter may be wrapped by anything, and the
# packages of Weights & Biases and MLflow need not be there.


def log_scalars(trainer: Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Writes numbers to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(scalars), step=step)


def log_image(trainer: Trainer, name: str, picture: UInt8[np.ndarray, "H W 3"], step: int) -> None:
    """Writes an RGB picture to TensorBoard, Weights & Biases and MLflow, on the first rank."""
    for logger, writer in _loggers(trainer):
        if hasattr(writer, "add_image"):
            writer.add_image(name, picture, step, dataformats="HWC")
        elif hasattr(logger, "log_image"):
            logger.log_image(key=name, images=[picture], step=step)
        elif hasattr(writer, "log_image") and hasattr(logger, "run_id"):
            writer.log_image(logger.run_id, picture, artifact_file=f"{name}_{step}.png")


def log_histogram(trainer: Trainer, name: str, values: Float[Tensor, " X"], step: int) -> None:
    """Writes a histogram to TensorBoard, on the first rank; no other logger has one without its own package."""
    for _, writer in _loggers(trainer):
        if hasattr(writer, "add_histogram"):
            writer.add_histogram(name, values.float().cpu(), step)


def log_text(trainer: Trainer, name: str, markdown: str, step: int = 0) -> None:
    """Writes Markdown to TensorBoard, Weights & Biases and MLflow, on the first rank."""
    for logger, writer in _loggers(trainer):
        if hasattr(writer, "add_text"):
            writer.add_text(name, markdown, step)
        elif hasattr(logger, "log_text"):
            logger.log_text(key=name, columns=["text"], data=[[markdown]], step=step)
        elif hasattr(writer, "log_text") and hasattr(logger, "run_id"):
            writer.log_text(logger.run_id, markdown, artifact_file=f"{name}.md")


def log_layout(trainer: Trainer, layout: Mapping[str, Mapping[str, list[Any]]]) -> None:
    """Arranges charts on TensorBoard's page of custom scalars, on the first rank; a layout takes the place of another.

    Args:
        trainer: whose loggers are written to.
        layout: category to chart to its kind and its tags, as ``SummaryWriter.add_custom_scalars`` takes it.
    """
    for _, writer in _loggers(trainer):
        if hasattr(writer, "add_custom_scalars"):
            writer.add_custom_scalars(layout)


def _loggers(trainer: Trainer) -> list[tuple[Any, Any]]:
    # each logger and the object that it writes with
    if not trainer.is_global_zero:
        return []
    return [(logger, getattr(logger, "experiment", None)) for logger in trainer.loggers]
