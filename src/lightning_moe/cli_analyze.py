"""The verb ``lightning-moe analyze``: checkpoints and texts in, a page on how they route out."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from lightning_moe.analysis import Analysis, analyze, write_report
from lightning_moe.analysis.texts import Batch, read_texts
from lightning_moe.analysis.verdict import summary
from lightning_moe.checks import check_free
from lightning_moe.cli_verb import VerbParser, run_verb, verb_parser
from lightning_moe.corpus import find_files, load_tokenizer
from lightning_moe.module import load_model


def analyze_checkpoints(
    *,
    model: Sequence[str],
    data: Sequence[str],
    output: str = "moe-analysis",
    tokenizer: str | None = None,
    text_column: str = "text",
    num_tokens: int = 8192,
    sequence_length: int = 512,
    batch_size: int = 4,
    separator: str | None = None,
    min_count: int = 8,
    studies: bool = True,
    temperatures: Sequence[int | float] = (0.5, 2.0),
    device: str = "cpu",
    seed: int = 0,
) -> Analysis:
    """Runs a Mixture-of-Experts model over texts of several domains and writes a page on how it routes.

    The directory then holds report.html, which needs no other file, its pictures, and all numbers as JSON and CSV.

    Args:
        model: directories of what save_moe or `lightning-moe upcycle` wrote, or of Hugging Face models that are MoE
            already. Several are checkpoints of one run, oldest first: the last is analysed, the others are compared
            with it.
        data: domains as name=file, such as prose=book.txt code=code.jsonl. A file may be a glob; JSONL and Parquet hold
            one document a row, any other file is one document.
        output: the directory to write, which must be empty or not exist.
        tokenizer: name or directory of the tokenizer; None takes that of the last model.
        text_column: column of JSONL and Parquet that holds the text.
        num_tokens: tokens of each domain to look at, at most.
        sequence_length: tokens per sequence.
        batch_size: sequences per batch.
        separator: token between two documents; None takes the tokenizer's.
        min_count: tokens of an id below which its specialisation does not count.
        studies: whether to measure the loss with other routes too, a pass over the texts for each.
        temperatures: factors of the router's logits to measure the loss at.
        device: what to run on, such as cuda.
        seed: of the random experts, and of what chance is compared with.

    Returns:
        The numbers.

    Raises:
        FileNotFoundError: if a model does not exist.
        FileExistsError: if the directory to write holds something.
        ValueError: if a domain has no name, no file or no text, or is given twice, and for what `analyze` refuses.
    """
    files = _domain_files(data)
    # before anything takes time
    check_free("output", output, "give another name with --output")
    if not model:
        raise ValueError("model: wanted at least one directory, as --model my-moe.")
    last, names = _load(model[-1]).to(device), _names(model)
    words = load_tokenizer(model[-1] if tokenizer is None else tokenizer)
    earlier: Iterator[tuple[str, nn.Module]] = (
        (name, _load(path).to(device)) for name, path in zip(names[:-1], model[:-1], strict=True)
    )
    found = analyze(
        last,
        words,
        data={domain: read_texts(f"data {domain}", paths, text_column) for domain, paths in files.items()},
        earlier=earlier,
        name=names[-1],
        num_tokens=num_tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        separator=separator,
        min_count=min_count,
        studies=studies,
        temperatures=temperatures,
        seed=seed,
        progress=_progress,
    )
    write_report(found, Path(output).expanduser())
    return found


class _Parser(VerbParser):
    verb = "analyze"


def main(args: Sequence[str]) -> None:
    """Runs ``lightning-moe analyze`` and says where the page is."""
    parser = verb_parser(_Parser, analyze_checkpoints, {"model", "data", "temperatures"})
    several: dict[str, Any] = {"nargs": "+", "type": str, "action": "extend", "required": True}
    parser.add_argument("--model", help="Directories of checkpoints, oldest first.", **several)
    parser.add_argument("--data", help="Domains, as name=file.", **several)
    factors = "Factors of the router's logits to measure the loss at."
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.5, 2.0], help=factors)
    found, options = run_verb(parser, args, analyze_checkpoints)
    print(summary(found))
    print(f"Written to {options.output}: open {Path(options.output, 'report.html')}.")


def _load(path: str) -> nn.Module:
    # the one place that knows which kinds of model there are
    return load_model(path, "AutoModelForCausalLM", "auto")


def _names(paths: Sequence[str]) -> list[str]:
    # the last part of a path, where that tells them apart
    short = [Path(path).expanduser().resolve().name for path in paths]
    return short if len(set(short)) == len(short) else list(paths)


def _domain_files(data: Sequence[str]) -> dict[str, list[Path]]:
    if not data:
        raise ValueError("data: wanted at least one domain, as --data prose=book.txt.")
    patterns: dict[str, str] = {}
    for given in data:
        name, separator, pattern = given.partition("=")
        if not (name and separator and pattern):
            raise ValueError(
                f"data: {given!r} is no name=file. Name the domain, as in --data prose={pattern or given}."
            )
        if name in patterns:
            raise ValueError(
                f"data: the domain {name!r} is given twice, with {patterns[name]!r} and {pattern!r}. Give each a name "
                "of its own, or one glob for both."
            )
        patterns[name] = pattern
    files = {name: find_files(f"data {name}", pattern)[f"data {name}"] for name, pattern in patterns.items()}
    for name, found in files.items():
        if not any(file.stat().st_size for file in found):
            raise ValueError(f"data {name}: {patterns[name]!r} is empty. Give a file with text.")
    return files


def _progress(batches: Sequence[Batch], what: str) -> Iterable[Batch]:
    bar: Iterable[Batch] = tqdm(batches, desc=what, unit="batch", disable=None)
    return bar
