"""Times upcycling against one memcpy of its result, and weighs its peak.

The model is a stack of Llama-like FFNs with random weights, as many as make about ``--gigabytes`` of expert weights.

Time, in one process, which keeps one upcycled stack: each round upcycles the stack once more, and copies every
parameter of the kept result into fresh memory (``torch.empty_like(p).copy_(p)``), the other way round in every second
round. What a side made is freed before the other side starts, so that both pay alike for first-touched pages. One
uncounted round comes first. The figures are medians of the paired ratios, in CPU seconds (with the kernel's share) and
in wall seconds.

Peak, in a process of its own for each dtype: the highest resident set of build and upcycle (VmHWM), above what the
process held before the build, in bytes, beside result + one dense layer. The upcycling is the first large
computation of that process, so the buffers that the libraries allocate once are part of the figure.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import environment, quartiles, write_result
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moe.config import UpcycleConfig
from lightning_moe.upcycle import upcycle

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LlamaFFN(nn.Module):
    """The FFN of a Llama, with its names."""

    def __init__(self, hidden_size: int, ffn_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_size, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, ffn_size, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(ffn_size, hidden_size, bias=False, dtype=dtype)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``down(silu(gate x) * up x)``."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


def build(args: argparse.Namespace, dtype: torch.dtype) -> list[nn.Module]:
    """Makes the dense FFNs."""
    layer_bytes = 3 * args.hidden_size * args.ffn_size * dtype.itemsize
    num_layers = max(1, round(args.gigabytes * 1e9 / (layer_bytes * args.experts)))
    torch.manual_seed(args.seed)
    return [LlamaFFN(args.hidden_size, args.ffn_size, dtype) for _ in range(num_layers)]


def num_bytes(module: nn.Module) -> int:
    """Size of the parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def measure_time(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Times upcycling and the copy of its result, round by round."""
    ffns = build(args, dtype)
    config = UpcycleConfig(num_experts=args.experts, seed=args.seed)

    def upcycled() -> list[Tensor]:
        # the FFNs outlive the model, whose children are replaced
        model = nn.ModuleList(ffns)
        upcycle(model, config)
        return [p.data for p in model.parameters()]

    kept = upcycled()

    def copied() -> list[Tensor]:
        return [torch.empty_like(p).copy_(p) for p in kept]

    rounds = []
    for number in range(args.rounds + 1):
        sides = (upcycled, copied) if number % 2 else (copied, upcycled)
        seconds = {side: _time(side) for side in sides}
        rounds.append((seconds[upcycled], seconds[copied]))
        print(f"  upcycle {rounds[-1][0]} s, memcpy {rounds[-1][1]} s (wall, CPU)", flush=True)
    del rounds[0]
    return {
        "num_layers": len(ffns),
        "source_bytes": sum(num_bytes(ffn) for ffn in ffns),
        "result_bytes": sum(p.numel() * p.element_size() for p in kept),
        "upcycle_cpu_seconds": quartiles([ours[1] for ours, _ in rounds]),
        "memcpy_cpu_seconds": quartiles([copy[1] for _, copy in rounds]),
        # the fastest of each: whichever comes after pages went back to the host pays for finding them, several-fold
        "best_cpu_seconds": [min(ours[1] for ours, _ in rounds), min(copy[1] for _, copy in rounds)],
        "ratio_best": round(min(ours[1] for ours, _ in rounds) / min(copy[1] for _, copy in rounds), 4),
        "ratio_wall": quartiles([ours[0] / copy[0] for ours, copy in rounds]),
        "ratio_cpu": quartiles([ours[1] / copy[1] for ours, copy in rounds]),
    }


def _time(make: Callable[[], list[Tensor]]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    made = make()
    seconds = round(time.perf_counter() - wall, 3), round(time.process_time() - cpu, 3)
    del made
    return seconds


def measure_peak(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Builds and upcycles once in this, a fresh, process."""
    before = _status("VmRSS")
    ffns = build(args, dtype)
    source = sum(num_bytes(ffn) for ffn in ffns)
    layer = source // len(ffns)
    model = nn.ModuleList(ffns)
    del ffns
    upcycle(model, UpcycleConfig(num_experts=args.experts, seed=args.seed))
    bound = num_bytes(model) + layer
    peak = _status("VmHWM") - before
    return {"peak_bytes": peak, "bound_bytes": bound, "layer_bytes": layer, "peak_over_bound": round(peak / bound, 4)}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; this benchmark needs Linux.")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Times and weighs upcycling; see the file's docstring.")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of the result; free memory: 2.5 times this")
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--ffn-size", type=int, default=5632)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="0.1 GB, 1 round: does the script run?")
    parser.add_argument("--peak", choices=DTYPES, help="only measure the peak in this process and print it")
    args = parser.parse_args()
    if args.quick:
        args.gigabytes, args.hidden_size, args.ffn_size, args.rounds = 0.1, 256, 704, 1
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.peak is not None:
        print(json.dumps(measure_peak(args, DTYPES[args.peak])))
        return
    # before the run: a commit made meanwhile is not what was measured
    found = environment(args.threads)
    start = time.perf_counter()
    cases = []
    for dtype in args.dtypes:
        command = [sys.executable, *sys.argv, "--peak", dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        case: dict[str, Any] = {"dtype": dtype, **json.loads(done.stdout.splitlines()[-1])}
        print(
            f"{dtype}: peak {case['peak_bytes'] / 1e9:.3f} GB of at most {case['bound_bytes'] / 1e9:.3f} GB", flush=True
        )
        case |= measure_time(args, DTYPES[dtype])
        print(f"  ratio {case['ratio_wall']['median']:.3f} (wall), {case['ratio_cpu']['median']:.3f} (CPU)", flush=True)
        cases.append(case)
    config = {key: value for key, value in vars(args).items() if key != "peak"}
    record = {
        "quick": args.quick,
        "config": config,
        "seed": args.seed,
        **found,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "cases": cases,
    }
    print(f"{record['wall_seconds']} s, written to {write_result('upcycle_memory', record)}")


if __name__ == "__main__":
    main()
