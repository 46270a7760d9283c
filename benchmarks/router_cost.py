"""Times the whole MoE layer with every router against the same layer with plain top-k.

Forward and backward in training mode, with the balance losses that each router brings along, in bfloat16 with one
thread. All layers of a shape share one set of expert weights, so that they differ by their router only. A router has
its default arguments, but for ``top_k`` (and what stands for it), which is the shape's: the mean number of experts that
really computed for a token is counted, and told beside the time.

Rounds, in each of which every router runs one step; the order rotates. A figure is the CPU seconds of a router's step
divided by those of `TopKRouter` in the same round: median and quartiles over the rounds. ``router only`` is the
router's forward alone, over the whole layer's forward and backward with `TopKRouter`.

The heap is kept, as in ``experts_speed.py``.
"""

import argparse
import inspect
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from common import environment, quartiles, write_result
from experts_speed import HEAP_KEPT, SHAPES, Shape
from torch import Tensor

from lightning_moe import ROUTERS, Experts, MoELayer, Router, TopKRouter, record_routing
from lightning_moe.tokens import Tokens

# what a router takes instead of top_k, where it has no such argument
INSTEAD_OF_TOP_K = {"capacity_factor": float}


@dataclass
class Contender:
    """One router in its layer.

    Args:
        layer: the layer.
        tokens: what the router is told of the tokens, for timing it alone.
    """

    layer: MoELayer
    tokens: Tokens

    def step(self, x: Tensor, grad: Tensor) -> float:
        """Runs the layer forward and backward; returns CPU seconds."""
        x.grad = None
        self.layer.zero_grad()
        start = time.process_time()
        self.layer(x).backward(grad)
        return time.process_time() - start

    def route(self, x: Tensor) -> float:
        """Runs the router alone; returns CPU seconds."""
        start = time.process_time()
        self.layer.router(x[0], self.tokens)
        return time.process_time() - start


def build(cls: type[Router], shape: Shape, experts: Experts, num_tokens: int, seed: int) -> Contender:
    """Makes the layer of one router."""
    torch.manual_seed(seed)
    parameters = inspect.signature(cls.__init__).parameters
    arguments: dict[str, Any] = {"top_k": shape.top_k} if "top_k" in parameters else {}
    arguments |= {name: kind(shape.top_k) for name, kind in INSTEAD_OF_TOP_K.items() if name in parameters}
    router = cls(shape.hidden_size, shape.num_experts, **arguments).to(torch.bfloat16)
    layer = MoELayer(router, experts).train()
    for loss in router.balance_losses():
        layer.balance_losses[loss.name] = loss
    ids = torch.randint(0, 50_000, (1, num_tokens), generator=torch.Generator().manual_seed(seed))
    layer.context.inputs = {"input_ids": ids}
    if router.uses_previous_logits:
        # as in every layer of a model but the first
        layer.position, layer.is_last = 1, True
    return Contender(layer, Tokens(ids=ids[0]))


def measure(name: str, num_tokens: int, rounds: int, seed: int) -> dict[str, Any]:
    """Times all routers on one shape."""
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    experts = Experts(shape.num_experts, shape.hidden_size, shape.expert_size, dtype=torch.bfloat16)
    for parameter in experts.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    x = torch.randn(1, num_tokens, shape.hidden_size, generator=generator).bfloat16().requires_grad_()
    grad = torch.randn(x.shape, generator=generator).bfloat16()
    contenders = {cls.__name__: build(cls, shape, experts, num_tokens, seed) for cls in ROUTERS}
    computed = {key: _computed_per_token(contender, x) for key, contender in contenders.items()}
    times: dict[str, list[float]] = {key: [] for key in contenders}
    routing: dict[str, list[float]] = {key: [] for key in contenders}
    order = list(contenders)
    for number in range(rounds):
        for key in order[number % len(order) :] + order[: number % len(order)]:
            times[key].append(contenders[key].step(x, grad))
            routing[key].append(contenders[key].route(x))
        print(f"shape {name}: round {number + 1} of {rounds}", flush=True)
    plain = times[TopKRouter.__name__]
    return {
        "shape": name,
        "routers": {
            key: {
                "forward_backward": quartiles([one / other for one, other in zip(times[key], plain, strict=True)]),
                "router_only": quartiles([one / other for one, other in zip(routing[key], plain, strict=True)]),
                "computed_per_token": computed[key],
                "balance_losses": [loss.name for loss in contenders[key].layer.router.balance_losses()],
            }
            for key in contenders
        },
    }


def _computed_per_token(contender: Contender, x: Tensor) -> float:
    # also the first step, which is not timed
    with record_routing() as window:
        contender.layer(x)
    (routing,) = window.values()
    mask = routing.computed()
    rows = len(routing.token_ids) if mask is None else int(mask.sum())
    return round(rows / routing.num_tokens, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["A", "D"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="64 tokens and two rounds: does it run?")
    options = parser.parse_args()
    if any(os.environ.get(key) != value for key, value in HEAP_KEPT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HEAP_KEPT})
    if options.quick:
        options.tokens, options.rounds = 64, 2
    torch.set_num_threads(1)
    start = time.time()
    cases = [measure(name, options.tokens, options.rounds, options.seed) for name in options.shapes]
    record = {
        **environment(1),
        "quick": options.quick,
        "seed": options.seed,
        "config": {"rounds": options.rounds, "tokens": options.tokens, "dtype": "bf16", "heap_kept": True},
        "cases": cases,
        "wall_seconds": round(time.time() - start, 1),
    }
    print(write_result("router_cost", record))


if __name__ == "__main__":
    main()
