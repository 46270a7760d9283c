"""One row per algorithm: a new one adds its row here and meets every property in the tests.

`test_*_have_rows` fail if a catalogue of the package has an entry without a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import reference
import torch
import transformers
from torch import nn

from lightning_moe import (
    CopyInit,
    DeadExperts,
    ExpertLoad,
    LoadBalancingLoss,
    LoadEntropy,
    MaxViolation,
    Routing,
    RoutingEntropy,
    TopKRouter,
    ZLoss,
)

# --- routers ---


@dataclass(frozen=True)
class RouterRow:
    cls: type
    arguments: dict[str, Any] = field(default_factory=dict)

    def __call__(self, hidden_size, num_experts):
        return self.cls(hidden_size, num_experts, **self.arguments)


ROUTER_ROWS = {
    "top_k": RouterRow(TopKRouter, {"top_k": 2}),
    "top_k_3": RouterRow(TopKRouter, {"top_k": 3, "init_std": 0.5}),
    "top_k_raw": RouterRow(TopKRouter, {"top_k": 2, "normalize": False, "init_std": 0.5}),
    "switch": RouterRow(TopKRouter, {"top_k": 1, "normalize": False, "jitter": 0.1}),
    "top_k_noise": RouterRow(TopKRouter, {"top_k": 2, "jitter": 0.1, "noise_std": 0.5}),
}

# --- losses ---


@dataclass(frozen=True)
class LossRow:
    cls: type
    truth: Callable[[Routing], torch.Tensor]
    measures_balance: bool
    """1 when routing is uniform, E / K when it has collapsed on K experts."""


LOSS_ROWS = {
    "load_balancing_loss": LossRow(LoadBalancingLoss, reference.load_balancing_loss, measures_balance=True),
    "z_loss": LossRow(ZLoss, reference.z_loss, measures_balance=False),
}

# --- metrics ---


@dataclass(frozen=True)
class MetricRow:
    cls: type
    truth: Callable[[list[Routing]], Any]
    takes_num_experts: bool = True

    def __call__(self, num_experts):
        return self.cls(num_experts) if self.takes_num_experts else self.cls()


METRIC_ROWS = {
    "expert_load": MetricRow(ExpertLoad, reference.load),
    "max_violation": MetricRow(MaxViolation, reference.max_violation),
    "dead_experts": MetricRow(DeadExperts, reference.dead_experts),
    "load_entropy": MetricRow(LoadEntropy, reference.load_entropy),
    "routing_entropy": MetricRow(RoutingEntropy, reference.routing_entropy, takes_num_experts=False),
}

# --- initialisers ---

INIT_ROWS = {"copy": CopyInit}

# --- FFN families ---

VOCABULARY = 61
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
GROUPED = {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


class TwoLinear(nn.Module):
    """A user's own FFN."""

    def __init__(self, hidden_size, width, out_size=None):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(width, out_size or hidden_size)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A user's own residual block around any FFN."""

    def __init__(self, ffn, hidden_size=8):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.ffn = ffn

    def forward(self, x):
        return x + self.ffn(self.norm(x))


def sequential_ffn(hidden_size=8, width=12, dropout=0.0):
    ffn = [nn.Linear(hidden_size, width), nn.ReLU(), nn.Linear(width, hidden_size)]
    return nn.Sequential(*ffn, nn.Dropout(dropout)) if dropout else nn.Sequential(*ffn)


def plain_model(make_ffn):
    """Two residual blocks and a head, of no library."""
    return nn.Sequential(nn.Linear(5, 8), Block(make_ffn()), Block(make_ffn()), nn.Linear(8, 3))


def _text_model(model, config, **settings):
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**SPECIAL, **settings)).eval()


def token_ids(batch_size=3, length=7, generator_seed=0):
    """Random token ids; none of them is padding."""
    generator = torch.Generator().manual_seed(generator_seed)
    return torch.randint(2, VOCABULARY, (batch_size, length), generator=generator)


@dataclass(frozen=True)
class FamilyRow:
    family: str
    build: Callable[[], nn.Module]
    names: tuple[str, ...]
    """The FFNs of the model."""
    ffn_parameters: int
    """Of one FFN, by hand: D and F as above."""
    is_text: bool = True
    hidden_size: int = 16

    def batch(self, batch_size=3, length=7):
        """Keyword arguments of the model."""
        if self.is_text:
            return {"input_ids": token_ids(batch_size, length)}
        generator = torch.Generator().manual_seed(0)
        return {"input": torch.randn(batch_size, length, 5, generator=generator)}


def logits(model, batch):
    """The output of a model of the table."""
    out = model(**batch)
    return getattr(out, "logits", out)


_LLAMA = ("model.layers.0.mlp", "model.layers.1.mlp")
FAMILY_ROWS = {
    "llama": FamilyRow("llama", _text_model("LlamaForCausalLM", "LlamaConfig", **GROUPED), _LLAMA, 3 * 16 * 24),
    "llama_biases": FamilyRow(
        "llama",
        _text_model("LlamaForCausalLM", "LlamaConfig", **GROUPED, mlp_bias=True, hidden_act="gelu"),
        _LLAMA,
        3 * 16 * 24 + 2 * 24 + 16,
    ),
    "mistral": FamilyRow("llama", _text_model("MistralForCausalLM", "MistralConfig", **GROUPED), _LLAMA, 3 * 16 * 24),
    "qwen2": FamilyRow(
        "llama",
        _text_model("Qwen2ForCausalLM", "Qwen2Config", **GROUPED, tie_word_embeddings=True),
        _LLAMA,
        3 * 16 * 24,
    ),
    "qwen3": FamilyRow("llama", _text_model("Qwen3ForCausalLM", "Qwen3Config", **GROUPED), _LLAMA, 3 * 16 * 24),
    "phi3": FamilyRow("phi3", _text_model("Phi3ForCausalLM", "Phi3Config", **GROUPED), _LLAMA, 3 * 16 * 24),
    "gpt2": FamilyRow(
        "gpt2",
        _text_model("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_inner=24),
        ("transformer.h.0.mlp", "transformer.h.1.mlp"),
        2 * 16 * 24 + 24 + 16,
    ),
    "gpt_neox": FamilyRow(
        "gpt_neox",
        _text_model("GPTNeoXForCausalLM", "GPTNeoXConfig", **SMALL, num_attention_heads=2, max_position_embeddings=64),
        ("gpt_neox.layers.0.mlp", "gpt_neox.layers.1.mlp"),
        2 * 16 * 24 + 24 + 16,
    ),
    "two_linear": FamilyRow(
        "two_linear",
        lambda: plain_model(lambda: TwoLinear(8, 12)),
        ("1.ffn", "2.ffn"),
        2 * 8 * 12 + 12 + 8,
        is_text=False,
        hidden_size=8,
    ),
    "sequential": FamilyRow(
        "sequential",
        lambda: plain_model(lambda: sequential_ffn(dropout=0.1)).eval(),
        ("1.ffn", "2.ffn"),
        2 * 8 * 12 + 12 + 8,
        is_text=False,
        hidden_size=8,
    ),
}
TEXT_ROWS = {name: row for name, row in FAMILY_ROWS.items() if row.is_text}
