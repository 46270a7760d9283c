"""Holds the planner's memory against the peak that training really has, on small Llamas upcycled to experts.

Each case is trained for three steps by a `Trainer` in a process of its own, on the CPU. Measured is the highest
resident set (VmHWM) above what the process held after its imports and a first, tiny run. The C library gives freed
blocks back (``MALLOC_...``), and oneDNN keeps no primitives and uses none of its bfloat16 kernels: their scratch memory
on the CPU, which no GPU has, is as large as the activations. ``--onednn`` leaves it as it is.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import environment, write_result
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_moe import LowRankInit, MoEModule, TopKRouter, UpcycleConfig, moe_layers, plan_training, upcycle

FREED_GOES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
PLAIN_ONEDNN = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@dataclass(frozen=True)
class Case:
    """One model and how it is trained.

    Args:
        hidden_size: D.
        ffn_size: width of the dense FFN.
        num_layers: blocks.
        vocab_size: words.
        num_experts: E; two for each token.
        batch_size: B.
        sequence_length: S.
        precision: of the Trainer.
        checkpointing: whether activations are recomputed.
        rank: of low-rank experts on a frozen dense model; 0 for ordinary experts, and all trains.
    """

    hidden_size: int = 384
    ffn_size: int = 1024
    num_layers: int = 4
    vocab_size: int = 4000
    num_experts: int = 8
    batch_size: int = 4
    sequence_length: int = 512
    precision: str = "32-true"
    checkpointing: bool = False
    rank: int = 0


CASES = {
    "float32": Case(),
    "float32, checkpointing": Case(256, 512, 6, num_experts=4, batch_size=3, sequence_length=1536, checkpointing=True),
    "float32, low rank, dense frozen": Case(sequence_length=768, rank=16),
    "bf16-true": Case(precision="bf16-true"),
    "bf16-mixed": Case(precision="bf16-mixed"),
}
# as large as the tests can wait for
SMALL = {
    "float32": Case(256, 512, 2, 2000, 8, 4, 256),
    "float32, checkpointing": Case(256, 256, 4, 2000, 2, 2, 1024, checkpointing=True),
    "float32, low rank, dense frozen": Case(256, 512, 2, 2000, 4, 4, 512, rank=8),
}


def build(case: Case) -> LlamaForCausalLM:
    """Makes the upcycled model, on whatever device is the default."""
    config = LlamaConfig(
        hidden_size=case.hidden_size,
        intermediate_size=case.ffn_size,
        num_hidden_layers=case.num_layers,
        num_attention_heads=case.hidden_size // 32,
        num_key_value_heads=case.hidden_size // 64,
        vocab_size=case.vocab_size,
        bos_token_id=None,
        eos_token_id=None,
        dtype=torch.bfloat16 if case.precision == "bf16-true" else torch.float32,
    )
    model: LlamaForCausalLM = LlamaForCausalLM._from_config(config)
    init = LowRankInit(case.rank) if case.rank else None
    router = partial(TopKRouter, top_k=2)
    upcycle(model, UpcycleConfig(num_experts=case.num_experts, router=router, init=init))
    if case.rank:
        trained = [p for layer in moe_layers(model).values() for p in layer.parameters() if p.requires_grad]
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
    return model


def planned(case: Case) -> dict[str, Any]:
    """What the planner says of a single device, from shapes alone."""
    with torch.device("meta"):
        model = build(case)
    row = plan_training(
        model,
        precision=case.precision,  # type: ignore[arg-type]
        activation_checkpointing=case.checkpointing,
        batch_size=case.batch_size,
        sequence_length=case.sequence_length,
    ).memory[0]
    return {**asdict(row), "total": row.total}


def train(case: Case) -> None:
    """Three steps."""
    module = MoEModule(build(case), gradient_checkpointing=case.checkpointing)
    ids = torch.randint(0, case.vocab_size, (3 * case.batch_size, case.sequence_length))
    data = DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=case.batch_size)  # type: ignore[arg-type, var-annotated]
    Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision=case.precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)


def measured(case: Case) -> int:
    """The peak in this process above the baseline, in bytes."""
    torch.set_num_threads(1)
    tiny = Case(64, 128, 1, 101, 2, 1, 16, case.precision, case.checkpointing, case.rank)
    train(tiny)
    gc.collect()
    # the peak is to be that of what follows
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    train(case)
    return _status("VmHWM") - before


def measured_apart(*cases: Case, onednn: bool = False) -> list[int]:
    """`measured`, one after the other in a process of their own."""
    settings = {**os.environ, **FREED_GOES_BACK, **({} if onednn else PLAIN_ONEDNN)}
    command = [sys.executable, __file__, "--measure", json.dumps([asdict(case) for case in cases])]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return [int(peak) for peak in done.stdout.splitlines()[-len(cases) :]]


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; this benchmark needs Linux.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the three small cases of the tests")
    parser.add_argument("--onednn", action="store_true", help="with oneDNN's caches and bfloat16 kernels")
    parser.add_argument(
        "--measure", type=json.loads, help="only measure these cases in this process and print the bytes"
    )
    options = parser.parse_args()
    if options.measure is not None:
        for case in options.measure:
            print(measured(Case(**case)), flush=True)
        return
    found, start, cases = environment(1), time.time(), []
    for name, case in (SMALL if options.quick else CASES).items():
        plan, (peak,) = planned(case), measured_apart(case, onednn=options.onednn)
        ratio = round(plan["total"] / peak, 4)
        cases.append({"name": name, **asdict(case), "planned": plan, "measured": peak, "planned_over_measured": ratio})
        print(f"{name}: planned {plan['total'] / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB, {ratio:.3f}", flush=True)
    record = {
        **found,
        "quick": options.quick,
        "seed": None,
        "config": {"onednn": options.onednn, **FREED_GOES_BACK, **({} if options.onednn else PLAIN_ONEDNN)},
        "cases": cases,
        "wall_seconds": round(time.time() - start, 1),
    }
    print(write_result("memory", record))


if __name__ == "__main__":
    main()
