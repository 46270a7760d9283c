"""One row per algorithm: a new one adds its row here and meets every property in the tests.

`test_*_have_rows` fail if a catalogue of the package has an entry without a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import reference
import torch
import transformers
from torch import nn

from lightning_moe import (
    AdaptiveL1Loss,
    BASERouter,
    BranchTrainMixInit,
    CentroidRouterInit,
    CopyInit,
    CosineRouter,
    DenseMixerRouter,
    DropInit,
    ExpertChoiceRouter,
    ExpertOrthogonalityLoss,
    GranularInit,
    GShardRouter,
    HashRouter,
    HeterogeneousLoadBalancingLoss,
    HyperRouter,
    ImportanceLoss,
    KMeansRouterInit,
    LoadBalancingLoss,
    LoadLoss,
    LossFreeRouter,
    LowRankInit,
    MoEPlusPlusRouter,
    MutualInformationLoss,
    NoiseInit,
    NoisyTopKRouter,
    NormalRouterInit,
    NullExpertsRouter,
    NullRewardLoss,
    OrthogonalRouterInit,
    PerturbedCosineRouter,
    ReMoERouter,
    RouterOrthogonalityLoss,
    Routing,
    SigmoidRouter,
    SinkhornRouter,
    SparseMixerRouter,
    SplitInit,
    TCMoERouter,
    TokenEntropyLoss,
    TopKRouter,
    TopPRouter,
    UniformRouter,
    XMoERouter,
    ZeroOutputInit,
    ZeroRouterInit,
    ZLoss,
    metrics,
)

# --- routers ---


@dataclass(frozen=True)
class RouterRow:
    cls: type
    arguments: dict[str, Any] = field(default_factory=dict)
    signed: bool = False
    """Weights may be negative."""
    without_gate_gradient: tuple[str, ...] = ()
    """Parameters that enter the output otherwise than by the combine weights."""

    def __call__(self, hidden_size, num_experts):
        return self.cls(hidden_size, num_experts, **self.arguments)


ROUTER_ROWS = {
    "top_k": RouterRow(TopKRouter, {"top_k": 2}),
    "top_k_3": RouterRow(TopKRouter, {"top_k": 3, "init_std": 0.5}),
    "top_k_raw": RouterRow(TopKRouter, {"top_k": 2, "normalize": False, "init_std": 0.5}),
    "switch": RouterRow(TopKRouter, {"top_k": 1, "normalize": False, "jitter": 0.1}),
    "top_k_straight_through": RouterRow(TopKRouter, {"top_k": 2, "normalize": "straight_through"}),
    "switch_straight_through": RouterRow(TopKRouter, {"top_k": 1, "normalize": "straight_through"}),
    "top_k_temperature": RouterRow(TopKRouter, {"top_k": 2, "temperature": 2.5, "init_std": 0.5}),
    "top_k_noise": RouterRow(TopKRouter, {"top_k": 2, "jitter": 0.1, "noise_std": 0.5}),
    "cosine": RouterRow(CosineRouter, {"top_k": 2, "projection_size": 4}),
    "perturbed_cosine": RouterRow(PerturbedCosineRouter, {"top_k": 2, "projection_size": 4, "offset": 0.2}),
    "xmoe": RouterRow(XMoERouter, {"top_k": 2}),
    "xmoe_paper": RouterRow(XMoERouter, {"top_k": 1, "normalize": False, "projection_size": 3}),
    "sigmoid": RouterRow(SigmoidRouter, {"top_k": 2, "init_std": 0.5}),
    "sigma_moe": RouterRow(SigmoidRouter, {"top_k": 3, "normalize": False, "expert_dropout": 0.3, "init_std": 0.5}),
    "hyper": RouterRow(HyperRouter, {"top_k": 2, "embedding_size": 6, "network_size": 7, "init_std": 0.5}),
    "loss_free": RouterRow(LossFreeRouter, {"top_k": 2, "init_std": 0.5}),
    "loss_free_scaled": RouterRow(LossFreeRouter, {"top_k": 2, "routed_scaling": 2.5, "init_std": 0.5}),
    "loss_free_raw": RouterRow(LossFreeRouter, {"top_k": 2, "normalize": False, "init_std": 0.5}),
    "moe_plus_plus": RouterRow(MoEPlusPlusRouter, {"top_k": 3}, without_gate_gradient=("constants", "constant_gate")),
    "moe_plus_plus_few": RouterRow(
        MoEPlusPlusRouter, {"top_k": 2, "num_copy_experts": 0, "num_constant_experts": 0, "init_std": 0.5}
    ),
    "tc_moe": RouterRow(TCMoERouter, {"top_k": 3, "init_std": 0.5, "null_offset": 1.0}, signed=True),
    "remoe": RouterRow(ReMoERouter, {"top_k": 2}),
    "remoe_straight_through": RouterRow(ReMoERouter, {"top_k": 2, "normalize": "straight_through"}),
    "noisy_top_k": RouterRow(NoisyTopKRouter, {"top_k": 2, "init_std": 0.5}),
    "gshard": RouterRow(GShardRouter, {"init_std": 0.5}),
    "expert_choice": RouterRow(ExpertChoiceRouter, {"capacity_factor": 2.0}),
    "sinkhorn": RouterRow(SinkhornRouter, {"top_k": 2, "init_std": 0.5}),
    "sinkhorn_one": RouterRow(SinkhornRouter, {"top_k": 1, "normalize": False, "init_std": 0.5}),
    "base": RouterRow(BASERouter, {"init_std": 0.5}),
    "base_straight_through": RouterRow(BASERouter, {"normalize": "straight_through", "init_std": 0.5}),
    "hash": RouterRow(HashRouter, {"top_k": 1}),
    "hash_3": RouterRow(HashRouter, {"top_k": 3}),
    "top_p": RouterRow(TopPRouter, {"top_p": 0.5, "init_std": 0.5}),
    "top_p_raw": RouterRow(TopPRouter, {"top_p": 0.9, "normalize": False, "init_std": 0.5}),
    "null_experts": RouterRow(NullExpertsRouter, {"top_k": 3, "num_null_experts": 2}),
    "null_experts_many": RouterRow(NullExpertsRouter, {"top_k": 2, "num_null_experts": 4, "init_std": 0.5}),
    "sparse_mixer": RouterRow(SparseMixerRouter, {"top_k": 2, "threshold": 0.3, "init_std": 0.5}),
    "dense_mixer": RouterRow(DenseMixerRouter, {"top_k": 2, "init_std": 0.5}),
    "dense_mixer_raw": RouterRow(DenseMixerRouter, {"top_k": 1, "normalize": False, "init_std": 0.5}),
    "uniform": RouterRow(UniformRouter, {"top_k": 2}),
}

# --- losses ---


def as_it_is(routing):
    return routing


def _masked(values, routing):
    return values if routing.token_mask is None else values.masked_fill(~routing.token_mask.unsqueeze(1), 0)


def _real_mean(values, routing):
    count = len(values) if routing.token_mask is None else int(routing.token_mask.sum())
    return _masked(values, routing).sum(0) / max(count, 1)


def with_expected_load(routing):
    """As if the router estimated its load: a function of the logits, so that it has a gradient."""
    chances = _masked(_masked(routing.logits, routing).sigmoid(), routing)
    return replace(routing, expected_load=chances.sum(0))


def with_null_choices(routing):
    """As if the last two columns computed nothing."""
    return replace(routing, num_ffn_experts=routing.num_choices - 2)


def with_outputs(routing):
    """As if the experts had computed three numbers each: functions of the logits, so that they have a gradient."""
    logit = _masked(routing.logits, routing)[routing.token_ids, routing.expert_ids]
    return replace(routing, outputs=torch.stack([logit, logit.sin(), 0.5 + 0 * logit], dim=1))


def with_gate(routing):
    """As if the router had rows: functions of the logits, so that they have a gradient."""
    mean = _real_mean(routing.logits, routing)
    return replace(routing, gate=torch.stack([mean, mean.square()], dim=1))


@dataclass(frozen=True)
class LossRow:
    cls: type
    truth_of: Callable[..., torch.Tensor]
    """Of a routing, and the row's arguments."""
    measures_balance: bool = False
    """1 when routing is uniform, E / K when it has collapsed on K experts."""
    arguments: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Routing], Routing] = as_it_is
    """Gives a routing what this loss looks at."""

    def make(self, **arguments):
        return self.cls(**self.arguments, **arguments)

    def __call__(self, routing):
        return self.make()(self.prepare(routing))

    def truth(self, routing):
        return self.truth_of(self.prepare(routing), **self.arguments)


