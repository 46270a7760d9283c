"""Measures what `ExpertUtilizationCallback` costs, as a share of the CPU time of training with it.

The demo's model and data: SmolLM2-135M with ten MoE layers of four experts, 4 x 256 tokens a step, TensorBoard, a log
every ten steps. Every call into the callback is timed (counting in the forward, looking at the routers, logging), in
CPU seconds of the process, all threads; the share is of the same run, so that a noisy machine slows both. Pictures
come once in a hundred steps and fall outside.
"""

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from common import ROOT, environment, write_result
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim import AdamW

from lightning_moe import ExpertUtilizationCallback, MoEModule, MoEUpcycleCallback, TextDataModule, UpcycleConfig

CACHE = ROOT.parent / "examples" / ".cache"
WARMUP = 10


class Timed(ExpertUtilizationCallback):
    """The callback, with a stopwatch on each way into it.

    Args:
        options: of the callback.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inside = 0.0
        self.whole = 0.0
        self.steps = 0
        self._began = 0.0
        for name in ("on_train_batch_start", "on_train_batch_end", "_observe"):
            setattr(self, name, self._timed(getattr(self, name)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts a stopwatch on the look at the routers too."""
        super().on_fit_start(trainer, pl_module)
        self._probe.detach()
        self._probe._look = self._timed(self._probe._look)
        self._probe.attach()

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Begins to count behind the first steps, which allocate."""
        if trainer.global_step == WARMUP and not self._began:
            self.inside, self._began = 0.0, time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops."""
        self.whole, self.steps = time.process_time() - self._began, trainer.global_step - WARMUP

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside += time.process_time() - start

        return call


def measure(steps: int, every: int) -> dict[str, float]:
    """Trains and returns the share, and what it is a share of."""
    seed_everything(0)
    data = TextDataModule(
        tokenizer=str(CACHE / "smollm2"),
        separator="<|endoftext|>",
        data_files={"prose": str(CACHE / "prose" / "*.txt"), "code": str(CACHE / "code.jsonl")},
        block_size=256,
        batch_size=4,
        val_fraction=0.1,
        cache_dir=str(CACHE / "blocks"),
    )
    timed = Timed()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=WARMUP + steps,
            limit_val_batches=0,
            log_every_n_steps=every,
            gradient_clip_val=1.0,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[MoEUpcycleCallback(UpcycleConfig(num_experts=4, layers="2::3")), timed],
            logger=TensorBoardLogger(folder),
        )
        trainer.fit(MoEModule(str(CACHE / "smollm2"), optimizer=partial(AdamW, lr=1e-4, fused=True)), data)
    return {
        "share": timed.inside / timed.whole,
        "milliseconds_per_step": 1000 * timed.inside / timed.steps,
        "cpu_seconds_per_step": timed.whole / timed.steps,
        "steps": timed.steps,
    }


def main() -> None:
    """Measures and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps, behind ten of warming up (default: %(default)s)")
    parser.add_argument("--every", type=int, default=10, help="steps from log to log (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one step: does it run?")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    start = time.time()
    found = measure(1 if args.quick else args.steps, args.every)
    print(f"monitoring: {100 * found['share']:.2f} % of the CPU time, {found['milliseconds_per_step']:.1f} ms a step")
    config = {"log_every_n_steps": args.every, "warmup": WARMUP, "tokens_per_step": 1024, "rounds": 1}
    record = {"config": config, "quick": args.quick, "seed": 0, **environment(torch.get_num_threads()), "case": found}
    print(write_result("monitoring", {**record, "wall_seconds": round(time.time() - start, 1)}))


if __name__ == "__main__":
    main()
