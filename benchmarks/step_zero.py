"""Step 0 on the real model: SmolLM2-135M with every FFN upcycled, beside the dense model, on prose and code.

Run `python examples/prepare.py` first. Prints the largest logit difference over 512 tokens of each domain, in float32,
and whether 40 greedily generated tokens are the same.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_moe import TopKRouter, UpcycleConfig, upcycle

CACHE = Path(__file__).parent.parent / "examples" / ".cache"


def main() -> None:
    """Compares the two models."""
    tokenizer = AutoTokenizer.from_pretrained(CACHE / "smollm2")
    model: Any = AutoModelForCausalLM.from_pretrained(CACHE / "smollm2", dtype="float32")
    texts = {
        "prose": (CACHE / "prose" / "assignment.txt").read_text(),
        "code": json.loads((CACHE / "code.jsonl").read_text().splitlines()[0])["text"],
    }
    batches = {name: tokenizer(text, return_tensors="pt").input_ids[:, :512] for name, text in texts.items()}
    prompt = tokenizer("The difference between a list and a tuple is", return_tensors="pt")

    def outputs() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        with torch.no_grad():
            logits = {name: model(input_ids=ids).logits for name, ids in batches.items()}
            return logits, model.generate(**prompt, max_new_tokens=40, do_sample=False)

    dense_logits, dense_text = outputs()
    print(upcycle(model, UpcycleConfig(num_experts=8, router=partial(TopKRouter, top_k=2))))
    moe_logits, moe_text = outputs()
    for name, logits in moe_logits.items():
        print(
            f"{name}: max |logit difference| over {logits.shape[1]} tokens: "
            f"{(logits - dense_logits[name]).abs().max():.1e}"
        )
    print(f"greedy text: {'equal' if torch.equal(dense_text, moe_text) else 'DIFFERENT'}")
    print(repr(tokenizer.decode(moe_text[0], skip_special_tokens=True)))


if __name__ == "__main__":
    main()
