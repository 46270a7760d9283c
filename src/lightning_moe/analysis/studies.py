"""What the loss says of the routing: how much worse the model is with another one."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lightning_moe.analysis.forward import Progress, domain_losses
from lightning_moe.analysis.interventions import (
    Change,
    NotMeasurableError,
    rerouted,
    with_next_best,
    with_random_experts,
    with_temperature,
    without_best,
)
from lightning_moe.analysis.results import Study
from lightning_moe.analysis.texts import Batch

UNDISTURBED = "as trained"
WITHOUT_BEST = "best expert dropped"
NEXT_BEST = "next best for best"
TEMPERATURE = "logits times"
RANDOM = "random experts"


def run_studies(
    model: nn.Module,
    batches: Sequence[Batch],
    domains: Sequence[str],
    *,
    temperatures: Sequence[float],
    seed: int,
    progress: Progress,
) -> tuple[list[Study], list[str]]:
    """Computes the loss with the routing interfered with; the model is as before, whatever happens.

    Args:
        model: a causal language model with MoE layers of this package.
        batches: what to run.
        domains: names of the domains.
        temperatures: factors of the logits.
        seed: of the random experts.
        progress: wraps the batches of each study.

    Returns:
        The studies, and of those that cannot be made why.
    """
    kinds: list[tuple[str, float | None, Callable[[], Change]]] = [
        (WITHOUT_BEST, None, lambda: without_best),
        (NEXT_BEST, None, lambda: with_next_best),
        *((TEMPERATURE, factor, lambda f=factor: with_temperature(f)) for factor in temperatures),
        (RANDOM, None, lambda: with_random_experts(torch.Generator().manual_seed(seed))),
    ]
    studies, refused = [], []
    for name, setting, change in kinds:
        study = Study(name, setting, {})
        try:
            with rerouted(model, change()):
                losses = domain_losses(model, progress(batches, study.label), len(domains))
        except NotMeasurableError as error:
            refused.append(f"{study.label}: {error}")
            continue
        assert losses is not None
        studies.append(Study(name, setting, dict(zip(domains, losses, strict=True))))
    return studies, refused
