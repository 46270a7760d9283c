"""Writes upcycled models as the MoE models of Hugging Face: Mixtral, Qwen3-MoE, ..., or as they are, for AutoModel."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from lightning_moe.auto_model import MODEL_TYPE, as_upcycled
from lightning_moe.calibration import difference, evaluating
from lightning_moe.checks import check_free
from lightning_moe.description import dense_form
from lightning_moe.export_card import Exported, model_card
from lightning_moe.export_dense import equal_experts
from lightning_moe.export_gates import Gate, Upcycled, read_gate
from lightning_moe.export_targets import EXPORT_TARGETS, ExportTarget
from lightning_moe.ffn import FFNFamily
from lightning_moe.layer import MoELayer, moe_layers
from lightning_moe.quantization import four_bit_weights
from lightning_moe.routing import unobserved

_PLACE = re.compile(r"model\.layers\.(\d+)\.mlp")
_OWN_FORMAT = (
    f'target="{MODEL_TYPE}" writes it as it is, for transformers where lightning_moe is installed; save_moe(model, '
    "path) for load_moe."
)
# of the largest logit, or of 1 where that is larger
_EXACT = 1e-4


def export_to_hf(
    model: PreTrainedModel,
    path: str | Path,
    *,
    target: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: Mapping[str, Any] | None = None,
    family: FFNFamily | None = None,
    dense_as_experts: bool = False,
) -> Exported:
    """Writes an upcycled model as a native Hugging Face MoE model, which loads and is served without this package.

    The directory holds safetensors with one tensor per expert, as the architecture's own checkpoints do, the
    configuration, the generation configuration, the tokenizer if given, and a model card. Before anything is written
    the logits of both models are compared. Weights are shared with the model, so that little memory is needed.

    With ``target="lightning_moe"`` a model of any class of transformers is written as it is. The auto classes of
    transformers load it where this package is installed; ``config.json`` names the code.

    Args:
        model: an upcycled causal language model; for ``target="lightning_moe"`` any upcycled model of transformers.
        path: the directory to write, which must be empty or not exist.
        target: the architecture, by its ``model_type`` (see `EXPORT_TARGETS`); None takes the first that holds it.
        tokenizer: written beside the model.
        facts: of the run, for the model card, such as ``{"tokens": "2 billion"}``.
        family: the family it was upcycled with, if that is none of `FFN_FAMILIES`; for ``target="lightning_moe"``.
        dense_as_experts: whether blocks that are dense still are written as experts that are all alike, for an
            architecture that has no dense blocks. The model computes the same; each of these blocks takes E times the
            memory, and K times the time.

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
    layers = _layers(model)
    if target == MODEL_TYPE:
        made, apart = as_upcycled(model, family), 0.0
    else:
        found = _read(model, layers)
        if dense_as_experts and found.dense:
            found = equal_experts(model, found)
        row = _choose(found, target)
        target, made = row.target, _build(model, row, found)
        apart = _measured(model, made)
    directory.mkdir(parents=True, exist_ok=True)
    made.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    parameters = sum(parameter.numel() for parameter in made.parameters())
    exported = Exported(target, type(made).__name__, parameters, apart)
    (directory / "README.md").write_text(model_card(model, layers, exported, facts or {}), encoding="utf-8")
    return exported


def _layers(model: Any) -> dict[str, MoELayer]:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model: {type(model).__name__} is no model of transformers. Give the model itself, as module.model."
        )
    layers = moe_layers(model)
    name = type(model).__name__
    if not layers:
        raise ValueError(f"{name} has no MoE layer to export; call upcycle(model, config) first.")
    if four_bit_weights(model):
        raise ValueError(
            f"{name} is in 4 bit, and a native model is written in full precision. Call dequantize(model) first; what "
            "was rounded stays rounded."
        )
    for place, layer in layers.items():
        if any(tensor.is_meta for tensor in layer.state_dict().values()):
            raise ValueError(f"{name}: {place} is on the meta device and has no weights to export.")
    return layers


def _read(model: PreTrainedModel, layers: Mapping[str, MoELayer]) -> Upcycled:
    dense_class, config = dense_form(model)
    name = dense_class.__name__
    known = sorted({source for row in EXPORT_TARGETS for source in row.sources})
    if config.model_type not in known:
        raise ValueError(
            f"{name}: no MoE architecture of transformers is known to hold an upcycled {config.model_type} "
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
    dense = tuple(number for number in range(config.num_hidden_layers) if number not in numbered)
    return Upcycled(config, gates, dict(sorted(numbered.items())), dense)


def _gate_of(name: str, number: int, layer: MoELayer) -> Gate:
    place = f"{name}, block {number}"
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
                f"target={target!r}: a {source} goes to {' or '.join(row.target for row in rows)}, or to {MODEL_TYPE}."
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
