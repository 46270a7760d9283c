"""Runs a model over the batches of all domains."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lightning_moe.analysis.texts import Batch
from lightning_moe.calibration import evaluating, generates

Progress = Callable[[Sequence[Batch], str], Iterable[Batch]]
"""Wraps the batches of one pass over the texts, which has a name, as ``tqdm`` does."""


@torch.no_grad()
def domain_losses(
    model: nn.Module, batches: Iterable[Batch], num_domains: int, *, before: Callable[[Batch], None] | None = None
) -> list[float] | None:
    """Runs the batches, in evaluation mode.

    Args:
        model: a text model of transformers.
        batches: what to run.
        num_domains: number of domains.
        before: called with each batch before it runs.

    Returns:
        Mean next-token loss of each domain, in nats; None where the model is no causal language model.
    """
    sums = torch.zeros(2, num_domains, dtype=torch.float64)
    with evaluating(model):
        for batch in batches:
            if before is not None:
                before(batch)
            sums[:, batch.domain] += _loss(model, batch)
    return (sums[0] / sums[1]).tolist() if generates(model) else None


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    device = next(model.parameters()).device
    ids = batch.input_ids.to(device)
    options: dict[str, Any] = {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    out = model(input_ids=ids, **options)
    total = torch.zeros((), dtype=torch.float64)
    if not generates(model):
        return torch.stack([total, total])
    # sequence by sequence: log-probabilities of a whole batch would take as much memory again
    for logits, labels in zip(out.logits, ids, strict=True):
        total += F.cross_entropy(logits[:-1].float(), labels[1:], reduction="sum").double().cpu()
    return torch.stack([total, torch.tensor(float(ids[:, 1:].numel()), dtype=torch.float64)])