LOSS_ROWS = {
    "load_balancing_loss": LossRow(LoadBalancingLoss, reference.load_balancing_loss, measures_balance=True),
    "z_loss": LossRow(ZLoss, reference.z_loss),
    "heterogeneous_load_balancing_loss": LossRow(
        HeterogeneousLoadBalancingLoss,
        reference.heterogeneous_load_balancing_loss,
        arguments={"zero_computation_weight": 0.5},
        prepare=with_null_choices,
    ),
    "importance_loss": LossRow(ImportanceLoss, reference.importance_loss, measures_balance=True),
    "load_loss": LossRow(LoadLoss, reference.load_loss, measures_balance=True, prepare=with_expected_load),
    "mutual_information_loss": LossRow(
        MutualInformationLoss, reference.mutual_information_loss, arguments={"token_weight": 0.7}
    ),
    "token_entropy_loss": LossRow(TokenEntropyLoss, reference.token_entropy_loss),
    "expert_orthogonality_loss": LossRow(
        ExpertOrthogonalityLoss, reference.expert_orthogonality_loss, prepare=with_outputs
    ),
    "router_orthogonality_loss": LossRow(
        RouterOrthogonalityLoss, reference.router_orthogonality_loss, prepare=with_gate
    ),
    "adaptive_l1_loss": LossRow(AdaptiveL1Loss, reference.adaptive_l1_loss, arguments={"top_k": 2}),
    "null_reward_loss": LossRow(NullRewardLoss, reference.null_reward_loss, prepare=with_null_choices),
}

