"""Times the experts, and the whole MoE layer, against one dense FFN over as many rows.

Contenders, all in one process, with the same weights and the same routing:

- ``dense limit``: one dense SwiGLU FFN over T·K rows: equal active FLOPs, nothing to route.
- ``ours``: `Experts.forward` with a ready routing; ``ours, layer``: `MoELayer`, with its gate.
- ``grouped_mm``, ``eager``: transformers' MixtralExperts with a ready routing, in two of its implementations;
  ``grouped_mm, layer``: its MixtralSparseMoeBlock, with its gate.
- ``loop``: `Experts.loop`, our reference.

First each contender runs once and is checked: output and all gradients against ``loop``, ||a - b|| / ||b|| below
`TOLERANCE`. Then rounds, in each of which every contender runs one training step (forward and backward); the order
rotates. Figures are CPU seconds of the contender divided by those of the dense limit of the same round: median and
quartiles over the rounds. ``forward`` is the forward part of these steps, gradients on. A contender that needed over
`SLOW` times the limit in its check is not run again: that one step is its figure.

Memory is the peak of a step above its start, in bytes, by the CPU allocator's own events (`torch.profiler` with
``profile_memory``), so neither the heap's setting nor the operating system plays a part. The gradients that the step
leaves count, for all contenders.

The heap is kept: glibc would map and zero-fill every tensor over 32 MB anew, and we would time page faults. For that
the script runs itself again with two variables in the environment, unless ``--no-heap-kept``.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import environment, quartiles, write_result
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

from lightning_moe.experts import Experts
from lightning_moe.layer import MoELayer
from lightning_moe.routers import TopKRouter

HEAP_KEPT = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}
# float32: the order of a sum; bfloat16: 8 bits per rounded intermediate. transformers' gate computes in bfloat16 and
# ours in float32, so that near ties go to other experts and whole tokens differ: hence the last one.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "autocast": 2e-2}
TOLERANCE_BF16_GATE = 0.4
SLOW = 2.0
LIMIT = "dense limit"
WEIGHED = (LIMIT, "ours", "grouped_mm")


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer."""

    hidden_size: int
    expert_size: int
    num_experts: int
    top_k: int


SHAPES = {
    "A": Shape(hidden_size=576, expert_size=1536, num_experts=8, top_k=2),
    "B": Shape(hidden_size=576, expert_size=384, num_experts=32, top_k=4),
    "D": Shape(hidden_size=1024, expert_size=704, num_experts=64, top_k=6),
}


