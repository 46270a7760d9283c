"""Reads the cells of a suite: what each run measured, which runs failed and which are missing."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from suites import Suite

Record = dict[str, Any]
Key = tuple[str, str, int]
Measure = Callable[[Record], float | None]
Documents = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over seeds.

    Args:
        mean: nan without any.
        deviation: of a sample, by ``count - 1``; nan of fewer than two.
        count: seeds.
    """

    mean: float
    deviation: float
    count: int


@dataclass(frozen=True)
class Results:
    """The cells of a suite.

    Args:
        suite: it.
        cells: records of finished runs by model, algorithm and seed.
        failed: what went wrong, of the runs that failed.
    """

    suite: Suite
    cells: Mapping[Key, Record]
    failed: Mapping[Key, str]

    @property
    def algorithms(self) -> list[str]:
        """All, in the order of the suite."""
        return list(self.suite.algorithms)

    @property
    def models(self) -> list[str]:
        """Those with a finished run."""
        return [model for model in self.suite.models if any(key[0] == model for key in self.cells)]

    @property
    def baselines(self) -> dict[str, str]:
        """Those that the suite names, ``tokens`` before ``flops``; each an algorithm."""
        named = self.suite.settings.get("baselines") or {}
        return {kind: named[kind] for kind in ("tokens", "flops") if named.get(kind)}

    @property
    def ranked(self) -> list[str]:
        """The algorithms that are no baselines."""
        return [name for name in self.algorithms if name not in self.baselines.values()]

    @property
    def references(self) -> list[str]:
        """What the others are held against: the baselines, and the algorithm of reference."""
        named = [*self.baselines.values(), self.suite.settings.get("reference")]
        return [name for name in dict.fromkeys(named) if name is not None]

    def title(self, algorithm: str) -> str:
        """As the suite has it, or its name."""
        return str(self.suite.algorithms[algorithm].get("title", algorithm))

    def model_title(self, model: str) -> str:
        """As the suite has it, or its name."""
        return str(self.suite.models[model].get("title", model))

    def runs(self, model: str, algorithm: str) -> dict[int, Record]:
        """The finished runs by seed."""
        seeds = self.suite.seeds(model)
        found = {seed: self.cells.get((model, algorithm, seed)) for seed in seeds}
        return {seed: record for seed, record in found.items() if record is not None}

    def values(self, model: str, algorithm: str, measure: Measure) -> dict[int, float]:
        """A measure of the finished runs that have it, by seed."""
        found = {seed: measure(record) for seed, record in self.runs(model, algorithm).items()}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def summary(self, model: str, algorithm: str, measure: Measure) -> Summary:
        """A measure over the seeds."""
        return summarize(list(self.values(model, algorithm, measure).values()))

    def missing(self, model: str) -> dict[str, int]:
        """How many seeds of each algorithm neither finished nor failed; only of those that miss some."""
        done, seeds = {*self.cells, *self.failed}, self.suite.seeds(model)
        counts = {name: sum((model, name, seed) not in done for seed in seeds) for name in self.algorithms}
        return {name: count for name, count in counts.items() if count}


def read_results(suite: Suite) -> Results:
    """Reads all cells that the suite spans; files of other cells in its folder are left alone."""
    cells: dict[Key, Record] = {}
    failed: dict[Key, str] = {}
    for key in sorted(suite.order()):
        file = suite.file(*key)
        if not file.is_file():
            continue
        record = json.loads(file.read_text())
        if record.get("error") is not None:
            failed[key] = str(record["error"])
        elif final_loss(record) is None:
            failed[key] = "the last validation loss is no finite number"
        else:
            cells[key] = record
    return Results(suite, cells, failed)


def summarize(values: Sequence[float]) -> Summary:
    """Mean and standard deviation.

    Example:
        >>> summarize([1.0, 2.0, 3.0])
        Summary(mean=2.0, deviation=1.0, count=3)
    """
    count = len(values)
    mean = float(np.mean(values)) if count else math.nan
    return Summary(mean, float(np.std(values, ddof=1)) if count > 1 else math.nan, count)


def final_loss(record: Record) -> float | None:
    """Validation loss at the end, mean over the domains, in nats per token; None if it is not finite."""
    return _finite(record["losses"]["validation"][-1].get("mean"))