# --- metrics ---

NUM_EXPERTS = 5
EXPERTS = {"num_experts": NUM_EXPERTS}
DOMAINS = {**EXPERTS, "num_domains": 4}


def _alone(routing):
    return (routing,)


@dataclass(frozen=True)
class MetricRow:
    cls: type
    truth: Callable[..., Any]
    """Of a list, over the updates, for each argument of `update`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[Routing], tuple[Any, ...]] = _alone
    """The arguments of `update`, made of a routing; what they say of a token depends on its logits alone."""
    pools: bool = True
    """Many updates come to the same as one with all of their tokens."""

    def __call__(self):
        return self.cls(**self.arguments)


def _bits(routing, count):
    # a number below 2^count for each token
    return ((routing.logits[:, :count] > 0).long() * 2 ** torch.arange(count)).sum(1)


def _with_another_routing(routing):
    # some tokens' columns move on by one; all rows in another order
    columns = routing.expert_ids if routing.choice_ids is None else routing.choice_ids
    moved = (columns + _bits(routing, 1)[routing.token_ids]) % routing.num_choices
    optional = {"gradient_only": routing.gradient_only, "dropped": routing.dropped}
    rows = {"token_ids": routing.token_ids, "expert_ids": moved, "weights": routing.weights, **optional}
    flipped = {name: None if value is None else value.flip(0) for name, value in rows.items()}
    return routing, Routing(**flipped, logits=routing.logits, scores=routing.scores, token_mask=routing.token_mask)


def _with_domains(routing):
    # domain 3 has no token; some tokens have no domain
    return routing, _bits(routing, 2) - 1


def _with_token_ids(routing):
    # as labels: padding is -100
    return routing, torch.where(_mask(routing), _bits(routing, 3), -100)


def _random(routing, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(routing.num_tokens))


def _weights(routing):
    return ([_random(routing, NUM_EXPERTS, 3, 2), _random(routing, NUM_EXPERTS, 4).square()],)


def _two_weights(routing):
    (weights,) = _weights(routing)
    return weights, [weight + 0.1 * _random(routing, *weight.shape) for weight in weights]


def _mask(routing):
    return torch.ones(routing.num_tokens, dtype=torch.bool) if routing.token_mask is None else routing.token_mask


def _outputs(routing):
    rotations = torch.randn(NUM_EXPERTS, NUM_EXPERTS, 3, generator=torch.Generator().manual_seed(0))
    return routing.logits[:, :NUM_EXPERTS] @ rotations, _mask(routing)


def _gate(routing):
    return (_random(routing, routing.num_choices, 3),)


def _two_log_probs(routing):
    return routing.logits[:, 0], routing.logits[:, 1], _mask(routing)


METRIC_ROWS = {
    "expert_load": MetricRow(metrics.ExpertLoad, reference.load, EXPERTS),
    "max_violation": MetricRow(metrics.MaxViolation, reference.max_violation, EXPERTS),
    "batch_max_violation": MetricRow(metrics.BatchMaxViolation, reference.batch_max_violation, pools=False),
    "min_violation": MetricRow(metrics.MinViolation, reference.min_violation, EXPERTS),
    "average_violation": MetricRow(metrics.AverageViolation, reference.average_violation, EXPERTS),
    "load_imbalance": MetricRow(metrics.LoadImbalance, reference.load_imbalance, EXPERTS),
    "utilization_quantiles": MetricRow(metrics.UtilizationQuantiles, reference.utilization_quantiles, EXPERTS),
    "coefficient_of_variation": MetricRow(metrics.CoefficientOfVariation, reference.coefficient_of_variation, EXPERTS),
    "squared_coefficient_of_variation": MetricRow(
        metrics.SquaredCoefficientOfVariation, reference.squared_coefficient_of_variation, EXPERTS
    ),
    "gini_coefficient": MetricRow(metrics.GiniCoefficient, reference.gini_coefficient, EXPERTS),
    "load_entropy": MetricRow(metrics.LoadEntropy, reference.load_entropy, EXPERTS),
    "effective_experts": MetricRow(metrics.EffectiveExperts, reference.effective_experts, EXPERTS),
    "dead_experts": MetricRow(metrics.DeadExperts, reference.dead_experts, EXPERTS),
    "nearly_dead_experts": MetricRow(metrics.DeadExperts, reference.nearly_dead_experts, {**EXPERTS, "threshold": 0.5}),
    "routing_entropy": MetricRow(metrics.RoutingEntropy, reference.routing_entropy),
    "routing_confidence": MetricRow(metrics.RoutingConfidence, reference.routing_confidence),
    "router_margin": MetricRow(metrics.RouterMargin, reference.router_margin),
    "router_logit_norm": MetricRow(metrics.RouterLogitNorm, reference.router_logit_norm),
    "max_router_logit": MetricRow(metrics.MaxRouterLogit, reference.max_router_logit),
    "drop_rate": MetricRow(metrics.DropRate, reference.drop_rate),
    "active_experts": MetricRow(metrics.ActiveExperts, reference.active_experts),
    "router_saturation": MetricRow(metrics.RouterSaturation, reference.router_saturation, inputs=_with_another_routing),
    "top_1_saturation": MetricRow(
        metrics.RouterSaturation, reference.top_1_saturation, {"top_k": 1}, inputs=_with_another_routing
    ),
    "routing_change_rate": MetricRow(
        metrics.RoutingChangeRate, reference.routing_change_rate, inputs=_with_another_routing
    ),
    "expert_coactivation": MetricRow(metrics.ExpertCoactivation, reference.expert_coactivation, EXPERTS),
    "domain_specialization": MetricRow(
        metrics.DomainSpecialization, reference.domain_specialization, DOMAINS, inputs=_with_domains
    ),
    "domain_total_variation": MetricRow(
        metrics.DomainTotalVariation, reference.domain_total_variation, DOMAINS, inputs=_with_domains
    ),
    "domain_mutual_information": MetricRow(
        metrics.DomainMutualInformation, reference.domain_mutual_information, DOMAINS, inputs=_with_domains
    ),
    "vocabulary_specialization": MetricRow(
        metrics.VocabularySpecialization,
        reference.vocabulary_specialization,
        {**EXPERTS, "vocab_size": 9, "min_count": 2},
        inputs=_with_token_ids,
    ),
    "vocabulary_specialization_of_all": MetricRow(
        metrics.VocabularySpecialization,
        reference.vocabulary_specialization_of_all,
        {**EXPERTS, "vocab_size": 9, "top_k": None},
        inputs=_with_token_ids,
    ),
    "expert_weight_cosine": MetricRow(
        metrics.ExpertWeightCosine, reference.expert_weight_cosine, inputs=_weights, pools=False
    ),
    "expert_weight_distance": MetricRow(
        metrics.ExpertWeightDistance, reference.expert_weight_distance, inputs=_two_weights, pools=False
    ),
    "output_similarity": MetricRow(metrics.OutputSimilarity, reference.output_similarity, inputs=_outputs),
    "output_cka": MetricRow(metrics.OutputCKA, reference.output_cka, inputs=_outputs, pools=False),
    "router_row_cosine": MetricRow(metrics.RouterRowCosine, reference.router_row_cosine, inputs=_gate, pools=False),
    "counterfactual_routing_gain": MetricRow(
        metrics.CounterfactualRoutingGain, reference.counterfactual_routing_gain, inputs=_two_log_probs
    ),
}

# --- initialisers ---


@dataclass(frozen=True)
class InitRow:
    cls: type
    arguments: dict[str, Any] = field(default_factory=dict)
    num_shared_experts: int = 0

    def __call__(self, build=None, num_experts=8):
        """With a branch for every expert but one, where it wants branches of a dense model, which ``build`` builds."""
        if self.cls is not BranchTrainMixInit:
            return self.cls(**self.arguments)
        torch.manual_seed(7)
        branches = [(build or FAMILY_ROWS["llama"].build)() for _ in range(num_experts - 1)]
        for branch in branches:
            for parameter in branch.parameters():
                parameter.data.normal_(std=0.3)
        return self.cls(branches, **self.arguments)


INIT_ROWS = {
    "copy": InitRow(CopyInit),
    "noise": InitRow(NoiseInit, {"std": 0.1}),
    "noise_replaced": InitRow(NoiseInit, {"std": 0.02, "fraction": 0.5, "replace": True}),
    "drop": InitRow(DropInit, {"ratio": 0.5}),
    "drop_repo": InitRow(DropInit, {"ratio": 0.5, "variant": "repo"}),
    "granular": InitRow(GranularInit, {"granularity": 2}),
    "granular_4": InitRow(GranularInit, {"granularity": 4}),
    "split": InitRow(SplitInit, {"method": "random"}),
    "split_kmeans": InitRow(SplitInit, {"method": "kmeans"}),
    "split_activation": InitRow(SplitInit, {"method": "activation"}),
    "split_gradient": InitRow(SplitInit, {"method": "gradient"}),
    "zero_output": InitRow(ZeroOutputInit, num_shared_experts=1),
    "low_rank": InitRow(LowRankInit, {"rank": 4}),
    "low_rank_scaled": InitRow(LowRankInit, {"rank": 3, "alpha": 6.0}),
    "branch_train_mix": InitRow(BranchTrainMixInit),
}
ROUTER_INIT_ROWS = {
    "normal": InitRow(NormalRouterInit, {"std": 0.1}),
    "zeros": InitRow(ZeroRouterInit),
    "orthogonal": InitRow(OrthogonalRouterInit, {"std": 0.1}),
    "centroid": InitRow(CentroidRouterInit, {"std": 0.1}),
    "kmeans": InitRow(KMeansRouterInit, {"std": 0.1}),
}

# --- FFN families ---

VOCABULARY = 61
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
GROUPED = {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
EACH = {**SMALL, "num_attention_heads": 2, "max_position_embeddings": 64}
PATCHES = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
IMAGE_TOKEN = VOCABULARY - 1


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


def torchvision_ffn(hidden_size=8, width=12, dropout=0.1):
    """Torchvision's order: a dropout between the projections, and one after them."""
    first, last = nn.Linear(hidden_size, width), nn.Linear(width, hidden_size)
    return nn.Sequential(first, nn.GELU(), nn.Dropout(dropout), last, nn.Dropout(dropout))


