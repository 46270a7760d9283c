"""Converts an exported model to GGUF by llama.cpp's own converter, runs it there, and compares the greedy text.

    python examples/demo.py && python examples/llama_cpp.py examples/.cache/smollm2-mixtral

The converter and a build of llama.cpp come from the package registry, into examples/.cache; no environment is changed.
"""

import argparse
import os
import subprocess
import sys
import tarfile
from importlib import import_module
from pathlib import Path
from typing import Any

from prepare import CACHE
from transformers import AutoModelForCausalLM, AutoTokenizer

PLACE = CACHE / "llama.cpp"
SOURCE = "llama-cpp-python==0.3.36"
PACKAGES = ("xllamacpp==2026.10.11549", "sentencepiece")
CONVERTER = "vendor/llama.cpp"


def prepare() -> Path:
    """Fetches what is needed, unless it is there; returns the directory of the converter."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    if not (PLACE / "packages").is_dir():
        subprocess.run([*pip, "install", "--no-deps", "--target", str(PLACE / "packages"), *PACKAGES], check=True)
    if not (found := list(PLACE.glob(f"*/{CONVERTER}"))):
        subprocess.run([*pip, "download", "--no-deps", "--dest", str(PLACE), SOURCE], check=True)
        with tarfile.open(next(PLACE.glob("*.tar.gz"))) as archive:
            archive.extractall(PLACE, filter="data")
        found = list(PLACE.glob(f"*/{CONVERTER}"))
    return found[0]


def convert(model: Path, converter: Path) -> Path:
    """Writes the model in float32 beside its directory."""
    file = model.with_suffix(".gguf")
    command = [
        sys.executable,
        "convert_hf_to_gguf.py",
        str(model.resolve()),
        "--outtype",
        "f32",
        "--outfile",
        str(file),
    ]
    paths = os.pathsep.join([str(PLACE / "packages"), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        command, cwd=converter, env=os.environ | {"PYTHONPATH": paths}, check=True, stderr=subprocess.DEVNULL
    )
    return file


def generate(file: Path, prompt: str, num_tokens: int) -> str:
    """Continues a prompt greedily in llama.cpp."""
    sys.path.insert(0, str(PLACE / "packages"))
    llama_cpp = import_module("xllamacpp")
    parameters = llama_cpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = 512
    request = {"prompt": prompt, "n_predict": num_tokens, "temperature": 0.0, "top_k": 1}
    return str(llama_cpp.Server(parameters).handle_completions(request)["choices"][0]["text"])


def main() -> None:
    """Converts, runs and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory that lightning-moe export wrote")
    parser.add_argument("--prompt", default="A function is")
    parser.add_argument("--tokens", type=int, default=24, help="to generate (default: %(default)s)")
    args = parser.parse_args()
    model = args.model.resolve()
    text = generate(convert(model, prepare()), args.prompt, args.tokens)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(args.prompt, return_tensors="pt")
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    out = loaded.generate(**ids, max_new_tokens=args.tokens, do_sample=False)
    wanted = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"transformers  {wanted!r}\nllama.cpp     {text!r}\n{'equal' if text == wanted else 'DIFFERENT'}")
    sys.exit(text != wanted)


if __name__ == "__main__":
    main()
