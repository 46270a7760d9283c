"""What every number of the report is: its formula, how to read it, and where it comes from."""

from dataclasses import dataclass

_OLMOE = "https://arxiv.org/abs/2409.02060"
_LIBMOE = "https://arxiv.org/abs/2411.00918"


@dataclass(frozen=True)
class Definition:
    """What a number is.

    Args:
        name: of the number.
        formula: how it is computed.
        meaning: how to read it.
        source: the paper; None for what is nobody's invention, or ours.
        address: of the paper.
    """

    name: str
    formula: str
    meaning: str
    source: str | None = None
    address: str | None = None


LOAD = (
    Definition(
        "Load",
        "c_e = number of tokens that chose expert e;  relative load = c_e / mean(c)",
        "Counted from the choices themselves, over all domains. 1 is the fair share, 0 a dead expert.",
    ),
    Definition(
        "MaxVio",
        "max_e c_e / mean(c) - 1",
        "0 is even; E / K - 1, for K of E experts per token, are all tokens on the same K. MaxVio per batch "
        "is the mean of each batch's own.",
        "Wang et al., Auxiliary-Loss-Free Load Balancing, 2024, equation 4",
        "https://arxiv.org/abs/2408.15664",
    ),
    Definition(
        "Load entropy, effective experts",
        "H = -sum_e f_e log f_e, f = c / sum(c);  entropy H / log E, effective experts exp(H)",
        "1, and E, are even. Effective experts are as many equally used ones as would have this entropy.",
    ),
    Definition("Dead experts", "number of e with c_e = 0", "Experts that no token of these texts chose."),
)

CERTAINTY = (
    Definition(
        "Token entropy",
        "mean over tokens of -sum_e p_e log p_e / log E, p = a token's scores, of sum 1",
        "0 is a router that is sure of one expert, 1 one that prefers none. Near 1 is usual soon after upcycling.",
        "analysed in Nguyen et al., LibMoE, 2024",
        _LIBMOE,
    ),
    Definition(
        "Router margin",
        "mean over tokens of z_(K) - z_(K+1), logits in descending order",
        "What separates the last expert chosen from the first that is not: how near the choice is to "
        "another. In units of the logits.",
        "Nguyen et al., LibMoE, 2024",
        _LIBMOE,
    ),
)

COACTIVATION = (
    Definition(
        "Co-activation",
        "N_ij / N_i: of the N_i tokens that chose expert i, the share that chose j too",
        "Row i, column j, over all pairs of a token's experts. Chance, with K of E experts drawn evenly, "
        "is (K - 1) / (E - 1). The diagonal is left grey.",
        "Muennighoff et al., OLMoE, 2024, section 5.2",
        _OLMOE,
    ),
)

CHECKPOINTS = (
    Definition(
        "Router saturation",
        "mean over tokens of |A & B| / K, A and B the sets of a token's experts in this checkpoint and in the last",
        "1 is the final routing. The top-1 version compares the first choices alone. By chance K / E, and 1 / E.",
        "Muennighoff et al., OLMoE, 2024, section 5.1",
        _OLMOE,
    ),
    Definition(
        "Change rate",
        "mean over tokens of 1 - |A & B| / K, B the set in the checkpoint before",
        "0 is a routing that stands still. It depends on how far apart the checkpoints are.",
        "Dai et al., StableMoE, 2022",
        "https://arxiv.org/abs/2204.08396",
    ),
)

DOMAINS = (
    Definition(
        "Domain specialisation",
        "N_iD / N_D: of the N_D tokens of domain D, the share that chose expert i",
        "Drawn as a multiple of the uniform share K / E, which is 1, white.",
        "Muennighoff et al., OLMoE, 2024, section 5.3",
        _OLMOE,
    ),
    Definition(
        "Total variation",
        "mean over pairs of domains of 1/2 sum_i |f_i^D - f_i^D'|, f^D = shares of D's choices",
        "0 is the same use of the experts, 1 no expert in common.",
    ),
    Definition(
        "Mutual information",
        "I(expert; domain) over all choices, in nats",
        "What the expert tells of the domain: 0 nothing; at most the entropy of the domains.",
    ),
    Definition(
        "Chance",
        "the same with the domains dealt to the sequences at random, 200 times",
        "Few texts differ by accident. What is above the dashed line is more than 95 of 100 such accidents.",
    ),
)

VOCABULARY = (
    Definition(
        "Vocabulary specialisation",
        "mean over token ids x of max_i N_ix / N_x, N_ix tokens of id x whose first choice is expert i",
        "1 is a router that looks at nothing but the token id. Ids of the input; rare ids are left out.",
        "Muennighoff et al., OLMoE, 2024, section 5.4",
        _OLMOE,
    ),
    Definition(
        "Chance",
        "the same with each token's expert drawn by the load",
        "More than 1 / E, as some expert always gets most of a few tokens.",
    ),
)

LIKENESS = (
    Definition(
        "Weight cosine",
        "mean over pairs i < j of cos(vec W_i, vec W_j), all matrices of an expert as one vector",
        "1 are copies, as right after upcycling by copying; 0 are strangers.",
    ),
    Definition(
        "Output cosine",
        "mean over tokens and pairs i < j of cos(f_i(x), f_j(x))",
        "Every expert computes the same sample of tokens of all domains. 1 minus this is their diversity.",
    ),
    Definition(
        "Output CKA",
        "||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F), outputs X, Y of two experts less their means",
        "1 are outputs that are the same but for a rotation and a scale. The dashed line is the CKA of "
        "outputs whose tokens were shuffled: what so few tokens give by chance.",
        "Kornblith et al., Similarity of Neural Network Representations Revisited, 2019",
        "https://arxiv.org/abs/1905.00414",
    ),
    Definition(
        "Router row cosine",
        "mean over pairs of cos(W_r,i, W_r,j), rows of the router",
        "0 are rows that look at different directions.",
        "Ahrac et al., Routers Learn the Geometry of Their Experts, 2026",
        "https://arxiv.org/abs/2605.12476",
    ),
)

STUDIES = (
    Definition(
        "Loss",
        "mean next-token cross-entropy of a domain, in nats",
        "Computed with the routing below in every MoE layer at once. The model itself is not changed.",
    ),
    Definition(
        "Best expert dropped (drop-top-1)",
        "each token's expert of largest weight is left out; the others' weights are scaled to the old sum",
        "With one expert per token nothing is left. How much hangs on the first choice.",
        "Nguyen et al., LibMoE, 2024",
        _LIBMOE,
    ),
    Definition(
        "Next best for best",
        "the expert of highest score that was not chosen takes the place of the best one",
        "The same at equal compute. No rise: the choice does not matter.",
    ),
    Definition(
        "Logits times c",
        "weights from the scores of c z instead of z; the chosen experts stay",
        "Below 1 a flatter mixture of a token's experts, above 1 a sharper one. The router of a Hugging Face model is "
        "run on c z and chooses anew, which differs where a bias on the choice, or groups of experts, come in.",
    ),
    Definition(
        "Random experts",
        "as many other experts with the same weights, drawn uniformly for each token and layer",
        "The reference: a router that is worth something has a lower loss.",
    ),
)
