"""The verb ``lightning-moe consolidate``: a checkpoint of any strategy in, one directory or file out."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_moe.checks import check_free
from lightning_moe.cli_verb import VerbParser, run_verb, verb_parser
from lightning_moe.consolidation import Consolidated, consolidate
from lightning_moe.corpus import load_tokenizer
from lightning_moe.module import check_model_path, load_model


def consolidate_checkpoint(
    *,
    checkpoint: str,
    output: str,
    model: str | None = None,
    tokenizer: str | None = None,
    auto_class: str = "AutoModelForCausalLM",
) -> Consolidated:
    """Makes one of a Lightning checkpoint, sharded or not: FSDP, FSDP2, DeepSpeed ZeRO, or one file.

    The name of the output says what is written. A directory is what save_moe writes, for load_moe and for
    `lightning-moe export` and `evaluate`; *.safetensors is one file of weights with a JSON beside it; *.ckpt is one
    file that a Trainer goes on from with any strategy.

    Args:
        checkpoint: the .ckpt file, or the directory of shards.
        output: the directory or file to write, which must not exist.
        model: name on the Hub or path of the dense model that was upcycled; needed only for a checkpoint that does not
            describe it. Its weights are not read.
        tokenizer: name or directory of a tokenizer to copy into the directory; None takes that of the model, if given.
        auto_class: transformers' class that loads the model by name.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: if there is no such checkpoint or model.
        FileExistsError: if the output exists.
        ModuleNotFoundError: if the checkpoint is DeepSpeed's, which is not installed.
        ValueError: if this is no checkpoint of an upcycled model, or of another one than was given.
    """
    check_free("output", output)
    if model is not None:
        check_model_path(model)
    words = None if tokenizer is None else load_tokenizer(tokenizer)
    if words is None and model is not None:
        with suppress(ValueError):
            words = load_tokenizer(model)
    dense: Any = None if model is None else load_model(model, auto_class, "auto", empty=True)
    written = consolidate(checkpoint, output, model=dense)
    directory = Path(output).expanduser()
    if words is not None and directory.is_dir():
        words.save_pretrained(directory)
    elif directory.is_dir() and written.model is not None:
        print("note: no tokenizer was copied. Give one with --tokenizer, as a name or directory.", file=sys.stderr)
    return written


class _Parser(VerbParser):
    verb = "consolidate"


def main(args: Sequence[str]) -> None:
    """Runs ``lightning-moe consolidate`` and says what was written."""
    parser = verb_parser(_Parser, consolidate_checkpoint, set())
    written, _ = run_verb(parser, args, consolidate_checkpoint)
    print(written)
    print(_next_step(written))


def _next_step(written: Consolidated) -> str:
    if written.path.endswith(".ckpt"):
        return f"Go on with it: trainer.fit(..., ckpt_path={written.path!r})."
    if written.path.endswith(".safetensors"):
        return "The recipe of its MoE layers is in the JSON beside it."
    if written.model is None:
        return f"Load it with load_moe({written.path!r}, model=<the dense module>)."
    return f"Load it with load_moe({written.path!r}), or export it: lightning-moe export --model {written.path}."
