"""Runs one cell of a suite: trains, evaluates, and records all there is to say of it."""

import json
import math
import multiprocessing
import os
import resource
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from common import environment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from planned import instantiate, operations_per_token
from recorder import ROUTING, VALIDATION, Record, Recorder, RecordLogger, expert_similarity, rounded
from suites import Cell

from lightning_moe import MoEUpcycleCallback
from lightning_moe.evaluation import LiveHFLM, evaluate_model, find_language_model, load_tasks, scores
from lightning_moe.layer import moe_layers
from lightning_moe.metrics import (
    load_entropy,
    max_violation,
    num_dead_experts,
)


def run_cell(cell: Cell, work: Path, threads: int, every: int | None = None) -> Record:
    """Runs a cell, from the checkpoint of a run that was killed if there is one.

    Args:
        cell: what to run.
        work: a folder for checkpoints.
        threads: of torch, in each operation.
        every: steps between two checkpoints; None writes none.

    Returns:
        What `tabulate.py` reads.
    """
    since = time.perf_counter()
    torch.set_num_threads(threads)
    last, rows = work / "last.ckpt", work / "rows.jsonl"
    goes_on = every is not None and last.is_file()
    work.mkdir(parents=True, exist_ok=True)
    if not goes_on:
        rows.unlink(missing_ok=True)
    logger = RecordLogger(rows)
    recorder = Recorder(logger)
    # asked before the model is built, so that a wrong name costs nothing
    loaded = load_tasks(cell.tasks["names"], cell.tasks.get("include_path")) if cell.tasks.get("names") else None
    cli = instantiate(cell.config)
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    trainer.loggers = [*trainer.loggers, logger]
    trainer.callbacks.append(recorder)
    if every is not None:
        trainer.callbacks.append(
            ModelCheckpoint(work, filename="last", every_n_train_steps=every, enable_version_counter=False)
        )
    trainer.validate(module, data, verbose=False)
    start = _evaluate(module, data, loaded, cell.tasks)[0] if loaded and cell.tasks.get("at_start") else None
    trainer.fit(module, data, ckpt_path=str(last) if goes_on else None, weights_only=False if goes_on else None)
    if recorder.validated < trainer.global_step:
        trainer.validate(module, data, verbose=False)
    end, documents, tasks = _evaluate(module, data, loaded, cell.tasks) if loaded else ({}, {}, {})
    steps = trainer.global_step
    tokens = steps * trainer.accumulate_grad_batches * data.batch_size * data.block_size
    # of the experts, those that compute for a token in validation
    active = [float(metric.compute()) for metric in recorder.active.values()]
    flops = operations_per_token(module, active, data.block_size)
    return {
        **_named(cell),
        **environment(threads),
        "config": cell.config,
        "tasks": cell.tasks,
        "error": None,
        **_sizes(trainer, module),
        "flops_per_token": round(flops),
        "training_flops": round(flops * tokens),
        "steps": steps,
        "tokens": tokens,
        "losses": {
            "train": [[row["step"], row[""]] for row in logger.series("train_loss") if "" in row],
            "validation": _validation(logger),
        },
        "routing": logger.series(ROUTING),
        **_load(recorder),
        "expert_similarity_start": _number(recorder.similarity[0]),
        "expert_similarity": _number(expert_similarity(moe_layers(module))),
        "scores": {"start": start, "end": end},
        "documents": documents,
        **tasks,
        "seconds": {k: round(v, 2) for k, v in recorder.seconds.items()}
        | {"wall": round(time.perf_counter() - since, 2), "cpu": round(time.process_time(), 2)},
        "tokens_per_second": round(tokens / max(recorder.seconds["training_wall"], 1e-9), 1),
        "tokens_per_cpu_second": round(tokens / max(recorder.seconds["training_cpu"], 1e-9), 1),
        "peak_memory_bytes": _peak_memory(),
    }


def failed(cell: Cell, error: str, threads: int) -> Record:
    """The record of a cell that ended in an error."""
    return {**_named(cell), **environment(threads), "config": cell.config, "tasks": cell.tasks, "error": error}