def sequential_ffn(hidden_size=8, width=12, dropout=0.0):
    ffn = [nn.Linear(hidden_size, width), nn.ReLU(), nn.Linear(width, hidden_size)]
    return nn.Sequential(*ffn, nn.Dropout(dropout)) if dropout else nn.Sequential(*ffn)


def plain_model(make_ffn):
    """Two residual blocks and a head, of no library."""
    return nn.Sequential(nn.Linear(5, 8), Block(make_ffn()), Block(make_ffn()), nn.Linear(8, 3))


def _model(model, config, **settings):
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def _text_model(model, config, **settings):
    return _model(model, config, **SPECIAL, **settings)


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
    ffn_parameters: int | tuple[int, ...]
    """Of one FFN, by hand: D and F as above; of each, where they differ."""
    inputs: str = "causal"
    """``causal``, ``encoder``, ``seq2seq``, ``pixels``, ``both``, ``llava``, or ``plain`` for what is of no library."""
    hidden_size: int = 16
    mixed: bool = False
    """Has FFNs of other families besides."""
    exact_in_bfloat16: bool = True
    normalised: bool = False
    """The FFN's output passes a norm, so that its scale hardly matters."""

    @property
    def is_text(self):
        """A causal language model."""
        return self.inputs == "causal"

    @property
    def counts(self):
        """The parameters of each FFN."""
        one = self.ffn_parameters
        return one if isinstance(one, tuple) else (one,) * len(self.names)

    def batch(self, batch_size=3, length=7, dtype=torch.float32):
        """Keyword arguments of the model."""
        batch = self._batch(batch_size, length)
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}

    def _batch(self, batch_size, length):
        ids, generator = token_ids(batch_size, length), torch.Generator().manual_seed(0)
        if self.inputs == "plain":
            return {"input": torch.randn(batch_size, length, 5, generator=generator)}
        if self.inputs == "llava":
            # four patches
            ids = ids.clamp(max=IMAGE_TOKEN - 1)
            ids[:, 1:5] = IMAGE_TOKEN
        batch = {} if self.inputs == "pixels" else {"input_ids": ids}
        if self.inputs == "seq2seq":
            batch["decoder_input_ids"] = token_ids(batch_size, length - 2, 1)
        if self.inputs in ("pixels", "both", "llava"):
            batch["pixel_values"] = torch.randn(batch_size, 3, 8, 8, generator=generator)
        return batch


