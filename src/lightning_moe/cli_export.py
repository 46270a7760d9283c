"""The verb ``lightning-moe export``: an upcycled model in, one that transformers loads out."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer

from lightning_moe.auto_model import MODEL_TYPE, is_own_format
from lightning_moe.cli_verb import VerbParser, run_verb, verb_parser
from lightning_moe.export import Exported, export_to_hf
from lightning_moe.ffn import FFNFamily
from lightning_moe.module import load_model
from lightning_moe.saving import CONFIG_FILE


def export_checkpoint(
    *,
    model: str,
    output: str,
    target: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    dense_as_experts: bool = False,
) -> Exported:
    """Writes an upcycled model as a native Mixture-of-Experts model of Hugging Face.

    Before anything is written its logits are compared with those of the model as it is. The tokenizer is copied. With
    the target lightning_moe the model is written as it is, for transformers with this package installed.

    Args:
        model: directory of what save_moe, `lightning-moe upcycle` or an export to lightning_moe wrote.
        output: the directory to write, which must be empty or not exist.
        target: the architecture, such as mixtral; None takes the first that holds the model exactly.
        dtype: of the weights, "auto" as they were saved.
        dense_as_experts: whether blocks that are dense still are written as experts that are all alike, for an
            architecture that has no dense blocks.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: if there is no such directory.
        FileExistsError: if the directory to write holds something.
        ValueError: if no architecture holds the model exactly.
    """
    directory = Path(model).expanduser()
    if not (directory / CONFIG_FILE).is_file() and not is_own_format(directory):
        raise FileNotFoundError(
            f"model={model!r} holds no {CONFIG_FILE}. Give the directory that save_moe(model, path) or `lightning-moe "
            "upcycle` wrote."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError):
        tokenizer = None
    loaded: Any = load_model(str(directory), "AutoModelForCausalLM", dtype)
    exported = export_to_hf(
        loaded,
        output,
        target=target,
        tokenizer=tokenizer,
        family=_family(directory),
        dense_as_experts=dense_as_experts,
    )
    if tokenizer is None:
        print(f"note: {model} has no tokenizer that could be copied.", file=sys.stderr)
    return exported


def _family(directory: Path) -> FFNFamily | None:
    own = directory / CONFIG_FILE
    file, key = (own, "recipe") if own.is_file() else (directory / "config.json", "moe_recipe")
    family = json.loads(file.read_text(encoding="utf-8"))[key]["family"]
    return None if family is None else FFNFamily(**family)


class _Parser(VerbParser):
    verb = "export"


def main(args: Sequence[str]) -> None:
    """Runs ``lightning-moe export`` and says what was written."""
    parser = verb_parser(_Parser, export_checkpoint, set())
    exported, options = run_verb(parser, args, export_checkpoint)
    print(exported)
    if exported.target == MODEL_TYPE:
        print(f"Written to {options.output}; its README.md says which auto class of transformers loads it.")
    else:
        print(f"Written to {options.output}: AutoModelForCausalLM.from_pretrained({options.output!r}) loads it.")
