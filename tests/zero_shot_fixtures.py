"""Small tasks for lm-eval, of random words."""

import json
import random

import yaml
from lightning_fixtures import VOCABULARY

# an odd number, so that two ranks have different shares
DOCUMENTS = 21


def words(*ids):
    # 0 is a word like any other, and lm-eval's padding
    return " ".join("<eos>" if i == 0 else f"w{i}" for i in ids)


def make_tasks(folder):
    """Tasks of each kind, all of the same documents.

    A multiple choice with answers of one to three words, one of single words, and a text whose end is to be said; for
    comparisons texts to be read, a score that is no mean of numbers, and a group of two.
    """
    generator = random.Random(7)
    documents = []
    for _ in range(DOCUMENTS):
        # the first word decides, so that there is something to learn
        first = generator.randrange(1, VOCABULARY)
        text = [first, *(generator.randrange(VOCABULARY) for _ in range(generator.randrange(1, 9)))]
        choices = [[generator.randrange(VOCABULARY) for _ in range(generator.randrange(1, 4))] for _ in range(3)]
        documents.append(
            {
                "text": words(*text),
                "choices": [words(*choice) for choice in choices],
                "single": [words(choice[0]) for choice in choices],
                "label": generator.randrange(3),
                "end": words(*choices[0], 0, 5),
            }
        )
    data = folder / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    right = {"output_type": "multiple_choice", "doc_to_target": "label"}
    right["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    said = {"output_type": "loglikelihood", "doc_to_target": " {{end}}"}
    said["metric_list"] = [{"metric": "perplexity"}, {"metric": "acc"}]
    read = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
    read["metric_list"] = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    judged = {**right, "metric_list": [{"metric": "brier_score"}]}
    tasks = {
        "choose": {**right, "doc_to_choice": "choices"},
        "guess": {**right, "doc_to_choice": "single"},
        "recite": said,
        "read": read,
        "judge": {**judged, "doc_to_choice": "single"},
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **task}))
    both = {"group": "both", "task": ["choose", "guess"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(yaml.safe_dump(both))
    return documents