def logits(model, batch):
    """The output of a model of the table."""
    out = model(**batch)
    for key in ("logits", "logits_per_text", "last_hidden_state"):
        out = getattr(out, key, out)
    return out


def _pair(pattern):
    return pattern.format(0), pattern.format(1)


_GATED = 3 * 16 * 24
_BIASED = 2 * 16 * 24 + 24 + 16
_VISION = _pair("encoder.layers.{}.mlp")
_T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
_T5_NAMES = (*_pair("encoder.block.{}.layer.1.DenseReluDense"), *_pair("decoder.block.{}.layer.2.DenseReluDense"))
_FALCON = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_FALCON["ffn_hidden_size"] = 24
_BART = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
_GPTJ = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "n_positions": 64}
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
        inputs="plain",
        hidden_size=8,
    ),
    "sequential": FamilyRow(
        "sequential",
        lambda: plain_model(lambda: sequential_ffn(dropout=0.1)).eval(),
        ("1.ffn", "2.ffn"),
        2 * 8 * 12 + 12 + 8,
        inputs="plain",
        hidden_size=8,
    ),
}
# what is combined with every router and initialiser
CORE_ROWS = dict(FAMILY_ROWS)


def _gated(name, **settings):
    return FamilyRow("llama", _text_model(f"{name}ForCausalLM", f"{name}Config", **GROUPED, **settings), _LLAMA, _GATED)


