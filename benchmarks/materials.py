"""What the suites run on, made once and kept in ``examples/.cache``: models, texts, tasks.

``model`` is SmolLM2-135M; ``texts`` a corpus of three domains from the running Python and the packages installed beside
us; ``tasks`` the local data of the zero-shot tasks. A model with ``pretrain`` is trained from scratch, with a tokenizer
of its own, and kept under a hash of all that it follows from.
"""

import ast
import hashlib
import importlib.util
import json
import os
import pydoc_data.topics
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import ROOT
from suites import filled

sys.path.append(str(ROOT.parent / "examples"))
from prepare import CACHE, prepare_model

TEXTS = CACHE / "texts"
TASKS = CACHE / "tasks"
PRETRAINED = CACHE / "pretrained"

# the packages whose documentation is read; all come with ours
_DOCUMENTED = ("numpy", "scipy", "sklearn", "pandas", "torch", "transformers")
_BYTES_OF_A_PACKAGE = 1_500_000
_BYTES_OF_CODE = 6_000_000
_SHORTEST_DOCSTRING = 600
_SEPARATOR = "<|endoftext|>"
# one document in ten validates
_VALIDATE = 10


def prepare(what: list[str]) -> None:
    """Makes what is not there yet: any of ``model``, ``texts`` and ``tasks``."""
    makers: dict[str, Callable[[], None]] = {
        "model": lambda: prepare_model(CACHE / "smollm2"),
        "texts": prepare_texts,
        "tasks": _prepare_tasks,
    }
    for name in what:
        if name not in makers:
            raise ValueError(f"prepare: there is no {name!r}. There are {', '.join(makers)}.")
        makers[name]()


def prepare_texts(target: Path = TEXTS) -> None:
    """Writes ``<domain>.train.jsonl`` and ``<domain>.val.jsonl`` of three domains, unless they are there."""
    if target.is_dir():
        return
    scratch = target.with_suffix(f".{os.getpid()}")
    scratch.mkdir(parents=True)
    for domain, documents in (("prose", _prose()), ("docs", _docstrings()), ("code", _code())):
        with (
            (scratch / f"{domain}.train.jsonl").open("w", encoding="utf-8") as train,
            (scratch / f"{domain}.val.jsonl").open("w", encoding="utf-8") as val,
        ):
            for text in documents:
                # by the text itself: one that occurs twice is not on both sides
                number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
                (train if number % _VALIDATE else val).write(json.dumps({"text": text}) + "\n")
    # whole or not at all
    scratch.replace(target)
    print(f"texts: {target}")


def pretrained(name: str, settings: dict[str, Any]) -> Path:
    """The folder of a small model trained from scratch on the texts, and its tokenizer's; trains it if it is not there.

    Args:
        name: of the model.
        settings: ``architecture`` (class_path and init_args of a transformers configuration), ``vocab_size`` of its
            tokenizer, ``steps``, and ``run``, the configuration of LightningCLI that trains it.
    """
    import torch
    from planned import instantiate
    from transformers import AutoModelForCausalLM

    texts = _digest(TEXTS)
    digest = hashlib.sha256(json.dumps([settings, texts], sort_keys=True).encode()).hexdigest()[:12]
    target = PRETRAINED / f"{name}-{digest}"
    if (target / "model.safetensors").is_file():
        return target
    tokenizer = _tokenizer(PRETRAINED / f"tokenizer-{settings['vocab_size']}-{texts}", settings["vocab_size"])
    work = target.with_suffix(".start")
    torch.manual_seed(0)
    config = architecture(
        settings["architecture"], vocab_size=settings["vocab_size"], bos_token_id=None, eos_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(work)
    tokenizer.save_pretrained(work)
    cli = instantiate(filled(settings["run"], {"{model}": str(work), "{steps}": settings["steps"]}))
    last = target.with_suffix(".ckpts") / "last.ckpt"
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=str(last) if last.is_file() else None)
    scratch = target.with_suffix(".new")
    cli.model.model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    values = {
        key: float(value) for key, value in cli.trainer.validate(cli.model, cli.datamodule, verbose=False)[0].items()
    }
    (scratch / "validation.json").write_text(json.dumps(values, indent=1) + "\n")
    scratch.replace(target)
    print(f"pretrained: {target} {values}")
    return target


def architecture(settings: dict[str, Any], **changes: Any) -> Any:
    """A configuration of transformers, from its class_path and init_args."""
    import transformers

    return getattr(transformers, settings["class_path"].rpartition(".")[2])(**{**settings["init_args"], **changes})


def _prepare_tasks() -> None:
    from lightning_moe.local_tasks import prepare_tasks

    if not TASKS.is_dir():
        prepare_tasks(TASKS)


def _prose() -> Iterator[str]:
    yield from (pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def _code() -> Iterator[str]:
    size = 0
    library = Path(sysconfig.get_path("stdlib"))
    for source in sorted(library.rglob("*.py")):
        parts = source.relative_to(library).parts
        # installed packages, and tests, which are half of it
        if {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        text = source.read_text(encoding="utf-8", errors="ignore")
        size += len(text)
        if size > _BYTES_OF_CODE:
            return
        yield text


def _docstrings() -> Iterator[str]:
    for package in _DOCUMENTED:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f"The texts need {package}. Install it: pip install 'lightning-moe[dev]'")
        size, seen = 0, set()
        for source in sorted(Path(spec.origin).parent.rglob("*.py")):
            if size > _BYTES_OF_A_PACKAGE:
                break
            for text in _documented(source):
                if text not in seen:
                    seen.add(text)
                    size += len(text)
                    yield text


def _documented(source: Path) -> Iterator[str]:
    try:
        tree = ast.parse(source.read_text(encoding="utf-8", errors="ignore"))
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
            text = ast.get_docstring(node) or ""
            if len(text) >= _SHORTEST_DOCSTRING:
                yield text


def _tokenizer(target: Path, size: int) -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not target.is_dir():
        trained = ByteLevelBPETokenizer()
        files = sorted(TEXTS.glob("*.train.jsonl"))
        texts = (json.loads(line)["text"] for file in files for line in file.open(encoding="utf-8"))
        trained.train_from_iterator(texts, vocab_size=size, special_tokens=[_SEPARATOR], show_progress=False)
        scratch = target.with_suffix(f".{os.getpid()}")
        PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=_SEPARATOR).save_pretrained(scratch)
        scratch.replace(target)
    return AutoTokenizer.from_pretrained(target)


def _digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        whole.update(file.read_bytes())
    return whole.hexdigest()[:8]
