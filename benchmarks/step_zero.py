"""Upcycles SmolLM2-135M by ``lightning-moe upcycle`` with every initialiser: time, memory, and the loss at step 0.

Run `python examples/prepare.py` first. Each command runs in a process of its own: its wall seconds, and its highest
resident set (as the kernel counts it at the end) beside the size of what it wrote. Then a second process loads the
result with `load_moe` and computes the mean loss of a next token on prose and code, over blocks of 512 tokens, in
float32, and the largest difference of a logit to the dense model. Text for calibration is other text than that of the
loss.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, write_result
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_moe import load_moe

CACHE = Path(__file__).parent.parent / "examples" / ".cache"
BLOCK_SIZE = 512
# of initialisers and their number of shared experts; all with 8 experts and top-2
OPTIONS: dict[str, dict[str, Any]] = {
    "CopyInit": {},
    "NoiseInit": {},
    "DropInit": {},
    "GranularInit": {"granularity": 2},
    "SplitInit": {},
    "SplitInit, activation": {"method": "activation"},
    "SplitInit, gradient": {"method": "gradient"},
    "SplitInit, gradient, 4 shared": {"method": "gradient", "num_shared_experts": 4},
    "ZeroOutputInit, 1 shared": {"num_shared_experts": 1},
    "LowRankInit": {"rank": 16},
}


def main() -> None:
    """Measures all initialisers, or those that are named, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--blocks", type=int, default=8, help="of each domain (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one block, and two initialisers")
    parser.add_argument("--loss-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loss_of:
        print(json.dumps(losses(args.loss_of, args.blocks)))
        return
    if args.quick:
        args.only, args.blocks = ["CopyInit", "LowRankInit"], 1
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / "prose.txt", Path(scratch) / "code.txt"]
        for file, text in zip(files, texts().values(), strict=True):
            file.write_text(text[-20_000:], encoding="utf-8")
        cases = [{"init": "the dense model", **loss_in_a_process(str(CACHE / "smollm2"), args.blocks)}]
        for name in args.only:
            cases.append(measure(name, Path(scratch), files, args.blocks))
            print(json.dumps(cases[-1]))
    record = {
        **environment(torch.get_num_threads()),
        "quick": args.quick,
        "seed": 0,
        "config": {"model": "SmolLM2-135M", "experts": 8, "top_k": 2, "blocks": args.blocks, "rounds": 1},
        "cases": cases,
        "wall_seconds": round(time.monotonic() - start, 1),
    }
    print(f"written to {write_result('step_zero', record)}")


def measure(name: str, scratch: Path, files: list[Path], blocks: int) -> dict[str, Any]:
    """Runs the command with one initialiser, then computes the loss of what it wrote."""
    target, options = scratch / "moe", dict(OPTIONS[name])
    command = [sys.executable, "-c", "from lightning_moe.cli import main; main()", "upcycle"]
    command += ["--model", str(CACHE / "smollm2"), "--output", str(target), "--config.seed", "0"]
    command += ["--calibration_files", *map(str, files), "--config.num_experts=8"]
    command += [f"--config.num_shared_experts={options.pop('num_shared_experts', 0)}"]
    command += [f"--config.init={name.partition(',')[0]}", *(f"--config.init.{key}={v}" for key, v in options.items())]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    if status:
        raise RuntimeError(f"{name}: {errors}")
    receipt = json.loads((target / "moe_config.json").read_text())["receipt"]
    case = {
        "init": name,
        "seconds": round(seconds, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "result_bytes": sum(file.stat().st_size for file in target.glob("*.safetensors")),
        **{key: receipt[key] for key in ("parameters", "active_parameters", "expert_similarity", "preserved")},
        **loss_in_a_process(str(target), blocks),
    }
    shutil.rmtree(target)
    return case


def loss_in_a_process(path: str, blocks: int) -> dict[str, float]:
    """Computes the losses in a process whose memory is free afterwards."""
    command = [sys.executable, __file__, "--loss-of", path, "--blocks", str(blocks)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def losses(path: str, blocks: int) -> dict[str, float]:
    """The mean loss of a next token on each domain, and how far the logits are from the dense model's."""
    dense: Any = AutoModelForCausalLM.from_pretrained(CACHE / "smollm2", dtype="float32").eval()
    moe: Any = dense if Path(path) == CACHE / "smollm2" else load_moe(path)
    tokenizer = AutoTokenizer.from_pretrained(CACHE / "smollm2")
    found: dict[str, float] = {}
    difference = 0.0
    for domain, text in texts().items():
        ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[0, : blocks * BLOCK_SIZE].view(blocks, BLOCK_SIZE)
        total = 0.0
        for block in ids.split(1):
            logits = moe(input_ids=block).logits
            total += float(F.cross_entropy(logits[0, :-1].float(), block[0, 1:]))
            difference = max(difference, float((logits - dense(input_ids=block).logits).abs().max()))
        found[f"{domain}_loss"] = round(total / blocks, 4)
    return {**found, "logit_difference": difference}


def texts() -> dict[str, str]:
    """Prose and code, long enough for loss and calibration."""
    prose = "\n\n".join(file.read_text() for file in sorted((CACHE / "prose").glob("*.txt")))
    code = [json.loads(line)["text"] for line in (CACHE / "code.jsonl").read_text().splitlines()]
    return {"prose": prose, "code": "\n\n".join(code)}


if __name__ == "__main__":
    main()