FAMILY_ROWS |= {
    "gemma": _gated("Gemma", head_dim=8),
    "gemma2": replace(_gated("Gemma2", head_dim=8, query_pre_attn_scalar=8, sliding_window=4), normalised=True),
    "gemma3": FamilyRow(
        "llama",
        _text_model(
            "Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=4
        ),
        _LLAMA,
        _GATED,
        normalised=True,
    ),
    "olmo": _gated("Olmo"),
    "olmo2": _gated("Olmo2"),
    "olmo3": _gated("Olmo3", sliding_window=4),
    "smollm3": _gated("SmolLM3"),
    "stablelm": _gated("StableLm"),
    "granite": _gated("Granite"),
    "cohere": _gated("Cohere", logit_scale=1.0),
    "glm4": FamilyRow("phi3", _text_model("Glm4ForCausalLM", "Glm4Config", **GROUPED, head_dim=8), _LLAMA, _GATED),
    "phi": FamilyRow("clip", _text_model("PhiForCausalLM", "PhiConfig", **GROUPED), _LLAMA, _BIASED),
    "starcoder2": FamilyRow(
        "starcoder2", _text_model("Starcoder2ForCausalLM", "Starcoder2Config", **GROUPED), _LLAMA, _BIASED
    ),
    "nemotron": FamilyRow(
        "nemotron", _text_model("NemotronForCausalLM", "NemotronConfig", **GROUPED), _LLAMA, 2 * 16 * 24
    ),
    "falcon": FamilyRow(
        "gpt_neox",
        _text_model("FalconForCausalLM", "FalconConfig", **_FALCON),
        _pair("transformer.h.{}.mlp"),
        2 * 16 * 24,
    ),
    "falcon_biases": FamilyRow(
        "gpt_neox",
        _text_model(
            "FalconForCausalLM",
            "FalconConfig",
            **_FALCON,
            bias=True,
            alibi=True,
        ),
        _pair("transformer.h.{}.mlp"),
        _BIASED,
        exact_in_bfloat16=False,  # its own linear layer rounds before it adds the bias
    ),
    "bloom": FamilyRow(
        "bloom",
        _text_model("BloomForCausalLM", "BloomConfig", vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=2),
        _pair("transformer.h.{}.mlp.dense_h_to_4h"),
        2 * 16 * 64 + 64 + 16,
    ),
    "gptj": FamilyRow(
        "gptj",
        _text_model("GPTJForCausalLM", "GPTJConfig", **_GPTJ, rotary_dim=4),
        _pair("transformer.h.{}.mlp"),
        _BIASED,
    ),
    "opt": FamilyRow(
        "opt",
        _text_model("OPTForCausalLM", "OPTConfig", **EACH, ffn_dim=24, word_embed_proj_dim=16),
        _pair("model.decoder.layers.{}.fc1"),
        _BIASED,
    ),
    "bert": FamilyRow(
        "bert",
        _text_model("BertForMaskedLM", "BertConfig", **EACH),
        _pair("bert.encoder.layer.{}.intermediate"),
        _BIASED,
        inputs="encoder",
    ),
    "roberta": FamilyRow(
        "bert",
        _text_model("RobertaForMaskedLM", "RobertaConfig", **EACH),
        _pair("roberta.encoder.layer.{}.intermediate"),
        _BIASED,
        inputs="encoder",
    ),
    "modernbert": FamilyRow(
        "modernbert",
        _text_model("ModernBertForMaskedLM", "ModernBertConfig", **EACH, cls_token_id=1, sep_token_id=2),
        _pair("model.layers.{}.mlp"),
        _GATED,
        inputs="encoder",
    ),
    "distilbert": FamilyRow(
        "distilbert",
        _text_model(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            vocab_size=VOCABULARY,
            dim=16,
            hidden_dim=24,
            n_layers=2,
            n_heads=2,
        ),
        _pair("distilbert.transformer.layer.{}.ffn"),
        _BIASED,
        inputs="encoder",
    ),
    "t5": FamilyRow(
        "t5",
        _text_model("T5ForConditionalGeneration", "T5Config", **_T5, decoder_start_token_id=0),
        _T5_NAMES,
        2 * 16 * 24,
        inputs="seq2seq",
    ),
    "t5_gated": FamilyRow(
        "t5_gated",
        _text_model(
            "T5ForConditionalGeneration",
            "T5Config",
            **_T5,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
        _T5_NAMES,
        _GATED,
        inputs="seq2seq",
    ),
    "bart": FamilyRow(
        "opt",
        _text_model(
            "BartForConditionalGeneration",
            "BartConfig",
            vocab_size=VOCABULARY,
            d_model=16,
            max_position_embeddings=64,
            forced_eos_token_id=None,
            **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in _BART.items()},
        ),
        (*_pair("model.encoder.layers.{}.fc1"), *_pair("model.decoder.layers.{}.fc1")),
        _BIASED,
        inputs="seq2seq",
    ),
    "vit": FamilyRow(
        "clip",
        _model("ViTForImageClassification", "ViTConfig", **PATCHES, intermediate_size=24),
        _pair("vit.layers.{}.mlp"),
        _BIASED,
        inputs="pixels",
    ),
    "dinov2": FamilyRow(
        "clip",
        _model("Dinov2Model", "Dinov2Config", **PATCHES, mlp_ratio=2),
        _pair("encoder.layer.{}.mlp"),
        2 * 16 * 32 + 32 + 16,
        inputs="pixels",
    ),
    # two thirds of 32, rounded up to a multiple of 8
    "dinov2_swiglu": FamilyRow(
        "llama",
        _model("Dinov2Model", "Dinov2Config", **PATCHES, mlp_ratio=2, use_swiglu_ffn=True),
        _pair("encoder.layer.{}.mlp"),
        3 * 16 * 24 + 2 * 24 + 16,
        inputs="pixels",
    ),
    "clip_vision": FamilyRow(
        "clip",
        _model("CLIPVisionModel", "CLIPVisionConfig", **PATCHES, intermediate_size=24),
        _VISION,
        _BIASED,
        inputs="pixels",
    ),
    "siglip_vision": FamilyRow(
        "clip",
        _model("SiglipVisionModel", "SiglipVisionConfig", **PATCHES, intermediate_size=24, vision_use_head=False),
        _VISION,
        _BIASED,
        inputs="pixels",
    ),
    "clip": FamilyRow(
        "clip",
        _model(
            "CLIPModel",
            "CLIPConfig",
            text_config={**EACH, **SPECIAL, "eos_token_id": 2},
            vision_config={**PATCHES, "intermediate_size": 24},
            projection_dim=8,
        ),
        (*_pair("text_model.encoder.layers.{}.mlp"), *_pair("vision_model.encoder.layers.{}.mlp")),
        _BIASED,
        inputs="both",
    ),
    "llava": FamilyRow(
        "llava",
        _model(
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            text_config={**GROUPED, **SPECIAL, "model_type": "llama"},
            vision_config={**PATCHES, "intermediate_size": 24, "model_type": "clip_vision_model"},
            image_token_id=IMAGE_TOKEN,
            vision_feature_layer=-1,
        ),
        (
            *_pair("model.vision_tower.encoder.layers.{}.mlp"),
            "model.multi_modal_projector",
            *_pair("model.language_model.layers.{}.mlp"),
        ),
        (_BIASED, _BIASED, 2 * 16 * 16 + 16 + 16, _GATED, _GATED),
        inputs="llava",
        mixed=True,
        # its projector gets a slice of the patches, of which a dense linear layer rounds before it adds the bias
        exact_in_bfloat16=False,
    ),
    "sequential_dropout": FamilyRow(
        "sequential_dropout",
        lambda: plain_model(torchvision_ffn).eval(),
        ("1.ffn", "2.ffn"),
        2 * 8 * 12 + 12 + 8,
        inputs="plain",
        hidden_size=8,
    ),
}
TEXT_ROWS = {name: row for name, row in FAMILY_ROWS.items() if row.is_text}
LIBRARY_ROWS = {name: row for name, row in FAMILY_ROWS.items() if row.inputs != "plain"}
