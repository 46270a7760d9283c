"""Runs the missing cells of a suite: every algorithm on every model with every seed.

Finished cells are skipped, so a run that was killed goes on where it stopped; each cell runs in a process of its own
and leaves one JSON. `tabulate.py` makes tables and plots of them.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from suites import REPOSITORY, Cell, Suite, choose, first_difference, load_suite

Key = tuple[str, str, int]

WORK = REPOSITORY / "examples" / ".cache" / "benchmark"


def main() -> None:
    """Runs the command."""
    args = _arguments()
    os.chdir(REPOSITORY)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # what the server of the cells imports keeps locks as long as it lives
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    try:
        suite = load_suite(args.suite, args.results)
        models = choose(args.models, suite.models, "--models")
        algorithms = choose(args.algorithms, suite.algorithms, "--algorithms")
        seeds = {str(seed): seed for model in models for seed in suite.seeds(model)}
        choose(None if args.seeds is None else list(map(str, args.seeds)), seeds, "--seeds")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    wanted = [
        key
        for key in suite.order()
        if key[0] in models and key[1] in algorithms and (args.seeds is None or key[2] in args.seeds)
    ]
    _import_from(Path(args.suite).parent if args.suite.endswith((".yaml", ".yml")) else REPOSITORY)
    if args.toy:
        sys.exit(1 if _run_toy(suite, dict.fromkeys(key[:2] for key in wanted), args.workers) else 0)
    missing = [key for key in wanted if not _is_finished(suite.file(*key), retry=args.retry_failed)]
    print(f"suite {suite.name}: {len(wanted)} cells, {len(wanted) - len(missing)} finished, {len(missing)} to run")
    if args.dry_run:
        print("\n".join("  " + "/".join(map(str, key)) for key in missing))
        return
    cells = {_key(cell): cell for cell in _cells(suite, wanted, _prepared(suite, models))}
    _check_finished(suite, [cells[key] for key in wanted if key not in missing])
    threads = args.threads or suite.settings.get("threads", 1)
    places = [None] * args.workers if args.gpus is None else list(args.gpus)
    sys.exit(1 if _run(suite, [cells[key] for key in missing], threads, places) else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, help="a name in benchmarks/suites, or a YAML's path")
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--algorithms", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time (default: %(default)s)")
    parser.add_argument("--gpus", nargs="+", type=int, help="numbers of the GPUs to run on, a cell at a time on each")
    parser.add_argument("--threads", type=int, help="of each cell (default: the suite's)")
    parser.add_argument("--results", type=Path, help="where records are written (default: beside the suites)")
    parser.add_argument("--retry_failed", action="store_true", help="run again what ended in an error")
    parser.add_argument("--toy", action="store_true", help="each cell at toy size, two steps: can it run?")
    parser.add_argument("--dry_run", action="store_true", help="only tell what is missing")
    args = parser.parse_args()
    if args.results is not None:
        args.results = args.results.resolve()
    if args.suite.endswith((".yaml", ".yml")):
        args.suite = str(Path(args.suite).resolve())
    if args.workers < 1:
        parser.error(f"--workers={args.workers}: wanted 1 or more.")
    return args


def _is_finished(file: Path, *, retry: bool) -> bool:
    if not file.is_file():
        return False
    return not (retry and json.loads(file.read_text())["error"] is not None)


def _check_finished(suite: Suite, cells: list[Cell]) -> None:
    # a table of runs with different settings would compare nothing
    others = {}
    for cell in cells:
        record = json.loads(suite.file(*_key(cell)).read_text())
        if difference := first_difference(record["config"], cell.config) or first_difference(
            record["tasks"], cell.tasks, "tasks"
        ):
            others[cell.name] = difference
    if others:
        name, difference = next(iter(others.items()))
        sys.exit(
            f"error: {len(others)} records in {suite.results} are of other settings than the suite's, the first "
            f"{name}: {difference}. Remove them, or give the suite another name."
        )


def _import_from(folder: Path) -> None:
    # a router of the reader's own stands beside his suite; the environment is what reaches the server of the cells
    folders = [str(Path(__file__).resolve().parent), str(folder), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    sys.path.append(str(folder))


def _run_toy(suite: Suite, wanted: Iterable[tuple[str, str]], workers: int) -> int:
    from toy import toy_cell

    # nothing of it is kept
    folder = WORK / f"{suite.name}-toy"
    shutil.rmtree(folder, ignore_errors=True)
    cells = [toy_cell(suite, model, algorithm, folder / "models") for model, algorithm in wanted]
    return _run(replace(suite, results=folder / "results"), cells, 1, [None] * workers)


def _prepared(suite: Suite, models: list[str]) -> dict[str, str]:
    """Makes what the cells need, and names the weights of each model."""
    from materials import prepare, pretrained

    prepare(suite.settings.get("prepare", []))
    return {
        name: _relative(pretrained(name, found["pretrain"])) if "pretrain" in found else str(found["weights"])
        for name, found in suite.models.items()
        if name in models
    }


def _relative(path: Path) -> str:
    # records tell nothing of the machine
    return str(path.relative_to(REPOSITORY))


def _cells(suite: Suite, keys: list[Key], weights: dict[str, str]) -> list[Cell]:
    from planned import same_flops

    cells = []
    for model, algorithm, seed in keys:
        steps = suite.steps(model)
        if (other := suite.algorithms[algorithm].get("same_flops_as")) is not None:
            configs = [suite.config(model, name, seed, weights[model], steps) for name in (other, algorithm)]
            steps = round(steps * same_flops(*configs))
        config = suite.config(model, algorithm, seed, weights[model], steps)
        cells.append(Cell(suite.name, model, algorithm, seed, config, suite.tasks(model, algorithm)))
    return cells


def _run(suite: Suite, cells: list[Cell], threads: int, places: list[int | None]) -> int:
    """Runs the cells, one at a time in each place, and counts those that failed."""
    from cell import work

    # each cell is forked from a process that has imported everything and computed nothing
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cell"])
    waiting, failures = list(cells), 0
    running: dict[Any, tuple[Any, Cell, int | None]] = {}
    every = suite.settings.get("checkpoint_every_n_steps")
    while waiting or running:
        while waiting and places:
            cell, place = waiting.pop(0), places.pop(0)
            folder = WORK / suite.name / cell.name
            process = context.Process(target=work, args=(cell, suite.file(*_key(cell)), folder, threads, every, place))
            process.start()
            running[process.sentinel] = process, cell, place
        for sentinel in wait(list(running)):
            process, cell, place = running.pop(sentinel)
            process.join()
            places.append(place)
            failures += process.exitcode != 0
            left = len(waiting) + len(running)
            print(f"{cell.name}: {_outcome(suite.file(*_key(cell)), process.exitcode)}; {left} left", flush=True)
    return failures


def _key(cell: Cell) -> Key:
    return cell.model, cell.algorithm, cell.seed


def _outcome(file: Path, code: int | None) -> str:
    if not file.is_file():
        # nothing was recorded: it runs again next time
        return f"killed ({code})"
    record: dict[str, Any] = json.loads(file.read_text())
    if record["error"] is not None:
        return f"failed: {record['error']}"
    return f"validation loss {record['losses']['validation'][-1]['mean']:.4f}, {record['seconds']['wall']:.0f} s"


if __name__ == "__main__":
    main()
