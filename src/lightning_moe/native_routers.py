"""The routers of Hugging Face models whose MoE blocks are seen, and how each makes its scores: one table."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

Scores = Callable[[Tensor], Tensor]

_SOFTMAX: tuple[str, ...] = (
    "AriaTextTopKRouter", "DeepseekV2TopkRouter", "Ernie4_5_MoeTopKRouter", "FlexOlmoTopKRouter", "GptOssTopKRouter",
    "GraniteMoeHybridTopKRouter", "GraniteMoeSharedTopKRouter", "GraniteMoeTopKRouter", "JambaTopKRouter",
    "MiniMaxTopKRouter", "Mistral4TopkRouter", "MixtralTopKRouter", "OlmoeTopKRouter", "PhimoeTopKRouter",
    "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter", "Qwen3NextTopKRouter", "Qwen3OmniMoeThinkerTextTopKRouter",
    "Qwen3VLMoeTextTopKRouter", "Qwen3_5MoeTopKRouter",
)  # fmt: skip

_SIGMOID: tuple[str, ...] = (
    "DeepseekV32TopkRouter", "DeepseekV3TopkRouter", "Dots1TopkRouter", "ExaoneMoeTopkRouter", "Glm4MoeLiteTopkRouter",
    "Glm4MoeTopkRouter", "Glm4vMoeTextTopkRouter", "GlmMoeDsaTopkRouter", "HYV3TopKRouter", "KimiLinearTopkRouter",
    "MiMoV2FlashTopkRouter", "MiniMaxM2TopKRouter", "MiniMaxM3VLTopKRouter", "NemotronHTopkRouter",
    "SolarOpenTopkRouter",
)  # fmt: skip


def softmax_scores(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Softmax over all experts."""
    return logits.softmax(-1)


def sigmoid_scores(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Each expert's own sigmoid."""
    return logits.sigmoid()


NATIVE_ROUTERS: dict[str, Scores] = {
    **dict.fromkeys(_SOFTMAX, softmax_scores),
    **dict.fromkeys(_SIGMOID, sigmoid_scores),
}
"""Class name of a router that returns ``(logits, weights, expert_ids)`` to what its scores are; transformers 5.23."""
