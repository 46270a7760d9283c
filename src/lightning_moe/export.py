"""Writes upcycled models as the MoE models of Hugging Face, which load without this package: Mixtral, Qwen3-MoE, ..."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from lightning_moe.__about__ import __version__
from lightning_moe.calibration import difference, evaluating
from lightning_moe.checks import check_free
from lightning_moe.export_gates import Gate, Upcycled, read_gate
from lightning_moe.export_targets import EXPORT_TARGETS, ExportTarget
from lightning_moe.layer import MoELayer, moe_layers
from lightning_moe.low_rank import LowRankExperts
from lightning_moe.routing import unobserved

_PLACE = re.compile(r"model\.layers\.(\d+)\.mlp")
_OWN_FORMAT = "save_moe(model, path) writes it in a format of our own, which load_moe reads."
# of the largest logit, or of 1 where that is larger
_EXACT = 1e-4


@dataclass(frozen=True)
class Exported:
    """What `export_to_hf` wrote.

    Args:
        target: the ``model_type``.
        class_name: transformers' class.
        num_parameters: of the model that was written.
        measured_difference: the largest difference of a logit between both models, on 32 random tokens.
    """

    target: str
    class_name: str
    num_parameters: int
    measured_difference: float

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.class_name}, {self.num_parameters / 1e6:,.1f} M parameters; its logits differ from ours by "
            f"{self.measured_difference:.1e} at most, on 32 random tokens."
        )


def export_to_hf(
    model: PreTrainedModel,
    path: str | Path,
    *,
    target: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Exported:
    """Writes an upcycled model as a native Hugging Face MoE model, which loads and is served without this package.

    The directory holds safetensors with one tensor per expert, as the architecture's own checkpoints do, the
    configuration, the generation configuration, the tokenizer if given, and a model card. Before anything is written
    the logits of both models are compared. Weights are shared with the model, so that little memory is needed.

    Args:
        model: an upcycled causal language model.
        path: the directory to write, which must be empty or not exist.
        target: the architecture, by its ``model_type`` (see `EXPORT_TARGETS`); None takes the first that holds it.
        tokenizer: written beside the model.
        facts: of the run, for the model card, such as ``{"tokens": "2 billion"}``.

    Raises:
        TypeError: if this is no causal language model of transformers.
        FileExistsError: if the directory to write holds something.
        ValueError: if no architecture holds the model exactly, with the reasons.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_moe import UpcycleConfig, upcycle
        >>> config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=2, vocab_size=5, bos_token_id=None, eos_token_id=None)
        >>> model = LlamaForCausalLM(config)
        >>> receipt = upcycle(model, UpcycleConfig(num_experts=4))
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     export_to_hf(model, path).class_name
        'MixtralForCausalLM'
    """
    directory = Path(path).expanduser()
    check_free("path", path)
    found = _read(model)
    row = _choose(found, target)
    native = _build(model, row, found)
    apart = _measured(model, native)
    directory.mkdir(parents=True, exist_ok=True)
    native.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    parameters = sum(parameter.numel() for parameter in native.parameters())
    exported = Exported(row.target, type(native).__name__, parameters, apart)
    (directory / "README.md").write_text(_card(model, found, exported, facts or {}), encoding="utf-8")
    return exported


def _read(model: Any) -> Upcycled:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: {type(model).__name__} is no model of transformers. Give the model itself, as module.model."
        )
    layers = moe_layers(model)
    name = type(model).__name__
    if not layers:
        raise ValueError(f"{name} has no MoE layer to export; call upcycle(model, config) first.")
    known = sorted({source for row in EXPORT_TARGETS for source in row.sources})
    if model.config.model_type not in known:
        raise ValueError(
            f"{name}: no MoE architecture of transformers is known to hold an upcycled {model.config.model_type} "
            f"exactly; it is known of {', '.join(known)}. {_OWN_FORMAT}"
        )
    if not name.endswith("ForCausalLM"):
        raise TypeError(f"model: {name} is no causal language model. {_OWN_FORMAT}")
    places = {place: _PLACE.fullmatch(place) for place in layers}
    if foreign := [place for place, match in places.items() if match is None]:
        raise ValueError(f"{name}: {foreign[0]} is not the FFN of a decoder block. {_OWN_FORMAT}")
    numbered = {int(match[1]): layers[place] for place, match in places.items() if match is not None}
    gates = {number: _gate_of(name, number, layer) for number, layer in sorted(numbered.items())}
    _check_alike(name, numbered, gates)
    dense = tuple(number for number in range(model.config.num_hidden_layers) if number not in numbered)
    return Upcycled(model.config, gates, dict(sorted(numbered.items())), dense)


def _gate_of(name: str, number: int, layer: MoELayer) -> Gate:
    place = f"{name}, block {number}"
    if any(tensor.is_meta for tensor in layer.state_dict().values()):
        raise ValueError(f"{place} is on the meta device and has no weights to export.")
    gate = read_gate(layer.router)
    if gate is None:
        raise ValueError(
            f"{place}: no MoE architecture of transformers routes as {type(layer.router).__name__} does. TopKRouter, "
            f"SigmoidRouter and LossFreeRouter without groups have a native home. {_OWN_FORMAT}"
        )
    for experts in (layer.experts, layer.shared_experts):
        if experts is not None and (not experts.gated or experts.up_bias or experts.down_bias):
            kind = "biases, and those of the known architectures none"
            if not experts.gated:
                kind = "no gate, and those of the known architectures one"
            raise ValueError(f"{place}: its experts have {kind}. {_OWN_FORMAT}")
    return gate


def _check_alike(name: str, layers: Mapping[int, MoELayer], gates: Mapping[int, Gate]) -> None:
    def settings(number: int) -> dict[str, Any]:
        layer, gate, shared = layers[number], gates[number], layers[number].shared_experts
        return {
            "router": gate.kind,
            "num_experts": layer.num_experts,
            "top_k": gate.top_k,
            "normalize": gate.normalize,
            "routed_scaling": gate.scaling,
            "expert_size": layer.experts.expert_size,
            "num_shared_experts": 0 if shared is None else shared.num_experts,
        }

    first = next(iter(gates))
    for number in gates:
        for key, value in settings(number).items():
            if value != settings(first)[key]:
                raise ValueError(
                    f"{name}: {key} is {settings(first)[key]} in block {first} and {value} in block {number}, and the "
                    f"known architectures have one for all blocks. {_OWN_FORMAT}"
                )


def _choose(found: Upcycled, target: str | None) -> ExportTarget:
    source = found.config.model_type
    rows = [row for row in EXPORT_TARGETS if source in row.sources]
    if target is not None:
        named = [row for row in rows if row.target == target]
        if not named:
            raise ValueError(
                f"target={target!r}: a {source} goes to {' or '.join(row.target for row in rows)}. {_OWN_FORMAT}"
            )
        rows = named
    refused = {row.target: row.refuses(found) for row in rows}
    for row in rows:
        if not refused[row.target]:
            return row
    reasons = "; ".join(f"{name}: {', '.join(why)}" for name, why in refused.items())
    raise ValueError(f"No MoE architecture of transformers holds this {source} exactly. {reasons}. {_OWN_FORMAT}")


@torch.no_grad()
def _build(model: PreTrainedModel, row: ExportTarget, found: Upcycled) -> PreTrainedModel:
    known = transformers.AutoConfig.for_model(row.target).to_dict()
    ours = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "auto_map", "_name_or_path"}
    same = {key: value for key, value in found.config.to_dict().items() if key in known and key not in ours}
    config = transformers.AutoConfig.for_model(row.target, **{**same, **row.settings(found)})
    with no_init_weights():
        # Its weights are never touched: those of the model take their places. And its grouped GEMM, which does not take
        # every width, is not needed to compare.
        native: Any = transformers.AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, experts_implementation="eager"
        )
    state = row.state(found, {key: tensor.detach() for key, tensor in model.state_dict().items()})
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    try:
        result = native.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{type(native).__name__} does not hold {type(model).__name__}: {error}") from error
    native.tie_weights()
    missing = [key for key in result.missing_keys if not (key == "lm_head.weight" and config.tie_word_embeddings)]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"{type(native).__name__} does not hold {type(model).__name__}: it would miss {missing[:3]} and has no "
            f"place for {list(result.unexpected_keys)[:3]}. {_OWN_FORMAT}"
        )
    if model.generation_config is not None:
        native.generation_config = model.generation_config
    made: PreTrainedModel = native.to(model.device).eval()
    return made


@torch.no_grad()
def _measured(model: PreTrainedModel, native: PreTrainedModel) -> float:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=generator).to(model.device)
    with unobserved(), evaluating(model):
        ours, theirs = model(input_ids=ids).logits, native(input_ids=ids).logits
    apart = difference(ours, theirs)
    # in half precision theirs routes in half precision too, and two close experts may change places
    if model.dtype == torch.float32 and not apart <= _EXACT * max(1.0, float(ours.abs().max())):
        raise ValueError(
            f"{type(native).__name__} would not be this {type(model).__name__}: a logit differs by {apart:.1e}. "
            f"Nothing was written. {_OWN_FORMAT}"
        )
    return apart


def _card(model: PreTrainedModel, found: Upcycled, exported: Exported, facts: Mapping[str, Any]) -> str:
    layer = found.layer
    low_rank = f" (of rank {layer.experts.rank}, written out)" if isinstance(layer.experts, LowRankExperts) else ""
    rows: Sequence[tuple[str, Any]] = (
        ("upcycled from", f"{type(model).__name__}, {found.config.num_hidden_layers} blocks"),
        ("MoE blocks", len(found.layers)),
        ("experts", f"{layer.num_experts}{low_rank}, {found.gate.top_k} per token, width {layer.experts.expert_size}"),
        ("shared experts", found.num_shared),
        ("router", type(layer.router).__name__),
        ("parameters", f"{exported.num_parameters:,}"),
        ("largest difference of a logit to the model it was exported from", f"{exported.measured_difference:.1e}"),
        *facts.items(),
    )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- moe\n- lightning-moe\n---\n\n"
        f"# {exported.class_name}, upcycled\n\nThe FFNs of a dense model became Mixture-of-Experts layers, by "
        f"lightning-moe {__version__}. It loads with plain transformers: `AutoModelForCausalLM.from_pretrained(...)`."
        f"\n\n| | |\n|---|---|\n{table}\n"
    )
