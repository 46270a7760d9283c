"""The verb ``lightning-moe upcycle``: a dense Hugging Face model in, the directory of an upcycled one out."""

import inspect
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig

from lightning_moe.analysis.texts import read_texts
from lightning_moe.calibration import looks_at_states
from lightning_moe.checks import check_free
from lightning_moe.cli_verb import VerbParser, run_verb, verb_parser
from lightning_moe.config import UpcycleConfig
from lightning_moe.corpus import find_files
from lightning_moe.initializers import INITIALIZERS, ROUTER_INITIALIZERS
from lightning_moe.module import load_model
from lightning_moe.receipt import Receipt
from lightning_moe.routers import ROUTERS
from lightning_moe.saving import CONFIG_FILE, save_moe
from lightning_moe.upcycle import upcycle

_CLASSES: tuple[type, ...] = (UpcycleConfig, *ROUTERS, *INITIALIZERS, *ROUTER_INITIALIZERS)

_CALIBRATION_TOKENS = 1024
# the outputs before and after are compared on these: their logits are all in memory
_MEASURED_TOKENS = 128


def upcycle_checkpoint(
    *,
    model: str,
    config: UpcycleConfig,
    output: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    auto_class: str = "AutoModelForCausalLM",
    calibration_files: Sequence[str] | None = None,
    dry_run: bool = False,
) -> Receipt:
    """Upcycles a dense Hugging Face model and writes it to a directory, without a Trainer.

    What `save_moe` writes stands there, with the receipt in ``moe_config.json``, and beside it the tokenizer and the
    generation configuration. Tensors never take more than the result and one dense FFN. The resident set may be larger:
    by the pages of the weights' file where it is mapped (dtype "auto"), which the kernel takes back when it needs them,
    and by holes that the C library keeps where FFNs of a few megabytes were (MALLOC_MMAP_THRESHOLD_=65536 ends that).

    Args:
        model: name on the Hub or path of a dense Hugging Face model.
        config: what to make of it; a seed of None is 0.
        output: the directory to write, which must be empty or not exist.
        dtype: of the weights, "auto" as they were saved.
        auto_class: transformers' class that loads a model by name.
        calibration_files: paths or globs of text files, or JSONL and Parquet with a column "text". The first 1024
            tokens of each are a calibration batch, for initialisers that look at hidden states (one for each domain);
            step 0 is measured on the first 128 tokens of the first.
        dry_run: whether only to tell what would become of the model: no weights are loaded, nothing is written.

    Returns:
        What was done, or would be.

    Raises:
        FileNotFoundError: if the model or a calibration file does not exist.
        FileExistsError: if the directory to write holds something.
        ValueError: if the model is upcycled already, if a calibration file holds no text or all too little, if an
            initialiser looks at hidden states and there is no file, and for what `upcycle` refuses.
    """
    _check_paths(model, output, dry_run)
    files = find_files("calibration_files", list(calibration_files or ()) or None).get("calibration_files", [])
    _check_wanted(config, files)
    ids = _read(model, files) if files else []
    _check_enough(config, files, ids)
    dense: Any = load_model(model, auto_class, dtype, empty=dry_run)
    batches = [] if dry_run else _batches(dense, ids)
    receipt = upcycle(
        dense,
        replace(config, seed=0 if config.seed is None else config.seed),
        batch={"input_ids": batches[0]["input_ids"][:, :_MEASURED_TOKENS]} if batches else None,
        calibration=batches or None,
        progress=partial(tqdm, desc="Upcycling", unit="layer", disable=None),
    )
    if not dry_run:
        assert output is not None
        save_moe(dense, Path(output).expanduser(), family=config.family, receipt=receipt)
        _save_companions(model, dense, Path(output).expanduser())
    return receipt


class _Parser(VerbParser):
    verb = "upcycle"
    known = _CLASSES


def main(args: Sequence[str]) -> None:
    """Runs ``lightning-moe upcycle`` and prints the receipt."""
    parser = verb_parser(_Parser, upcycle_checkpoint, {"calibration_files"})
    parser.add_argument(
        "--calibration_files", nargs="+", type=str, help="Text, JSONL or Parquet files, one for each batch."
    )
    receipt, options = run_verb(parser, args, upcycle_checkpoint)
    print(receipt)
    if options.dry_run:
        print("A dry run: no weights were loaded and nothing was written.")
    else:
        print(f"Written to {options.output}. Train it with `model: {options.output}`, or load_moe(...) it.")


