"""Texts of two domains, a tiny model that learns to tell them apart, and what an analysis of it finds."""

import functools
from functools import partial

import pytest
import torch
from lightning_fixtures import VOCABULARY, tiny_llama, word_tokenizer

from lightning_moe import NoiseInit, TopKRouter, UpcycleConfig, analyze, upcycle
from lightning_moe.analysis.texts import domain_batches

E, K, LENGTH = 4, 2, 12
SIZES = {"num_tokens": 360, "sequence_length": LENGTH, "batch_size": 4, "min_count": 4}
# torchmetrics computes in float32; the loops in Python's floats
CLOSE = partial(pytest.approx, rel=1e-5, abs=1e-6)


def texts(domain, count=40, seed=0):
    """Documents of words that the other domain does not have; each word follows from the one before."""
    first, last = {"prose": (1, 18), "code": (18, VOCABULARY)}[domain]
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for start in torch.randint(first, last, (count,), generator=generator).tolist():
        words = [start]
        for jump in torch.randint(1, 4, (15,), generator=generator).tolist():
            words.append(first + (words[-1] - first + jump) % (last - first))
        documents.append(" ".join(f"w{word}" for word in words))
    return documents


DATA = {"prose": texts("prose"), "code": texts("code")}


PLAIN = partial(TopKRouter, top_k=K, normalize="straight_through", init_std=0.3)


def moe(seed=0, router=PLAIN, **changes):
    model = tiny_llama(seed, **changes)
    upcycle(model, UpcycleConfig(num_experts=E, router=router, init=NoiseInit(), seed=seed))
    return model


def batches_of(data=DATA):
    return domain_batches(
        data, word_tokenizer(), num_tokens=360, sequence_length=LENGTH, batch_size=4, separator="<eos>"
    )


@functools.cache
def trained(steps):
    model = moe().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    blocks = torch.cat([batch.input_ids for batch in batches_of()])
    for step in range(steps):
        ids = blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(step))[:16]]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@functools.cache
def analysis():
    """Of the trained model alone, with studies."""
    return analyze(trained(60), word_tokenizer(), data=DATA, name="tiny", **SIZES)


@functools.cache
def analysis_of_series():
    """Of three checkpoints, without studies."""
    earlier = ((f"step {steps}", trained(steps)) for steps in (0, 10))
    return analyze(trained(60), word_tokenizer(), data=DATA, earlier=earlier, name="step 60", studies=False, **SIZES)
