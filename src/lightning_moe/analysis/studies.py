"""What the loss says of the routing: how much worse the model is with another one."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn

from lightning_moe.analysis.forward import Progress, domain_losses
from lightning_moe.analysis.interventions import (
    NotMeasurableError,
    rerouted,
    tempered,
    with_next_best,
    with_random_experts,
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
        model: a causal language model with MoE layers, of this package or attached.
        batches: what to run.
        domains: names of the domains.
        temperatures: factors of the logits.
        seed: of the random experts.
        progress: wraps the batches of each study.

    Returns:
        The studies, and of those that cannot be made why.
    """
    random = with_random_experts(torch.Generator().manual_seed(seed))
    kinds: list[tuple[str, float | None, Callable[[], AbstractContextManager[None]]]] = [
        (WITHOUT_BEST, None, partial(rerouted, model, without_best)),
        (NEXT_BEST, None, partial(rerouted, model, with_next_best)),
        *((TEMPERATURE, factor, partial(tempered, model, factor)) for factor in temperatures),
        (RANDOM, None, partial(rerouted, model, random)),
    ]
    studies, refused = [], []
    for name, setting, interfering in kinds:
        study = Study(name, setting, {})
        try:
            with interfering():
                losses = domain_losses(model, progress(batches, study.label), len(domains))
        except NotMeasurableError as error:
            refused.append(f"{study.label}: {error}")
            continue
        assert losses is not None
        studies.append(Study(name, setting, dict(zip(domains, losses, strict=True))))
    return studies, refused
