"""Suites of the benchmark: one YAML of models, algorithms, data, budget, tasks and seeds, and the cells it spans.

Every cell is a configuration of LightningCLI, so that ``lightning fit --config`` runs it too. It is put together from
the suite's ``run``, the model's and the algorithm's, each over the ones before; ``upcycle``, put together likewise,
holds the arguments of its `MoEUpcycleCallback`. A suite that ``extends`` another says what differs; null takes a model
or an algorithm away. An entry that is exactly ``{steps}``, ``{seed}`` or
``{model}`` (the folder of the weights) stands for that of the cell.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, ROOT

Settings = dict[str, Any]

SUITES = ROOT / "suites"
REPOSITORY = ROOT.parent
_KEYS = {
    "about": str,
    "extends": str,
    "seeds": list,
    "steps": int,
    "prepare": list,
    "threads": int,
    "checkpoint_every_n_steps": int,
    "baselines": dict,
    "reference": str,
    "run": dict,
    "upcycle": dict,
    "tasks": dict,
    "models": dict,
    "algorithms": dict,
}
_MODEL_KEYS = {
    "title",
    "weights",
    "about",
    "seeds",
    "steps",
    "run",
    "upcycle",
    "tasks",
    "pretrain",
    "architecture",
    "toy",
}
_ALGORITHM_KEYS = {"title", "about", "run", "upcycle", "tasks", "same_flops_as"}


@dataclass(frozen=True)
class Cell:
    """One run: a model, made into a Mixture of Experts or not, trained and evaluated with one seed.

    Args:
        suite: its name.
        model: the model's key in the suite.
        algorithm: the algorithm's key.
        seed: of everything random.
        config: of LightningCLI; see `Suite.config`.
        tasks: of the zero-shot evaluation: names, include_path, limit, ...
    """

    suite: str
    model: str
    algorithm: str
    seed: int
    config: Settings
    tasks: Settings

    @property
    def name(self) -> str:
        """As it stands in messages, and in the names of files."""
        return f"{self.model}/{self.algorithm}_seed{self.seed}"


@dataclass(frozen=True)
class Suite:
    """A suite as it was read.

    Args:
        name: the file's, without its ending.
        settings: what stands in the file, over what it extends.
        results: where its cells are written.
    """

    name: str
    settings: Settings
    results: Path

    @property
    def models(self) -> dict[str, Settings]:
        """Settings of each model."""
        found: dict[str, Settings] = self.settings["models"]
        return found

    @property
    def algorithms(self) -> dict[str, Settings]:
        """Settings of each algorithm."""
        found: dict[str, Settings] = self.settings["algorithms"]
        return found

    def seeds(self, model: str) -> list[int]:
        """The model's own, or the suite's."""
        found: list[int] = (self.settings | self.models[model])["seeds"]
        return found

    def steps(self, model: str) -> int:
        """Optimizer steps of the model's runs, but those of an algorithm with ``same_flops_as``."""
        return int((self.settings | self.models[model])["steps"])

    def order(self) -> Iterator[tuple[str, str, int]]:
        """Model, algorithm and seed of each cell: the first seed of all comes before the second of any."""
        most = max(len(self.seeds(model)) for model in self.models)
        for place in range(most):
            for algorithm in self.algorithms:
                for model in self.models:
                    if place < len(self.seeds(model)):
                        yield model, algorithm, self.seeds(model)[place]

    def file(self, model: str, algorithm: str, seed: int) -> Path:
        """Where the cell's record is written."""
        return self.results / model / f"{algorithm}_seed{seed}.json"

    def config(self, model: str, algorithm: str, seed: int, weights: str, steps: int) -> Settings:
        """The cell's configuration for LightningCLI.

        Args:
            model: a key of ``models``.
            algorithm: a key of ``algorithms``.
            seed: of everything random.
            weights: folder or Hub name of the model.
            steps: optimizer steps.
        """
        parts = (self.settings, self.models[model], self.algorithms[algorithm])
        config = merged(*(part.get("run") or {} for part in parts))
        if (own := self.algorithms[algorithm].get("upcycle")) is not None:
            arguments = merged(self.settings.get("upcycle") or {}, self.models[model].get("upcycle") or {}, own)
            upcycling = {"class_path": "MoEUpcycleCallback", "init_args": arguments}
            # before those that look for MoE layers
            callbacks = [upcycling, *config.setdefault("trainer", {}).get("callbacks", [])]
            config["trainer"]["callbacks"] = callbacks
        config.setdefault("seed_everything", "{seed}")
        found: Settings = filled(config, {"{steps}": steps, "{seed}": seed, "{model}": weights})
        return found

    def tasks(self, model: str, algorithm: str) -> Settings:
        """What the cell is evaluated on."""
        parts = (self.settings, self.models[model], self.algorithms[algorithm])
        return merged(*(part.get("tasks") or {} for part in parts))


