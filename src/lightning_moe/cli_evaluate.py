"""The verb ``lightning-moe evaluate``: a checkpoint and the names of lm-eval tasks in, a table of scores out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning_moe.cli_verb import VerbParser, run_verb, verb_parser
from lightning_moe.corpus import load_tokenizer
from lightning_moe.module import load_model


def evaluate_checkpoint(
    *,
    model: str,
    tasks: Sequence[str],
    output: str | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    tokenizer: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
) -> dict[str, dict[str, float]]:
    """Evaluates a model zero-shot on tasks of lm-eval, dense or a Mixture of Experts. Needs the extra eval.

    Args:
        model: name on the Hub or path of a Hugging Face model, or path of what save_moe or `lightning-moe upcycle`
            wrote.
        tasks: names of tasks, groups or tags of lm-eval, or of tasks in include_path.
        output: a JSON file to write, which must not exist.
        include_path: directory of YAML files with tasks of one's own.
        limit: documents of each task, the first ones; None takes all.
        tokenizer: name or directory of the tokenizer; None takes the model's.
        batch_size: texts per forward.
        max_length: tokens of the longest text, longer ones lose their beginning; None takes what the model knows.
        dtype: of the weights of a Hugging Face model, "auto" as they were saved.
        device: what to run on, such as cuda.

    Returns:
        Task to metric to value; a standard error has _stderr behind its metric.

    Raises:
        ModuleNotFoundError: if lm-eval is not installed.
        FileNotFoundError: if the model or the directory of tasks does not exist.
        FileExistsError: if the file to write exists.
        ValueError: if there is no such task or tokenizer, or if a number is not 1 or more.
    """
    from lightning_moe.evaluation import evaluate_model, load_tasks, scores
    from lightning_moe.live_model import LiveHFLM, find_language_model

    file = None if output is None else Path(output).expanduser()
    if file is not None and file.exists():
        raise FileExistsError(f"output={output!r} exists. Remove it, or give another name with --output.")
    # what is quickly told goes first
    loaded = load_tasks(tasks, include_path)
    words = load_tokenizer(model if tokenizer is None else tokenizer)
    _, found = find_language_model(load_model(model, "AutoModelForCausalLM", dtype).to(device))
    lm = LiveHFLM(found, words, batch_size=batch_size, max_length=max_length)
    values = scores(evaluate_model(lm, loaded, limit))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"model": model, "limit": limit, "scores": values}, indent=2) + "\n")
    return values


class _Parser(VerbParser):
    verb = "evaluate"


def main(args: Sequence[str]) -> None:
    """Runs ``lightning-moe evaluate`` and prints the table."""
    parser = verb_parser(_Parser, evaluate_checkpoint, {"tasks"})
    several: dict[str, Any] = {"nargs": "+", "type": str, "action": "extend", "required": True}
    parser.add_argument("--tasks", help="Names of tasks, groups or tags.", **several)
    found, options = run_verb(parser, args, evaluate_checkpoint)
    # imported here, as what it needs is an extra
    from lightning_moe.evaluation import score_table

    print(score_table(found))
    if options.output is not None:
        print(f"Written to {options.output}.")