def start_loss(record: Record) -> float | None:
    """Validation loss before the first step; None if it was not measured."""
    first = record["losses"]["validation"][0]
    return _finite(first.get("mean")) if first["step"] == 0 else None


def number(*path: str) -> Measure:
    """The measure that stands in a record under these keys.

    Example:
        >>> number("seconds", "cpu")({"seconds": {"cpu": 3.5}})
        3.5
    """

    def measure(record: Record) -> float | None:
        value: Any = record
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return _finite(value)

    return measure


def routing(name: str) -> Measure:
    """A measure of the routing at the end: of the last validation, or else the last that was logged in training."""

    def measure(record: Record) -> float | None:
        whole = record.get("final_routing") or {}
        logged = [row[name] for row in record.get("routing") or [] if name in row]
        return _finite(whole.get(name, logged[-1] if logged else None))

    return measure


def task_score(task: str, moment: str = "end") -> Measure:
    """The main metric of a task."""

    def measure(record: Record) -> float | None:
        scores = (record.get("scores") or {}).get(moment) or {}
        return _finite(scores.get(task, {}).get((record.get("main_metric") or {}).get(task)))

    return measure


def mean_score(tasks: Sequence[str], moment: str = "end", chances: Mapping[str, float] | None = None) -> Measure:
    """Mean over tasks of their main metrics, less chance if it is given; None unless all are there."""

    def measure(record: Record) -> float | None:
        found = [task_score(task, moment)(record) for task in tasks]
        known = [
            value - (chances or {}).get(t, 0.0) for t, value in zip(tasks, found, strict=True) if value is not None
        ]
        return float(np.mean(known)) if known and len(known) == len(found) else None

    return measure


def tasks_of(results: Results, model: str) -> list[str]:
    """The tasks that any run of a model was evaluated on."""
    found = (
        task for key, record in results.cells.items() if key[0] == model for task in record.get("main_metric") or {}
    )
    return sorted(dict.fromkeys(found))


def chances_of(results: Results, model: str) -> dict[str, float]:
    """What guessing gets in each task, where it is known."""
    found: dict[str, float] = {}
    for key, record in results.cells.items():
        if key[0] == model:
            found |= {task: float(value) for task, value in (record.get("chance") or {}).items() if value is not None}
    return found


def documents_of(results: Results, model: str, algorithm: str, seeds: Sequence[int]) -> Documents:
    """Main metric of each document at the end, mean over the seeds; tasks that one of the runs lacks are left out."""
    runs = results.runs(model, algorithm)
    records = [runs[seed].get("documents") or {} for seed in seeds]
    found: Documents = {}
    for task in sorted(set.intersection(*map(set, records)) if records else ()):
        answers = [np.asarray(record[task], dtype=float) for record in records]
        if len({answer.shape for answer in answers}) == 1 and answers[0].size:
            found[task] = np.mean(answers, axis=0)
    return found


def load_by_rank(record: Record) -> list[float] | None:
    """Load of the experts over the fair share, the most loaded first, mean over layers; None of a dense model."""
    layers = record.get("expert_load")
    if not layers:
        return None
    width = max(map(len, layers))
    ordered = np.full((len(layers), width), np.nan)
    for row, layer in zip(ordered, layers, strict=True):
        row[: len(layer)] = np.sort(layer)[::-1] * len(layer)
    return [float(value) for value in np.nanmean(ordered, axis=0)]


def origins(results: Results) -> dict[str, Counter[str]]:
    """How many cells come from each commit, hardware, number of threads and set of versions."""
    found: dict[str, Counter[str]] = {
        name: Counter() for name in ("commit", "hardware", "number of threads", "versions")
    }
    for record in results.cells.values():
        changed = " with uncommitted changes" if record.get("src_differs_from_commit") else ""
        found["commit"][str(record.get("commit", "unknown"))[:8] + changed] += 1
        found["hardware"][str(record.get("hardware", "unknown"))] += 1
        found["number of threads"][str(record.get("threads", "unknown"))] += 1
        versions = record.get("versions") or {}
        found["versions"][", ".join(f"{name} {value}" for name, value in versions.items()) or "unknown"] += 1
    return found


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