def load_suite(name: str, results: Path | None = None) -> Suite:
    """Reads a suite.

    Args:
        name: of a file in ``benchmarks/suites``, or the path of a file anywhere.
        results: where its cells are written; None takes ``benchmarks/results/<name>``, or, of a file elsewhere,
            ``results/<name>`` beside it.

    Raises:
        FileNotFoundError: if there is no such suite.
        ValueError: if it says something that no suite knows.
    """
    path = _path(name)
    settings = _read(path)
    _check(settings, path)
    folder = RESULTS if path.parent == SUITES else path.parent / "results"
    return Suite(path.stem, settings, results or folder / path.stem)


def _path(name: str) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(found.stem for found in SUITES.glob("*.yaml"))
        raise FileNotFoundError(f"suite {name!r} does not exist. There are {', '.join(known)}; or give a YAML's path.")
    return path.resolve()


def _read(path: Path) -> Settings:
    settings = yaml.safe_load(path.read_text())
    if not isinstance(settings, dict):
        raise ValueError(f"{path.name} holds no settings. Wanted keys such as models and algorithms.")
    if (base := settings.pop("extends", None)) is None:
        return settings
    extended = _read(_path(str(path.parent / base) if base.endswith(".yaml") else base))
    # what it says of itself holds for itself
    extended.pop("about", None)
    whole = merged(extended, settings)
    for group in ("models", "algorithms"):
        # null takes one away
        whole[group] = {name: found for name, found in whole[group].items() if found is not None}
    return whole


def _check(settings: Settings, path: Path) -> None:
    _known(settings, _KEYS, path.name)
    for key in ("seeds", "steps", "run", "models", "algorithms"):
        if not settings.get(key):
            raise ValueError(f"{path.name}: {key} is missing or empty.")
    for key, value in settings.items():
        if not isinstance(value, _KEYS[key]):
            raise ValueError(f"{path.name}: {key} is {value!r}; wanted a {_KEYS[key].__name__}.")
    for group, keys in (("models", _MODEL_KEYS), ("algorithms", _ALGORITHM_KEYS)):
        for name, found in settings[group].items():
            _known(found, keys, f"{path.name}: {group}.{name}")
    algorithms = settings["algorithms"]
    settings.setdefault("baselines", {})
    named = {"reference": settings.get("reference"), **{f"baselines.{k}": v for k, v in settings["baselines"].items()}}
    named |= {f"algorithms.{key}.same_flops_as": value.get("same_flops_as") for key, value in algorithms.items()}
    for place, algorithm in named.items():
        if algorithm is not None:
            choose([algorithm], algorithms, f"{path.name}: {place}")


def choose(wanted: Sequence[str] | None, known: Mapping[str, Any], place: str) -> list[str]:
    """Those wanted, or all; in the order of those known.

    Raises:
        ValueError: if one is not known.
    """
    for name in wanted or ():
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            meant = f"Did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{place}: there is no {name!r}. {meant}There are {', '.join(known)}.")
    return [name for name in known if wanted is None or name in wanted]


def _known(found: Settings, keys: Mapping[str, Any] | set[str], place: str) -> None:
    for key in found:
        if key not in keys:
            close = get_close_matches(str(key), keys, n=1)
            meant = f" Did you mean {close[0]!r}?" if close else f" Known are {', '.join(sorted(keys))}."
            raise ValueError(f"{place}: there is no key {key!r}.{meant}")


def merged(*parts: Settings) -> Settings:
    """Puts settings together: a later one wins; dictionaries are merged, unless they name another class."""
    result: Settings = {}
    for part in parts:
        for key, value in part.items():
            old = result.get(key)
            if isinstance(old, dict) and isinstance(value, dict) and not _is_another_class(old, value):
                result[key] = merged(old, value)
            else:
                result[key] = deepcopy(value)
    return result


def _is_another_class(old: Settings, new: Settings) -> bool:
    return "class_path" in new and new["class_path"] != old.get("class_path")


def first_difference(old: Any, new: Any, place: str = "") -> str | None:
    """Where two settings differ first, in words; None if nowhere.

    Example:
        >>> first_difference({"trainer": {"max_steps": 4}}, {"trainer": {"max_steps": 5}})
        'trainer.max_steps was 4 and is 5'
    """
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else f"{place} was {old!r} and is {new!r}"
    for key in dict.fromkeys([*old, *new]):
        inner = f"{place}.{key}" if place else str(key)
        if found := first_difference(old.get(key), new.get(key), inner):
            return found
    return None


def filled(value: Any, words: Mapping[str, Any]) -> Any:
    """Puts what they stand for in the place of words such as ``{steps}``."""
    if isinstance(value, dict):
        return {key: filled(inner, words) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, words) for inner in value]
    return words.get(value, value) if isinstance(value, str) else value