class DenseFFN(nn.Module):
    """The SwiGLU FFN of a dense model."""

    def __init__(self, hidden_size: int, ffn_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_size, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, ffn_size, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(ffn_size, hidden_size, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``down(silu(gate x) * up x)``."""
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


@dataclass
class Contender:
    """Something to time.

    Args:
        forward: computes the output.
        leaves: the tensors whose gradients the backward computes, by name.
        autocast: whether the forward runs under bfloat16 autocast.
        grad: the output's gradient, drawn at the first step.
    """

    forward: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    autocast: bool
    grad: Tensor | None = None

    def step(self) -> tuple[float, float, Tensor]:
        """Runs forward and backward; returns the CPU seconds of the forward and of both, and the output."""
        for leaf in self.leaves.values():
            leaf.grad = None
        start = time.process_time()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            out = self.forward()
        forward = time.process_time() - start
        if self.grad is None:
            self.grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
        start = time.process_time()
        out.backward(self.grad)
        return forward, forward + time.process_time() - start, out.detach()

    def peak_bytes(self) -> int:
        """Returns the peak of a step above its start."""
        for leaf in self.leaves.values():
            leaf.grad = None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step()
        assert profile.profiler is not None
        assert profile.profiler.kineto_results is not None
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        total = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            total += event.nbytes()
            peak = max(peak, total)
        return peak


def build(
    shape: Shape, dtype_name: str, skewed: bool, num_tokens: int, seed: int
) -> tuple[dict[str, Contender], float]:
    """Makes the contenders of one case, and tells the load of the fullest expert relative to the mean."""
    generator = torch.Generator().manual_seed(seed)
    dtype, autocast = DTYPES[dtype_name], dtype_name == "autocast"
    D, E, K = shape.hidden_size, shape.num_experts, shape.top_k

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    experts = Experts(E, D, shape.expert_size, dtype=dtype)
    experts.gate_up_proj.data = random(E, 2 * shape.expert_size, D, scale=0.02)
    experts.down_proj.data = random(E, D, shape.expert_size, scale=0.02)
    router = TopKRouter(D, E, top_k=K)
    router.gate.data = random(E, D, scale=D**-0.5)
    x = random(num_tokens, D)
    # the first channel is constant, so its column of the gate is a bias on the experts
    x[:, 0], router.gate.data[:, 0] = 1.0, -0.3 * torch.arange(E) if skewed else 0.0
    x.requires_grad_()
    layer = MoELayer(router, experts)

    ready = router(x).detach()
    ready.weights.requires_grad_()
    expert_ids, weights = ready.expert_ids.view(-1, K), ready.weights.view(-1, K)
    eager, grouped = (_transformers(MixtralExperts, shape, name) for name in ("eager", "grouped_mm"))
    block = _transformers(MixtralSparseMoeBlock, shape, "grouped_mm")
    for module in (eager, grouped, block.experts):
        module.gate_up_proj, module.down_proj = experts.gate_up_proj, experts.down_proj
    block.gate.weight = router.gate

    dense = DenseFFN(D, shape.expert_size, dtype)
    rows = random(num_tokens * K, D).requires_grad_()
    stacked = {"x": x, "gate_up_proj": experts.gate_up_proj, "down_proj": experts.down_proj}
    routed, gated = {**stacked, "weights": ready.weights}, {**stacked, "gate": router.gate}
    contenders = {
        LIMIT: Contender(lambda: dense(rows), {"x": rows, **dict(dense.named_parameters())}, autocast),
        "ours": Contender(lambda: experts(x, ready), routed, autocast),
        "grouped_mm": Contender(lambda: grouped(x, expert_ids, weights), routed, autocast),
        "eager": Contender(lambda: eager(x, expert_ids, weights), routed, autocast),
        "loop": Contender(lambda: experts.loop(x, ready), routed, autocast),
        "ours, layer": Contender(lambda: layer(x), gated, autocast),
        "grouped_mm, layer": Contender(lambda: block(x.unsqueeze(0)).squeeze(0), gated, autocast),
    }
    load = ready.expert_ids.bincount(minlength=E).float()
    return contenders, float(load.max() / load.mean())


def _transformers(kind: type[nn.Module], shape: Shape, implementation: str) -> Any:
    config = MixtralConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.expert_size,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        return kind(config)


def check(contenders: dict[str, Contender], dtype_name: str) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Runs each contender once and compares outputs and gradients; returns the differences and the CPU seconds."""
    truth: dict[str, Tensor] = {}
    differences, seconds = {}, {}
    # the reference first; of the two layers, ours before the other
    for name in sorted(contenders, key=lambda name: name != "loop"):
        contender = contenders[name]
        forward, both, out = contender.step()
        seconds[name] = (forward, both)
        if name == LIMIT:
            continue
        found = {"output": out, **{key: leaf.grad for key, leaf in contender.leaves.items() if leaf.grad is not None}}
        assert len(found) == 1 + len(contender.leaves)
        if "gate" in found:
            # the gate sends its gradient into x as well: the layers' x compares with each other only
            found["x of a layer"] = found.pop("x")
        for key, value in found.items():
            truth.setdefault(key, value)
        differences[name] = max(_difference(value, truth[key]) for key, value in found.items())
        bf16_gate = name == "grouped_mm, layer" and dtype_name != "fp32"
        if not differences[name] <= (TOLERANCE_BF16_GATE if bf16_gate else TOLERANCE[dtype_name]):
            each = {key: f"{_difference(value, truth[key]):.1e}" for key, value in found.items()}
            raise AssertionError(f"{name}, {dtype_name}: computes something else than the reference: {each}")
    return differences, seconds


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def run_case(shape_name: str, dtype_name: str, routing: str, args: argparse.Namespace) -> dict[str, Any]:
    """Checks, times and weighs the contenders on one shape, dtype and routing."""
    shape = SHAPES[shape_name]
    contenders, load = build(shape, dtype_name, routing == "skewed", args.tokens, args.seed)
    differences, seconds = check(contenders, dtype_name)
    slow = [name for name in contenders if seconds[name][1] > SLOW * seconds[LIMIT][1]]
    rounds = {name: [seconds[name]] if name in slow else [] for name in contenders}
    names = [name for name in contenders if name not in slow]
    for number in range(args.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            rounds[name].append(contenders[name].step()[:2])
    figures = {}
    for name, contender in contenders.items():
        limits = [seconds[LIMIT]] if name in slow else rounds[LIMIT]
        paired = list(zip(rounds[name], limits, strict=True))
        middle = sorted(both for _, both in rounds[name])[len(rounds[name]) // 2]
        figures[name] = {
            "forward": quartiles([time[0] / limit[0] for time, limit in paired]),
            "forward_backward": quartiles([time[1] / limit[1] for time, limit in paired]),
            "tokens_per_cpu_second": round(args.tokens / middle, 1),
            "difference": differences.get(name),
            "peak_bytes": contender.peak_bytes() if name in WEIGHED else None,
        }
    return {
        "shape": shape_name,
        **vars(shape),
        "num_tokens": args.tokens,
        "dtype": dtype_name,
        "routing": routing,
        "max_load_over_mean": round(load, 3),
        "contenders": figures,
    }


def show(case: dict[str, Any]) -> None:
    """Prints one case."""
    print(f"{case['shape']} {case['dtype']} {case['routing']} (fullest expert {case['max_load_over_mean']:.1f} x mean)")
    for name, figure in case["contenders"].items():
        both, forward = figure["forward_backward"], figure["forward"]
        peak = "" if figure["peak_bytes"] is None else f"  peak {figure['peak_bytes'] / 1e6:7.1f} MB"
        times = "  ".join(
            f"{what} {ratio['median']:6.3f} [{ratio['q1']:.3f}, {ratio['q3']:.3f}]"
            for what, ratio in (("fwd+bwd", both), ("fwd", forward))
        )
        print(f"  {name:18} {times}  rounds {both['rounds']}{peak}", flush=True)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Times MoE experts against a dense FFN; see the file's docstring.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--routing", nargs="+", choices=("balanced", "skewed"), default=["balanced", "skewed"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="shape A, 256 tokens, 2 rounds: does the script run?")
    parser.add_argument("--no-heap-kept", dest="heap_kept", action="store_false")
    args = parser.parse_args()
    if args.quick:
        args.shapes, args.tokens, args.rounds = ["A"], 256, 2
    return args


def main() -> None:
    args = parse()
    if args.heap_kept and any(os.environ.get(key) != value for key, value in HEAP_KEPT.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HEAP_KEPT})
    torch.set_num_threads(args.threads)
    # before the run: a commit made meanwhile is not what was measured
    found = environment(args.threads)
    start = time.perf_counter()
    cases = []
    for shape in args.shapes:
        for dtype in args.dtypes:
            for routing in args.routing:
                cases.append(run_case(shape, dtype, routing, args))
                show(cases[-1])
                gc.collect()
    record = {
        "quick": args.quick,
        "config": vars(args),
        "seed": args.seed,
        **found,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "cases": cases,
    }
    print(f"{record['wall_seconds']} s, written to {write_result('experts_speed', record)}")


if __name__ == "__main__":
    main()
