"""Runs every analysis of a model over texts of several domains."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lightning_moe.analysis.collect import RoutingCollector
from lightning_moe.analysis.forward import Progress, domain_losses
from lightning_moe.analysis.results import Analysis, LayerAnalysis, Study
from lightning_moe.analysis.series import compare_checkpoints
from lightning_moe.analysis.similarity import add_similarity
from lightning_moe.analysis.studies import UNDISTURBED, run_studies
from lightning_moe.analysis.texts import Batch, domain_batches
from lightning_moe.native import attached, routed_layers, unknown_routers


def analyze(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: Mapping[str, Iterable[str]],
    earlier: Iterable[tuple[str, nn.Module]] = (),
    name: str = "model",
    num_tokens: int = 8192,
    sequence_length: int = 512,
    batch_size: int = 4,
    separator: str | None = None,
    min_count: int = 8,
    studies: bool = True,
    temperatures: Sequence[int | float] = (0.5, 2.0),
    seed: int = 0,
    progress: Progress = lambda batches, what: batches,
) -> Analysis:
    """Looks at how a text model routes: load, specialisation, co-activation, change, and what routing is worth.

    Counts are kept while the batches run, logits are not. The model, its modes and the random state stay as they are.
    The MoE blocks of a Hugging Face model are attached as long as it takes, see `attach_native`.

    Args:
        model: an upcycled text model, one that is MoE already, or another whose MoE layers `record_routing` sees.
        tokenizer: of the model.
        data: the documents of each domain, by the domain's name; read only as far as needed.
        earlier: names and models of checkpoints before this one, oldest first; a generator may load each when asked, so
            that one is in memory at a time beside the model.
        name: what the model is called in the report.
        num_tokens: tokens of each domain to look at, at most.
        sequence_length: tokens per sequence S; never more than the model has positions for.
        batch_size: sequences per batch B.
        separator: token between two documents; None takes the tokenizer's.
        min_count: tokens of an id below which its specialisation does not count.
        studies: whether to measure the loss with other routes too, a pass over the texts for each.
        temperatures: factors of the logits to measure the loss at, > 0.
        seed: of what chance is compared with.
        progress: wraps the batches of each pass over the texts, given with its name.

    Returns:
        The numbers; `write_report` makes a page of them.

    Raises:
        ValueError: if a number is out of range, there is no domain, a domain holds no text, the model has no MoE layer,
            or the checkpoints differ in their layers.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from lightning_moe import UpcycleConfig, upcycle
        >>> backend = Tokenizer(models.WordLevel({"?": 0, "to": 1, "be": 2, "def": 3, "end": 4}, unk_token="?"))
        >>> backend.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=5, bos_token_id=None, eos_token_id=None, **sizes))
        >>> receipt = upcycle(model, UpcycleConfig(num_experts=4))
        >>> texts = {"prose": ["to be to be to be"], "code": ["def end def end"]}
        >>> found = analyze(model, tokenizer, data=texts, studies=False)
        >>> found.tokens, sum(found.layers[0].load)
        ({'prose': 6, 'code': 4}, 20.0)
    """
    _check(
        data,
        temperatures,
        num_tokens=(num_tokens, 2),
        sequence_length=(sequence_length, 2),
        batch_size=(batch_size, 1),
        min_count=(min_count, 1),
    )
    sequence_length = min(sequence_length, _num_positions(model) or sequence_length)
    batches = domain_batches(
        data,
        tokenizer,
        num_tokens=num_tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        separator=separator,
    )
    tokens = {domain: sum(b.input_ids.numel() for b in batches if b.domain == i) for i, domain in enumerate(data)}
    runner = _Runner(batches, list(data), min_count, progress)
    before = [(step, runner.run(one, step, keeps_selections=True)[0].layers) for step, one in earlier]
    collector, losses = runner.run(model, name, keeps_selections=bool(before))
    checkpoints = compare_checkpoints([*before, (name, collector.layers)]) if before else []
    del before
    generator = torch.Generator().manual_seed(seed)
    vocabulary = [(token, str(tokenizer.decode([token]))) for token in collector.token_ids.tolist()]
    layers = [counts.analysis(key, vocabulary, generator) for key, counts in collector.layers.items()]
    skipped = _unmeasured(list(data), layers, min_count, has_series=bool(checkpoints))
    made: list[Study] = []
    with attached(model):
        if known := {layer.name for layer in routed_layers(model).values()} >= set(collector.layers):
            layers = add_similarity(model, layers, batches, generator)
        else:
            skipped["experts"] = f"The experts of {type(model).__name__} are not known here, and cannot be looked into."
        if reason := _why_no_studies(model, wanted=studies, known=known, losses=losses):
            skipped["studies"] = reason
        else:
            options: dict[str, Any] = {"temperatures": temperatures, "seed": seed, "progress": progress}
            made, refused = run_studies(model, batches, list(data), **options)
            made = [Study(UNDISTURBED, None, dict(zip(data, losses or [], strict=True))), *made]
            skipped |= {"some studies": "; ".join(refused) + "."} if refused else {}
    return Analysis(name, tokens, sequence_length, layers, made, checkpoints, skipped)


@dataclass(frozen=True)
class _Runner:
    batches: list[Batch]
    domains: list[str]
    min_count: int
    progress: Progress

    def run(
        self, model: nn.Module, name: str, *, keeps_selections: bool
    ) -> tuple[RoutingCollector, list[float] | None]:
        collector = RoutingCollector(
            self.batches,
            num_domains=len(self.domains),
            min_count=self.min_count,
            keeps_selections=keeps_selections,
        )

        def before(batch: Batch) -> None:
            # after one batch, and not after all
            if collector.batch is not None:
                _require_layers(collector, model, name)
            collector.batch = batch

        with attached(model), collector.watching():
            losses = domain_losses(model, self.progress(self.batches, name), len(self.domains), before=before)
        _require_layers(collector, model, name)
        return collector, losses


def _num_positions(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    text: Any = config.get_text_config() if isinstance(config, PreTrainedConfig) else None
    found: int | None = getattr(text, "max_position_embeddings", None)
    return found


def _require_layers(collector: RoutingCollector, model: nn.Module, name: str) -> None:
    if not collector.layers:
        unknown = unknown_routers(model)
        hint = f" Its router ({', '.join(unknown)}) is not one that is known." if unknown else ""
        raise ValueError(
            f"{name}: {type(model).__name__} has no MoE layer that ran.{hint} Give a model that was upcycled, such as "
            "what `lightning-moe upcycle` or save_moe(model, path) wrote, or a Hugging Face model whose router is one "
            "of lightning_moe.native.NATIVE_ROUTERS."
        )


def _check(data: Mapping[str, Iterable[str]], temperatures: Sequence[int | float], **least: tuple[int, int]) -> None:
    if not data:
        raise ValueError('data: no domain; give at least one, as data={"prose": [text, ...]}.')
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise ValueError(f"{name}={value}: wanted at least {smallest}.")
    if any(factor <= 0 for factor in temperatures):
        raise ValueError(f"temperatures={list(temperatures)}: wanted factors of the logits > 0.")


def _unmeasured(
    domains: Sequence[str], layers: Sequence[LayerAnalysis], min_count: int, *, has_series: bool
) -> dict[str, str]:
    skipped = {}
    if len(domains) == 1:
        skipped["domains"] = (
            f"Only one domain was given ({domains[0]}), so nothing can be said of specialisation by domain. Give two."
        )
    if all(layer.vocabulary_specialization is None for layer in layers):
        skipped["vocabulary"] = f"No token id occurs {min_count} times. Look at more tokens, or lower min_count."
    if not has_series:
        skipped["checkpoints"] = "Only one checkpoint was given. Give several of one run, oldest first."
    return skipped


def _why_no_studies(model: nn.Module, *, wanted: bool, known: bool, losses: list[float] | None) -> str | None:
    if not wanted:
        return "Not asked for."
    if losses is None:
        return f"{type(model).__name__} is no causal language model, and has no next-token loss."
    if not known:
        return f"The MoE layers of {type(model).__name__} are not known here: their routes cannot be changed."
    return None
