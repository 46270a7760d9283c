"""Zero-shot evaluation with lm-eval of a model that lives in this process. Needs the extra ``eval``.

The model is left as it was found: each module in its own mode, and every global random generator in its own state, so
that a model that is in training trains on as if nothing had been.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from lightning_moe.checks import check_whole

# before any lm_eval: it has the words for a missing one
from lightning_moe.live_model import LiveHFLM, find_language_model
from lightning_moe.randomness import kept_random_state

__all__ = [
    "LiveHFLM",
    "Scores",
    "as_json",
    "evaluate_model",
    "find_language_model",
    "load_tasks",
    "metric_name",
    "score_table",
    "scores",
]

Scores = dict[str, dict[str, float]]

# lm-eval's own, of its simple_evaluate
_FEWSHOT_SEED = 1234
# For metrics without a formula of their error, such as a perplexity: 2% off. lm-eval's 100,000 take minutes.
_BOOTSTRAP_SAMPLES = 1000


def load_tasks(names: Sequence[str], include_path: str | Path | None = None) -> dict[str, Any]:
    """Loads tasks of lm-eval, to be evaluated as often as one likes.

    With ``num_fewshot`` as the task has it, and none where it has none. If all of them stand in ``include_path``, the
    index of lm-eval's own 14,000 is not read, which takes 10 to 30 seconds.

    Args:
        names: of lm-eval's tasks, groups or tags, or of tasks in ``include_path``.
        include_path: directory of YAML files with tasks of one's own.

    Returns:
        What lm-eval's ``TaskManager.load`` does: under ``tasks`` each task by its name, and the groups.

    Raises:
        FileNotFoundError: if ``include_path`` is no directory, or if a task in it includes a file that is gone.
        ValueError: if there is no name, or none such.
    """
    from lm_eval.tasks import TaskManager

    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError("tasks: wanted at least one name, as ['hellaswag'].")
    folder = None if include_path is None else Path(include_path).expanduser()
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"include_path={str(include_path)!r} is no directory. Give one that holds YAML files.")
    if folder is not None:
        _check_included(folder)
    with kept_random_state():
        manager = None if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
        # the members of a group may be official
        if manager is None or not set(names) <= set(manager.all_subtasks):
            manager = TaskManager(include_path=None if folder is None else str(folder))
        _check_known(names, manager.all_tasks)
        loaded: dict[str, Any] = dict(manager.load(names))
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return loaded


def evaluate_model(
    lm: LiveHFLM, tasks: Mapping[str, Any], limit: int | None = None, *, log_samples: bool = False
) -> dict[str, Any]:
    """Evaluates a model on loaded tasks; every rank must call it, and gets the same results.

    Args:
        lm: the model.
        tasks: what `load_tasks` returned.
        limit: documents of each task, the first ones; None takes all.
        log_samples: whether the results also hold each document and what the model made of it.

    Returns:
        What lm-eval's ``evaluate`` does; `scores` picks the numbers. The standard errors of metrics without a formula
        for them come from 1,000 bootstrap samples.

    Raises:
        ValueError: if the limit is no whole number of 1 or more, or if a task has fewer documents than there are ranks.

    Example:
        >>> lm = LiveHFLM(model, tokenizer)  # doctest: +SKIP
        >>> evaluate_model(lm, load_tasks(["piqa"]), limit=200)["results"]["piqa"]["acc,none"]  # doctest: +SKIP
        0.66
    """
    from lm_eval.evaluator import evaluate

    if limit is not None:
        check_whole(limit=limit)
    for name, task in tasks["tasks"].items():
        count = len(task.eval_docs) if limit is None else min(limit, len(task.eval_docs))
        if count < lm.world_size:
            raise ValueError(
                f"{name}: {count} documents are too few for {lm.world_size} ranks, each of which needs one. Raise "
                "`limit`, or leave the task out."
            )
        # every evaluation asks with the same examples
        task.set_fewshot_seed(_FEWSHOT_SEED)
    with kept_random_state(), _single_process():
        results = evaluate(lm, dict(tasks), limit=limit, bootstrap_iters=_BOOTSTRAP_SAMPLES, log_samples=log_samples)
    if lm.world_size > 1:
        shared = [results]
        dist.broadcast_object_list(shared, src=0)
        results = shared[0]
    found: dict[str, Any] = dict(results)
    return found


def scores(results: Mapping[str, Any]) -> Scores:
    """Picks the numbers from what `evaluate_model` returned: task, or group, to metric to value.

    A standard error stands beside its metric, as ``acc_stderr``. A metric that is computed through a filter has the
    filter's name behind its own.

    Example:
        >>> scores({"results": {"piqa": {"alias": "piqa", "acc,none": 0.66, "acc_stderr,none": 0.02}}})
        {'piqa': {'acc': 0.66, 'acc_stderr': 0.02}}
    """
    found: Scores = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            # other entries are the task's name and its number of documents; an error that is unknown is "N/A"
            if "," in key and isinstance(value, (int, float)):
                found.setdefault(task, {})[metric_name(key)] = float(value)
    return found


def metric_name(key: str) -> str:
    """What `scores` calls a metric, by lm-eval's key: the metric, a comma, and its filter.

    Example:
        >>> metric_name("acc,none"), metric_name("exact_match_stderr,strict")
        ('acc', 'exact_match_strict_stderr')
    """
    metric, _, kind = key.partition(",")
    error = "_stderr" if metric.endswith("_stderr") else ""
    return metric if kind == "none" else f"{metric.removesuffix('_stderr')}_{kind}{error}"


def score_table(found: Scores) -> str:
    """Writes `scores` as a table.

    Example:
        >>> print(score_table({"piqa": {"acc": 0.66, "acc_stderr": 0.02}, "wiki": {"perplexity": 12.5}}))
        task  metric        value  std. error
        piqa  acc          0.6600      0.0200
        wiki  perplexity  12.5000
    """
    rows = [("task", "metric", "value", "std. error")]
    for task, values in found.items():
        for metric, value in values.items():
            if not (metric.endswith("_stderr") and metric.removesuffix("_stderr") in values):
                spread = values.get(f"{metric}_stderr", math.nan)
                rows.append((task, metric, f"{value:.4f}", "" if math.isnan(spread) else f"{spread:.4f}"))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{task:<{wide[0]}}  {metric:<{wide[1]}}  {value:>{wide[2]}}  {error:>{wide[3]}}".rstrip()
        for task, metric, value, error in rows
    )


def as_json(value: Any) -> Any:
    """What JSON can hold of a value: nothing that is not finite, which is None, and of objects their text.

    Example:
        >>> as_json({"acc": float("nan"), "pair": (1, "one")})
        {'acc': None, 'pair': [1, 'one']}
    """
    if isinstance(value, Mapping):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _check_included(folder: Path) -> None:
    # lm-eval leaves such a task out without a word, and takes its official namesake
    for file in sorted(folder.rglob("*.yaml")):
        for included in re.findall(r"^include:\s*(\S.*?)\s*$", file.read_text(encoding="utf-8"), re.MULTILINE):
            target = Path(included.strip("'\""))
            if target.is_absolute() and not target.is_file():
                raise FileNotFoundError(
                    f"include_path: {file} includes {target}, which is gone. If `lightning-moe tasks prepare` wrote "
                    "it, remove the directory and run that again."
                )


def _check_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, n=3)
            meant = f"Did you mean {', '.join(map(repr, close))}?" if close else "For all: lm-eval ls tasks."
            raise ValueError(f"tasks: there is no {name!r}. {meant} Tasks of your own are found with `include_path`.")


@contextmanager
def _single_process() -> Iterator[None]:
    # lm-eval would fork a process per core for the bootstrap, which a process with threads or CUDA must not do
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
