"""The main job from end to end: SmolLM2-135M becomes a Mixture of Experts, trains, is compared with itself, and ships.

`make demo` prepares the model and the corpus and runs this.
"""

import argparse
import json
import resource
import shutil
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from prepare import CACHE, prepare_corpus, prepare_model
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lightning_moe import (
    MoEModule,
    MoEUpcycleCallback,
    TextDataModule,
    TopKRouter,
    UpcycleConfig,
    ZeroShotEvalCallback,
    export_to_hf,
    load_moe,
    save_moe,
)
from lightning_moe.local_tasks import prepare_tasks

PROMPT = "A function is"
TASKS = ["arc_easy", "piqa"]


def greedy(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Continues a prompt by 24 tokens."""
    ids = tokenizer(prompt, return_tensors="pt")
    model.eval()
    out = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


@torch.no_grad()
def logits(model: Any, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Computes the logits of one fixed text."""
    model.eval()
    out: torch.Tensor = model(**tokenizer(PROMPT * 20, return_tensors="pt")).logits
    return out


def table(rows: list[tuple[str, str, str]]) -> str:
    """Sets three columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"  {a:<{widths[0]}}   {b:>{widths[1]}}   {c:>{widths[2]}}".rstrip() for a, b, c in rows]
    rule = "  " + "-" * (sum(widths) + 6)
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--val-batches", type=int, default=8, help="validation batches a domain (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=50, help="of each zero-shot task (default: %(default)s)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*LeafSpec.*|.*isinstance.treespec.*")
    start = time.time()
    prepare_model(CACHE / "smollm2")
    prepare_corpus(CACHE / "prose", CACHE / "code.jsonl")
    prepare_tasks(CACHE / "tasks")
    seed_everything(0)

    tokenizer = AutoTokenizer.from_pretrained(CACHE / "smollm2")
    data = TextDataModule(
        tokenizer=str(CACHE / "smollm2"),
        separator="<|endoftext|>",
        data_files={"prose": str(CACHE / "prose" / "*.txt"), "code": str(CACHE / "code.jsonl")},
        block_size=256,
        batch_size=4,
        val_fraction=0.1,
        cache_dir=str(CACHE / "blocks"),
    )
    module = MoEModule(
        str(CACHE / "smollm2"),
        optimizer=partial(AdamW, lr=1e-4, weight_decay=0.01, fused=True),
        lr_scheduler=partial(OneCycleLR, max_lr=1e-4, total_steps=max(args.steps, 2)),
    )
    upcycling = MoEUpcycleCallback(
        UpcycleConfig(num_experts=4, router=partial(TopKRouter, top_k=2), layers="2::3"),
    )
    zero_shot = ZeroShotEvalCallback(
        TASKS,
        tokenizer=tokenizer,
        include_path=CACHE / "tasks",
        limit=args.documents,
        every_n_epochs=None,
    )
    logger = TensorBoardLogger(CACHE / "logs", name="demo")
    trainer = Trainer(
        accelerator="cpu",
        max_steps=args.steps,
        limit_val_batches=args.val_batches,
        num_sanity_val_steps=0,
        log_every_n_steps=min(5, args.steps),
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[upcycling, zero_shot],
        logger=logger,
    )

    dense_logits, dense_text = logits(module.model, tokenizer), greedy(module.model, tokenizer, PROMPT)
    print("\nUpcycling, and validating before the first step")
    before = trainer.validate(module, data, verbose=False)[0]
    difference = (logits(module.model, tokenizer) - dense_logits).abs().max().item()
    same_text = greedy(module.model, tokenizer, PROMPT) == dense_text
    module.train()

    print(f"\nTraining {args.steps} steps of {data.batch_size * data.block_size} tokens")
    train_start = time.time()
    trainer.fit(module, data)
    first, last = json.loads((Path(logger.log_dir) / "zero_shot.json").read_text())
    seconds = time.time() - train_start - first["seconds"] - last["seconds"]
    print("\nValidating after the last step")
    after = trainer.validate(module, data, verbose=False)[0]

    saved = CACHE / "smollm2-moe"
    save_moe(module.model.eval(), saved)
    tokenizer.save_pretrained(saved)
    reloaded: Any = load_moe(saved)
    same_logits = torch.equal(logits(reloaded, tokenizer), logits(module.model, tokenizer))
    text = greedy(reloaded, tokenizer, PROMPT)

    # a model that whoever serves it loads without this package; its dense blocks become blocks of equal experts
    native = CACHE / "smollm2-mixtral"
    shutil.rmtree(native, ignore_errors=True)
    exported = export_to_hf(reloaded, native, tokenizer=tokenizer, target="mixtral", dense_as_experts=True)
    del reloaded
    native_text = greedy(AutoModelForCausalLM.from_pretrained(native), tokenizer, PROMPT)

    receipt = upcycling.receipt
    assert receipt is not None
    rows = [("", "before", "after"), ("", "dense", "MoE")]
    for name, (old, new) in {"parameters": receipt.parameters, "active per token": receipt.active_parameters}.items():
        rows.append((name, f"{old / 1e6:.1f} M", f"{new / 1e6:.1f} M"))
    for name in data.val_names:
        rows.append(
            (f"validation loss, {name}", f"{before[f'val_loss/{name}']:.3f}", f"{after[f'val_loss/{name}']:.3f}")
        )
    for task in TASKS:
        found = [evaluation["scores"][task] for evaluation in (first, last)]
        dense, moe = (f"{score['acc']:.2f} ± {score['acc_stderr']:.2f}" for score in found)
        rows.append((f"{task}, {args.documents} documents", dense, moe))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print("\n" + table(rows))
    print(
        f"  upcycled layers                 {len(receipt.layers)} of {len(receipt.layers) + len(receipt.kept)}, "
        f"{receipt.num_experts} experts, top-{receipt.experts_per_token:g}"
    )
    print(f"  step 0: max |logit - dense|     {difference:.1e}, greedy text {'equal' if same_text else 'DIFFERENT'}")
    print(f"  training                        {args.steps * data.batch_size * data.block_size / seconds:.0f} tokens/s")
    print(f"  peak memory                     {peak:.1f} GB")
    print(f"  whole demo                      {time.time() - start:.0f} s")
    print(f"  saved and reloaded              {saved}, logits {'equal' if same_logits else 'DIFFERENT'}")
    print(f"  it says                         {text!r}")
    print(f"  exported                        {native}, {exported.class_name} of {exported.num_parameters / 1e6:.1f} M")
    print(
        f"  plain transformers              logits within {exported.measured_difference:.1e}, greedy text "
        f"{'equal' if native_text == text else 'DIFFERENT'}"
    )
    print(f"  logs                            tensorboard --logdir {Path(logger.save_dir)}")


if __name__ == "__main__":
    main()