def _evaluate(module: LightningModule, data: Any, loaded: Any, tasks: Record) -> tuple[Record, Record, Record]:
    _, model = find_language_model(module)
    # a model keeps the mode it is in, and Lightning left it in that of training
    lm = LiveHFLM(model, data.tokenizer, batch_size=tasks.get("batch_size", 8), max_length=tasks.get("max_length"))
    results = evaluate_model(lm, loaded, tasks.get("limit"), log_samples=True)
    metric: dict[str, str] = {}
    chance: dict[str, float] = {}
    documents: dict[str, list[float]] = {}
    found = {task: {k: rounded(v) for k, v in values.items()} for task, values in scores(results).items()}
    for task, samples in results["samples"].items():
        known = [name for name in ("acc_norm", "acc", "exact_match", "f1") if name in found[task]]
        metric[task] = tasks.get("main_metrics", {}).get(task, known[0] if known else next(iter(found[task])))
        answers = [sample[metric[task]] for sample in samples if metric[task] in sample]
        documents[task] = [rounded(answer) for answer in answers if isinstance(answer, (int, float))]
        # a task without choices is not guessed
        several = loaded["tasks"][task].OUTPUT_TYPE == "multiple_choice"
        guesses = [1 / len(sample["filtered_resps"]) if several else 0.0 for sample in samples]
        chance[task] = rounded(sum(guesses) / max(len(guesses), 1))
    return found, documents, {"main_metric": metric, "chance": chance}


def _named(cell: Cell) -> Record:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"suite": cell.suite, "model": cell.model, "algorithm": cell.algorithm, "seed": cell.seed, "date": now}


def _sizes(trainer: Trainer, module: LightningModule) -> Record:
    total = sum(parameter.numel() for parameter in module.parameters())
    receipts = [c.receipt for c in trainer.callbacks if isinstance(c, MoEUpcycleCallback)]  # type: ignore[attr-defined]
    active = next((receipt.active_parameters[1] for receipt in receipts if receipt is not None), total)
    return {"parameters": total, "active_parameters": active}


def _validation(logger: RecordLogger) -> list[Record]:
    # the mean over the domains, and each domain where there are several
    rows = [{key.removeprefix("/") or "mean": value for key, value in row.items()} for row in logger.series(VALIDATION)]
    return [row for row in rows if "mean" in row]


def _load(recorder: Recorder) -> Record:
    counts = [metric.compute() for metric in recorder.load.values()]
    if not counts:
        return {"expert_load": None, "final_routing": None}
    load = torch.stack(counts)
    return {
        "expert_load": [
            [rounded(share) for share in row.tolist()] for row in load / load.sum(1, keepdim=True).clamp(min=1)
        ],
        "final_routing": {
            "max_violation": rounded(max_violation(load).mean()),
            "max_violation_worst": rounded(max_violation(load).max()),
            "load_entropy": rounded(load_entropy(load).mean()),
            "dead_experts": int(num_dead_experts(load).sum()),
            "active_experts": rounded(torch.stack([m.compute() for m in recorder.active.values()]).mean()),
        },
    }


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _number(value: float) -> float | None:
    return None if math.isnan(value) else rounded(value)


def work(cell: Cell, file: Path, folder: Path, threads: int, every: int | None, gpu: int | None = None) -> None:
    """Runs a cell in a process of its own, and writes its record, of a failure too.

    Args:
        cell: what to run.
        file: where the record is written.
        folder: for the log of the run, and for its checkpoints while it runs.
        threads: of torch.
        every: steps between two checkpoints; None writes none.
        gpu: the one that it runs on; None leaves it to the configuration.
    """
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    threading.Thread(target=_end_with_run, daemon=True).start()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            record = run_cell(cell, folder, threads, every)
        except SIGTERMException:
            # killed: no failure of the cell, which runs again next time
            os._exit(1)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            record = failed(cell, _said(error, folder / "log.txt"), threads)
        write(record, file)
    (folder / "last.ckpt").unlink(missing_ok=True)
    # without the destructors of threads that a library left
    os._exit(0 if record["error"] is None else 1)


def _end_with_run() -> None:
    # who kills the run means its cells too: one that went on would write what the next run writes
    if (run := multiprocessing.parent_process()) is not None:
        run.join()
        os._exit(1)


def _said(error: BaseException, log: Path) -> str:
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            return error.code.removeprefix("error: ")
        # a configuration that is no configuration is told on the console
        told = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        return told[-1].removeprefix("error: ") if told else "the configuration was refused"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def write(record: Record, file: Path) -> None:
    """Writes a record whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
    new.replace(file)
