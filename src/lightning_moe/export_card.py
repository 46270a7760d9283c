"""What an export tells of itself: to the caller, and on the model card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from lightning_moe.__about__ import __version__
from lightning_moe.auto_model import MODEL_TYPE, auto_classes
from lightning_moe.description import dense_form
from lightning_moe.layer import MoELayer
from lightning_moe.low_rank import LowRankExperts


@dataclass(frozen=True)
class Exported:
    """What `export_to_hf` wrote.

    Args:
        target: the ``model_type``.
        class_name: transformers' class.
        num_parameters: of the model that was written.
        measured_difference: the largest difference of a logit between both models, on 32 random tokens; 0 where the
            model was written as it is.
    """

    target: str
    class_name: str
    num_parameters: int
    measured_difference: float

    def __str__(self) -> str:
        """One line."""
        told = (
            "the model as it is."
            if self.target == MODEL_TYPE
            else f"its logits differ from ours by {self.measured_difference:.1e} at most, on 32 random tokens."
        )
        return f"{self.class_name}, {self.num_parameters / 1e6:,.1f} M parameters; {told}"


def model_card(
    model: PreTrainedModel, layers: Mapping[str, MoELayer], exported: Exported, facts: Mapping[str, Any]
) -> str:
    """The text of the ``README.md`` beside an exported model.

    Args:
        model: what was exported.
        layers: its MoE layers, by name; the card describes the first.
        exported: what was written.
        facts: of the run, one row each.
    """
    layer = next(iter(layers.values()))
    dense_class, config = dense_form(model)
    autos = [auto.__name__ for auto in auto_classes(dense_class)]
    blocks = getattr(config, "num_hidden_layers", None)
    rows: Sequence[tuple[str, Any]] = (
        ("upcycled from", dense_class.__name__ + ("" if blocks is None else f", {blocks} blocks")),
        ("MoE blocks", len(layers)),
        ("experts", _experts(layer, exported)),
        ("shared experts", 0 if layer.shared_experts is None else layer.shared_experts.num_experts),
        ("router", type(layer.router).__name__),
        ("parameters", f"{exported.num_parameters:,}"),
        ("largest difference of a logit to the model it was exported from", f"{exported.measured_difference:.1e}"),
        *facts.items(),
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    task = "pipeline_tag: text-generation\n" if "AutoModelForCausalLM" in autos else ""
    return (
        f"---\nlibrary_name: transformers\n{task}tags:\n- moe\n- lightning-moe\n---\n\n"
        f"# {exported.class_name}, upcycled\n\nThe FFNs of a dense model became Mixture-of-Experts layers, by "
        f"lightning-moe {__version__}. {_loading(autos[0], exported)}\n\n| | |\n|---|---|\n{table}\n"
    )


def _experts(layer: MoELayer, exported: Exported) -> str:
    experts = layer.experts
    number = str(layer.num_experts)
    if isinstance(experts, LowRankExperts):
        number += f" (of rank {experts.rank}{'' if exported.target == MODEL_TYPE else ', written out'})"
    return f"{number}, {layer.router.experts_per_token:g} per token, width {experts.expert_size}"


def _loading(auto: str, exported: Exported) -> str:
    if exported.target != MODEL_TYPE:
        return "It loads with plain transformers: `AutoModelForCausalLM.from_pretrained(...)`."
    return (
        f"Its code is in the package `lightning-moe`. Where that is installed `{auto}.from_pretrained(..., "
        "trust_remote_code=True)` loads it; after `import lightning_moe` no trust is asked for."
    )
