"""Writes the tables of plan.md from the planner: ``python docs/plan_tables.py``. It takes about a minute."""

from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from lightning_moe import TopKRouter, UpcycleConfig, plan_training, upcycle

PAGE = Path(__file__).parent / "plan.md"
START, END = "<!-- tables -->\n", "<!-- end of tables -->"
# as their configurations on the Hub have it
MODELS: dict[str, PreTrainedConfig] = {
    "SmolLM2-135M": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-7B": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    ),
    "Llama-3-8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    ),
}


def table(config: PreTrainedConfig) -> str:
    """What the upcycled model takes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    upcycle(model, UpcycleConfig(num_experts=8, router=partial(TopKRouter, top_k=2)))
    return str(
        plan_training(
            model,
            gpus=8,
            precision="bf16-true",
            activation_checkpointing=True,
            sequence_length=4096,
            expert_parallel_size=8,
        )
    )


def main() -> None:
    """Replaces what stands between the two marks."""
    text = PAGE.read_text("utf-8")
    tables = "".join(f"\n### {name}\n\n{table(config)}\n" for name, config in MODELS.items())
    before, _, rest = text.partition(START)
    PAGE.write_text(f"{before}{START}{tables}\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
