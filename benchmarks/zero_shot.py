"""Measures zero-shot evaluation: that an upcycled model answers as the dense one, and what a call costs beside it.

SmolLM2-135M and its copy with all FFNs upcycled (8 experts, top-2, float32), each document of eleven tasks: how far the
log probabilities of the answers are apart, and whether every score of every document is the same. And the CPU seconds
of a second call that are not in the model's forward.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, environment, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_moe import TopKRouter, UpcycleConfig, upcycle
from lightning_moe.evaluation import LiveHFLM, evaluate_model, load_tasks, scores
from lightning_moe.local_tasks import LOCAL_TASKS

CACHE = ROOT.parent / "examples" / ".cache"
# of a log probability, which is the score of a document where the task has a perplexity
_ROUNDING = 1e-3


class Timed(LiveHFLM):
    """A model with a stopwatch on its forward.

    Args:
        arguments: of the model.
        options: of the model.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.inside = 0.0

    def _model_call(self, *arguments: Any, **options: Any) -> torch.Tensor:
        since = time.process_time()
        try:
            return super()._model_call(*arguments, **options)
        finally:
            self.inside += time.process_time() - since


def evaluated(lm: Timed, tasks: Any, limit: int) -> tuple[dict[str, Any], dict[str, float]]:
    """The results, and where the time went."""
    lm.inside, since, cpu = 0.0, time.perf_counter(), time.process_time()
    results = evaluate_model(lm, tasks, limit, log_samples=True)
    cpu = time.process_time() - cpu
    spent = {"wall": time.perf_counter() - since, "cpu": cpu, "forward_cpu": lm.inside, "other_cpu": cpu - lm.inside}
    return results, {name: round(value, 3) for name, value in spent.items()}


def compared(first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    """For each task: documents, documents with another score, and the largest difference of a log probability."""
    cases = []
    for task, samples in first["samples"].items():
        pairs = list(zip(samples, second["samples"][task], strict=True))
        answers = [
            (ours, theirs)
            for one, other in pairs
            for ours, theirs in zip(one["filtered_resps"], other["filtered_resps"], strict=True)
        ]
        # of a multiple choice and of lambada: log probability, and whether it is the greedy answer
        names = first["higher_is_better"][task]
        measures = [name for name in names if isinstance(samples[0].get(name), (int, float))]
        cases.append(
            {
                "task": task,
                "documents": len(pairs),
                "answers": len(answers),
                "documents_that_differ": sum(
                    any(abs(a[name] - b[name]) > _ROUNDING for name in measures) for a, b in pairs
                ),
                "log_probability_difference": max(abs(float(a[0]) - float(b[0])) for a, b in answers),
                "scores": scores(first)[task],
            }
        )
    return cases


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=20, help="documents of each task (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", default=list(LOCAL_TASKS), help="default: all eleven")
    parser.add_argument("--quick", action="store_true", help="two documents: does it run?")
    args = parser.parse_args()
    limit, since = 2 if args.quick else args.limit, time.perf_counter()
    folder: Path = CACHE / "smollm2"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tasks = load_tasks(args.tasks, CACHE / "tasks")
    dense, _ = evaluated(Timed(model, tokenizer), tasks, limit)
    receipt = upcycle(model, UpcycleConfig(num_experts=8, router=partial(TopKRouter, top_k=2), seed=0))
    lm = Timed(model, tokenizer)
    moe, first = evaluated(lm, tasks, limit)
    # again, on fewer: what a call costs beside the forward is the same for each document
    _, second = evaluated(lm, tasks, max(1, limit // 4))
    config = {
        "rounds": 1,
        "limit": limit,
        "num_experts": receipt.num_experts,
        "top_k": 2,
        "layers": len(receipt.layers),
    }
    record = {
        "config": config,
        "quick": args.quick,
        "seed": 0,
        **environment(torch.get_num_threads()),
        "wall_seconds": round(time.perf_counter() - since),
        "cases": compared(dense, moe),
        "first_call": first | {"documents": limit * len(args.tasks)},
        "second_call": second | {"documents": max(1, limit // 4) * len(args.tasks)},
    }
    for case in record["cases"]:
        print({key: value for key, value in case.items() if key != "scores"})
    print(first, second, write_result("zero_shot", record), sep="\n")


if __name__ == "__main__":
    main()
