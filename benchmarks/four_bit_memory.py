"""Weighs QLoRA for a Mixture of Experts: what each part of the model takes, and a training step at its most.

The model has the shape of SmolLM2-135M and random weights, 8 low-rank experts and a trained router in each block. In
``full`` precision what is frozen stays bfloat16, in ``nf4`` it goes into 4 bit; each is trained by AdamW and by the
8-bit AdamW of bitsandbytes, in a process of its own. Bytes of the parts are those of the tensors. The peak is the model
and the most bytes of tensors that a later step made and that were alive together, and the optimizer's states; a
dispatch mode counts at each operation, so buffers inside of a kernel are not in it.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes
import torch
from common import environment, write_result
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_moe import LowRankInit, UpcycleConfig, quantize_frozen, train_only, upcycle
from lightning_moe.callbacks.optimizers import keep_routers_in_32_bits

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": partial(torch.optim.AdamW, fused=True),
    "AdamW8bit": bitsandbytes.optim.AdamW8bit,
}
CASES = [(weights, optimizer) for weights in ("full", "nf4") for optimizer in OPTIMIZERS]
# the first that a parameter's name has is its part
PARTS = {"router": "routers", "experts": "shared FFNs", "self_attn": "attention", "embed": "embeddings"}
CHANGES = ("first_a", "first_b", "down_a", "down_b")


class Live(TorchDispatchMode):
    """The bytes of tensors made since it began that are alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return out


def build(args: argparse.Namespace, weights: str) -> nn.Module:
    """Makes the model, upcycled and frozen."""
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=args.layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model: nn.Module = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    upcycle(model, UpcycleConfig(num_experts=args.experts, init=LowRankInit(args.rank), seed=args.seed))
    if weights == "nf4":
        quantize_frozen(model)
    else:
        train_only(model)
    return model


def parts(model: nn.Module) -> dict[str, int]:
    """Bytes of the parameters by part."""
    found = dict.fromkeys((*PARTS.values(), "low-rank changes", "norms"), 0)
    for name, parameter in model.named_parameters():
        part = next((label for key, label in PARTS.items() if key in name), "norms")
        part = "low-rank changes" if name.endswith(CHANGES) else part
        found[part] += parameter.numel() * parameter.element_size()
    return found


def measure(args: argparse.Namespace, weights: str, optimizer_name: str) -> dict[str, Any]:
    """Trains a few steps in this, a fresh, process."""
    model = build(args, weights)
    own = parts(model)
    optimizer = OPTIMIZERS[optimizer_name]([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    keep_routers_in_32_bits(model, optimizer)
    ids = torch.randint(0, 49152, (1, args.tokens))

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # which makes the optimizer's states
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in states}
    with Live() as live:
        for _ in range(args.rounds):
            step()
    return {
        "weights": weights,
        "optimizer": optimizer_name,
        "parts": own,
        "model_bytes": sum(own.values()),
        "state_bytes": sum(storages.values()),
        "peak_bytes": sum(own.values()) + sum(storages.values()) + live.peak,
    }


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Weighs 4-bit weights and 8-bit optimizers; see the file's docstring.")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1, help="steps that are weighed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="2 layers, 16 tokens: does the script run?")
    parser.add_argument("--case", type=int, help="only measure this one in this process and print it")
    args = parser.parse_args()
    if args.quick:
        args.layers, args.tokens = 2, 16
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.case is not None:
        print(json.dumps(measure(args, *CASES[args.case])))
        return
    # before the run: a commit made meanwhile is not what was measured
    found = environment(args.threads)
    found["versions"]["bitsandbytes"] = bitsandbytes.__version__
    start = time.perf_counter()
    cases = []
    for number, (weights, optimizer) in enumerate(CASES):
        command = [sys.executable, *sys.argv, "--case", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        cases.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"{weights}, {optimizer}: peak {cases[-1]['peak_bytes'] / 1e6:.1f} MB", flush=True)
    record = {
        "quick": args.quick,
        "config": {key: value for key, value in vars(args).items() if key != "case"},
        "seed": args.seed,
        **found,
        "wall_seconds": round(time.perf_counter() - start, 1),
        "cases": cases,
    }
    print(f"{record['wall_seconds']} s, written to {write_result('four_bit_memory', record)}")


if __name__ == "__main__":
    main()
