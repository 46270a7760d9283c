"""The tables over all models of a suite: ranks, and what the tests say of losses and zero-shot scores."""

import math

from cells import Results
from contrasts import Contrast, loss_contrasts, loss_pairs, loss_ranks, mean_ranks, rank_ranges, score_contrasts
from typeset import NOTHING, Bold, Table, p_text, signed

_P = "after Holm's correction over the rows of this table."


def ranking(results: Results) -> Table:
    """Ranks of the algorithms over all models, the best first."""
    models = results.models
    means, ranges = mean_ranks(results, models), rank_ranges(results, models)
    single = {model: loss_ranks(results, model) for model in models}
    order = sorted(ranges, key=lambda name: (means.get(name, math.inf), results.algorithms.index(name)))
    rows = []
    for name in order:
        low, high = ranges[name]
        mean = f"{means[name]:.2f}" if name in means else NOTHING
        each = [f"{single[model][name]:g}" if name in single[model] else NOTHING for model in models]
        title = results.title(name)
        rows.append([Bold(title) if high == 1 else title, f"{low} to {high}" if low < high else f"{low}", mean, *each])
    columns = {
        "algorithm": "the best mean rank first; bold if it is resolved to be the best.",
        "resolved rank": "ranks that the tests of all pairs of algorithms, corrected together, leave open; a wide "
        "range says that the rank is not resolved.",
        "mean rank": "mean over the models of the rank by mean loss, 1 for the lowest; equal losses share a rank. "
        "Behind it the rank on each model.",
        **{results.model_title(model): "" for model in models},
    }
    note = "The dense baselines are not ranked."
    return Table("ranks", "Ranks by the final validation loss.", columns, rows, note)


def pooled_losses(results: Results, reference: str) -> Table:
    """The loss of each algorithm against that of one of them, over all models."""
    found = loss_contrasts(results, reference, results.models)
    rows = []
    for name, contrast in found.items():
        signs = [_mean_loss_difference(results, reference, name, model) for model in results.models]
        known = [sign for sign in signs if not math.isnan(sign)]
        lower = f"{sum(sign < 0 for sign in known)} of {len(known)}"
        rows.append([results.title(name), str(contrast.found.count), lower, *_tested(contrast, 1.0, 4)])
    columns = {
        "algorithm": "",
        "pairs": "pairs of a model and a seed with which both finished.",
        "lower in": "models in which the mean loss is below that of the other, resolved or not.",
        "difference": "mean over the pairs, in nats per token; less than 0 is better.",
        "95 % interval": "of the difference in this row alone, not corrected for the number of rows.",
        "p": _P,
        "verdict": "what a p below 0.05 says of the loss.",
    }
    return Table(
        f"loss-against-{reference}",
        f"Final validation loss against {results.title(reference)}, all models.",
        columns,
        rows,
    )


def pooled_scores(results: Results, reference: str) -> Table:
    """The zero-shot score of each algorithm against that of one of them, over all models."""
    found = score_contrasts(results, reference, results.models)
    rows = [
        [results.title(name), str(contrast.found.count), *_tested(contrast, 100.0, 1)]
        for name, contrast in found.items()
    ]
    columns = {
        "algorithm": "",
        "documents": "questions that both answered; each is one pair.",
        "difference": "of the mean score over tasks, in percentage points; more than 0 is better.",
        "95 % interval": "over documents, of this row alone, not corrected for the number of rows.",
        "p": _P,
        "verdict": "what a p below 0.05 says of the score.",
    }
    return Table(
        f"score-against-{reference}", f"Zero-shot score against {results.title(reference)}, all models.", columns, rows
    )


def _tested(contrast: Contrast, factor: float, digits: int) -> list[str]:
    found = contrast.found
    ends = [signed(factor * end, digits) for end in (found.low, found.high)]
    interval = " to ".join(ends) if math.isfinite(found.low) else NOTHING
    if math.isnan(contrast.p_value):
        return [signed(factor * found.difference, digits), interval, NOTHING, "one pair, not tested"]
    verdict = ("lower" if found.difference < 0 else "higher") if contrast.is_resolved else "not resolved"
    return [signed(factor * found.difference, digits), interval, p_text(contrast.p_value), verdict]


def _mean_loss_difference(results: Results, first: str, second: str, model: str) -> float:
    one, other = loss_pairs(results, first, second, [model])
    return float((other - one).mean()) if len(one) else math.nan
