"""A real BERT encoder as a Mixture of Experts: sentence similarities at step 0 are those of the dense model.

all-MiniLM-L6-v2 is upcycled with every initialiser that promises to keep the dense model, and compared with it.
"""

import copy
from typing import Any

import torch
from prepare import CACHE, prepare_encoder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from lightning_moe import GranularInit, LowRankInit, UpcycleConfig, ZeroOutputInit, upcycle

SENTENCES = [
    "A cat sits on the mat.",
    "A kitten rests on a rug.",
    "Stocks fell sharply on Monday.",
    "The market dropped at the start of the week.",
    "He plays the violin.",
    "A musician performs on a string instrument.",
]
CONFIGS = {
    "copy": UpcycleConfig(num_experts=8, seed=0),
    "copy, one shared": UpcycleConfig(num_experts=8, seed=0, num_shared_experts=1),
    "granular": UpcycleConfig(num_experts=8, seed=0, init=GranularInit(2)),
    "zero output": UpcycleConfig(num_experts=8, seed=0, init=ZeroOutputInit(), num_shared_experts=1),
    "low rank": UpcycleConfig(num_experts=8, seed=0, init=LowRankInit(8)),
}


@torch.no_grad()
def similarities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cosines of the mean-pooled sentences, as the encoder was trained for."""
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    return pooled @ pooled.T


def main() -> None:
    """Upcycles the encoder in every way and prints how far its similarities are from the dense ones."""
    prepare_encoder(CACHE / "minilm")
    tokenizer = AutoTokenizer.from_pretrained(CACHE / "minilm")
    dense: Any = AutoModel.from_pretrained(CACHE / "minilm").eval()
    batch = dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    wanted = similarities(dense, batch)
    print(f"cat and kitten {wanted[0, 1]:.2f}, cat and stocks {wanted[0, 2]:.2f}")
    for name, config in CONFIGS.items():
        moe = copy.deepcopy(dense)
        receipt = upcycle(moe, config, batch=batch)
        difference = float((similarities(moe, batch) - wanted).abs().max())
        before, after = (number / 1e6 for number in receipt.parameters)
        print(f"{name:<17} {before:.1f} M -> {after:6.1f} M parameters, similarities differ by {difference:.1e}")
        if not receipt.preserved or difference > 1e-5:
            raise SystemExit(f"{name}: not the dense model.\n{receipt}")


if __name__ == "__main__":
    main()