def _check_paths(model: str, output: str | None, dry_run: bool) -> None:
    # before anything takes time
    if (Path(model).expanduser() / CONFIG_FILE).is_file():
        raise ValueError(f"model={model!r} is upcycled already: it holds {CONFIG_FILE}. Give the dense model.")
    if output is None and not dry_run:
        raise ValueError("output: wanted a directory to write to, as --output my-moe; or --dry_run true.")
    if output is not None:
        check_free("output", output)


def _check_wanted(config: UpcycleConfig, files: Sequence[Path]) -> None:
    for key in ("init", "router_init"):
        part = getattr(config, key)
        if looks_at_states(part) and not files:
            raise ValueError(
                f"config.{key}: {type(part).__name__} looks at hidden states of the model. Give text files, as "
                "--calibration_files prose.txt code.txt; each is a calibration batch."
            )


def _read(name: str, files: Sequence[Path]) -> list[Tensor]:
    source = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
    try:
        config: Any = AutoConfig.from_pretrained(source)
    except (OSError, ValueError):
        # is no model: load_model has the words for it
        return []
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(
            f"calibration_files: model={name!r} has no tokenizer to read them with ({first_line}). Save one beside the "
            "model, with tokenizer.save_pretrained(...), or leave calibration_files out."
        ) from error
    limit = min(_CALIBRATION_TOKENS, getattr(config.get_text_config(), "max_position_embeddings", _CALIBRATION_TOKENS))
    batches = []
    for file in files:
        text = _text(file, 32 * limit)  # no token is longer on average
        ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"][:, :limit]
        if not text.strip() or ids.numel() == 0:
            raise ValueError(f"calibration_files: {str(file)!r} holds no text. Give text files, or leave it out.")
        batches.append(ids.to(torch.int64))
    return batches


def _text(file: Path, num_characters: int) -> str:
    if file.suffix in (".jsonl", ".json", ".parquet"):
        documents = read_texts("calibration_files", [file], "text")
        parts: list[str] = []
        while sum(map(len, parts)) < num_characters and (document := next(documents, None)) is not None:
            parts.append(document)
        return "\n\n".join(parts)[:num_characters]
    try:
        with file.open(encoding="utf-8") as lines:
            return lines.read(num_characters)
    except UnicodeDecodeError as error:
        raise ValueError(f"calibration_files: {str(file)!r} is no UTF-8 text ({error}). Give text files.") from error


def _check_enough(config: UpcycleConfig, files: Sequence[Path], batches: Sequence[Tensor]) -> None:
    # before the weights are loaded, which takes minutes for a large model
    if config.init is not None and config.init.needs_saliency:
        for file, ids in zip(files, batches, strict=False):
            if ids.shape[1] < 2:
                raise ValueError(
                    f"calibration_files: {str(file)!r} holds 1 token, and {type(config.init).__name__} looks at the "
                    "loss of the next one; give more text."
                )
    if batches and config.router_init is not None and config.router_init.needs_inputs:
        # a rehearsal with as many random states as there are tokens: what is too few, the initialiser itself says
        generator = torch.Generator().manual_seed(0)
        width = max(config.num_experts, 8)
        states = [torch.randn(ids.shape[1], width, generator=generator) for ids in batches]
        try:
            config.router_init.rows(config.num_experts, width, generator, states)
        except ValueError as error:
            raise ValueError(f"calibration_files: {error}") from error


def _batches(model: nn.Module, ids: Sequence[Tensor]) -> list[dict[str, Any]]:
    # of a long text no logits: with a large vocabulary they would take more memory than a layer
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return [{"input_ids": one, **extra} for one in ids]


def _save_companions(name: str, model: nn.Module, directory: Path) -> None:
    source = str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
    try:
        AutoProcessor.from_pretrained(source).save_pretrained(directory)
    except (ImportError, OSError, ValueError) as error:
        print(f"note: {name} has no tokenizer that could be copied ({str(error).splitlines()[0]}).", file=sys.stderr)
    generation = getattr(model, "generation_config", None)
    if isinstance(generation, GenerationConfig):
        generation.save_pretrained(directory)
