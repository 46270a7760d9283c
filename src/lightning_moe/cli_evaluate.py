"""The verb ``lightning-moe evaluate``: checkpoints and the names of lm-eval tasks in, a table of scores out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lightning_moe.checks import check_whole
from lightning_moe.cli_verb import VerbParser, run_verb, verb_parser
from lightning_moe.corpus import load_tokenizer
from lightning_moe.module import check_model_path, load_model


def evaluate_checkpoint(
    *,
    model: str,
    tasks: Sequence[str],
    compare: Sequence[str] | None = None,
    output: str | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    tokenizer: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "cpu",
) -> str:
    """Evaluates a model zero-shot on tasks of lm-eval, dense or a Mixture of Experts. Needs the extra eval.

    With other models to compare it with, all are evaluated, one after the other, and the table has their differences
    from the first on the same documents, with 95 % intervals, and p values corrected for the number of comparisons.

    Args:
        model: name on the Hub or path of a Hugging Face model, or path of what save_moe or `lightning-moe upcycle`
            wrote.
        tasks: names of tasks, groups or tags of lm-eval, or of tasks in include_path.
        compare: names or paths of models to hold against the first.
        output: a JSON file to write, which must not exist; of a comparison it has the numbers of each document too.
        include_path: directory of YAML files with tasks of one's own.
        limit: documents of each task, the first ones; None takes all.
        tokenizer: name or directory of the tokenizer of all models; None takes each model's own.
        batch_size: texts per forward.
        max_length: tokens of the longest text, longer ones lose their beginning; None takes what the model knows.
        dtype: of the weights, "auto" as they were saved.
        device: what to run on, such as cuda.

    Returns:
        The table.

    Raises:
        ModuleNotFoundError: if lm-eval is not installed.
        FileNotFoundError: if a model or the directory of tasks does not exist.
        FileExistsError: if the file to write exists.
        ValueError: if there is no such task or tokenizer, if a model is given twice, or if a number is not 1 or more.
    """
    from lightning_moe.evaluation import as_json, evaluate_model, load_tasks, score_table, scores
    from lightning_moe.live_model import LiveHFLM, find_language_model
    from lightning_moe.side_by_side import compare_results, comparison_table, document_values

    def evaluate(name: str, words: PreTrainedTokenizerBase) -> dict[str, Any]:
        # the model lives only here: the next one has its memory
        _, found = find_language_model(load_model(name, "AutoModelForCausalLM", dtype).to(device))
        lm = LiveHFLM(found, words, batch_size=batch_size, max_length=max_length)
        return evaluate_model(lm, loaded, limit, log_samples=bool(compare))

    # what is quickly told goes first
    check_whole(batch_size=batch_size, **({} if limit is None else {"limit": limit}))
    models, file = [model, *(compare or ())], None if output is None else Path(output).expanduser()
    if file is not None and file.exists():
        raise FileExistsError(f"output={output!r} exists. Remove it, or give another name with --output.")
    _check_models(models, dtype)
    loaded = load_tasks(tasks, include_path)
    tokenizers = {name: load_tokenizer(name if tokenizer is None else tokenizer) for name in models}
    results = {name: evaluate(name, tokenizers[name]) for name in models}
    values = {name: scores(one) for name, one in results.items()}
    written: dict[str, Any] = {"model": model, "limit": limit, "scores": values[model]}
    table = score_table(values[model])
    if compare:
        comparisons = compare_results(results, loaded)
        table = comparison_table(values, comparisons)
        written |= {"compared": {name: values[name] for name in compare}}
        written |= {"comparisons": [one.as_dict() for one in comparisons], "documents": document_values(results)}
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(as_json(written), indent=2) + "\n")
    return table


class _Parser(VerbParser):
    verb = "evaluate"


def main(args: Sequence[str]) -> None:
    """Runs ``lightning-moe evaluate`` and prints the table."""
    parser = verb_parser(_Parser, evaluate_checkpoint, {"tasks", "compare"})
    several: dict[str, Any] = {"nargs": "+", "type": str, "action": "extend"}
    parser.add_argument("--tasks", help="Names of tasks, groups or tags.", required=True, **several)
    parser.add_argument("--compare", help="Names or paths of models to hold against the first.", **several)
    table, options = run_verb(parser, args, evaluate_checkpoint)
    print(table)
    if options.output is not None:
        print(f"Written to {options.output}.")


def _check_models(models: Sequence[str], dtype: str) -> None:
    # all of them, before the first is evaluated
    known: dict[str, str] = {}
    for place, name in enumerate(models):
        check_model_path(name, "compare" if place else "model")
        path = Path(name).expanduser()
        identity = str(path.resolve()) if path.exists() else name
        if identity in known:
            raise ValueError(f"compare={name!r} is the same model as {known[identity]!r}. Give each model once.")
        known[identity] = name
    if len(models) > 1:
        for name in models:
            if not Path(name).expanduser().exists():
                # of a name on the Hub its configuration tells
                load_model(name, "AutoModelForCausalLM", dtype, empty=True)
