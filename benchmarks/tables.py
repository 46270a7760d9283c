"""Writes the tables of README.md, and of the pages on routers and memory, from the results on disk, between markers.

Of each benchmark the newest run on each hardware is shown; runs of ``--quick`` are not. Older runs stay on disk.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT

README = ROOT / "README.md"
WHICH_ROUTER = ROOT.parent / "docs" / "which-router.md"
MEMORY = ROOT.parent / "docs" / "memory.md"
Record = dict[str, Any]


def newest_runs(benchmark: str) -> list[Record]:
    """Reads the newest run of a benchmark on each hardware and number of threads."""
    records = [json.loads(path.read_text()) for path in (RESULTS / benchmark).glob("*.json")]
    newest: dict[tuple[str, int], Record] = {}
    for record in sorted(records, key=lambda record: str(record["date"])):
        if not record["quick"]:
            newest[record["hardware"], record["threads"]] = record
    return [newest[key] for key in sorted(newest)]


def experts_speed(record: Record) -> list[str]:
    """Tables of time, forward time and memory."""
    lines = []
    for routing in record["config"]["routing"]:
        cases = [case for case in record["cases"] if case["routing"] == routing]
        header = ["", *(f"{case['shape']} {case['dtype']}" for case in cases)]
        for title, key in (("Forward + backward", "forward_backward"), ("Forward", "forward")):
            lines += [f"{title}, {routing} routing, CPU time over that of the dense limit:", ""]
            lines += _table(header, [[name, *(_ratio(case, name, key) for case in cases)] for name in _names(cases)])
        weighed = [name for name in _names(cases) if cases[0]["contenders"][name]["peak_bytes"] is not None]
        lines += [f"Peak of one step above its start, {routing} routing, MB:", ""]
        lines += _table(header, [[name, *(_megabytes(case, name) for case in cases)] for name in weighed])
    return lines


def _names(cases: list[Record]) -> list[str]:
    return list(cases[0]["contenders"])


def _ratio(case: Record, name: str, key: str) -> str:
    figure = case["contenders"][name][key]
    # without quartiles the figure is that of a single step
    return f"{figure['median']:.2f}" if figure["rounds"] > 1 else f"{figure['median']:.1f}*"


def _megabytes(case: Record, name: str) -> str:
    peak = case["contenders"][name]["peak_bytes"]
    return "" if peak is None else f"{peak / 1e6:.0f}"


def upcycle_memory(record: Record) -> list[str]:
    """One table, a row for each dtype."""
    header = [
        "",
        "result",
        "upcycle (CPU)",
        "memcpy (CPU)",
        "ratio of the best (CPU)",
        "ratio (CPU)",
        "ratio (wall)",
        "peak",
        "bound",
        "peak / bound",
    ]
    rows = [
        [
            case["dtype"],
            f"{case['result_bytes'] / 1e9:.2f} GB",
            f"{case['upcycle_cpu_seconds']['median']:.2f} s",
            f"{case['memcpy_cpu_seconds']['median']:.2f} s",
            f"{case['ratio_best']:.2f}" if "ratio_best" in case else "",
            _spread(case["ratio_cpu"]),
            _spread(case["ratio_wall"]),
            f"{case['peak_bytes'] / 1e9:.2f} GB",
            f"{case['bound_bytes'] / 1e9:.2f} GB",
            f"{case['peak_over_bound']:.3f}",
        ]
        for case in record["cases"]
    ]
    return _table(header, rows)


def router_cost(record: Record) -> list[str]:
    """One table, a row for each router."""
    cases = record["cases"]
    titles = ("layer / top-k layer", "router / top-k layer", "experts per token")
    header = ["router", *(f"{case['shape']}: {title}" for case in cases for title in titles), "balance losses"]
    rows = [
        [
            name,
            *(figure for case in cases for figure in _router_figures(case["routers"][name])),
            ", ".join(cases[0]["routers"][name]["balance_losses"]) or "none",
        ]
        for name in cases[0]["routers"]
    ]
    return _table(header, rows)


def _router_figures(row: Record) -> tuple[str, str, str]:
    return (
        f"{row['forward_backward']['median']:.2f}",
        f"{row['router_only']['median']:.3f}",
        f"{row['computed_per_token']:.2f}",
    )


def step_zero(record: Record) -> list[str]:
    """One table, a row for each initialiser."""
    header = [
        "",
        "parameters",
        "active",
        "similarity",
        "seconds",
        "peak",
        "result",
        "prose",
        "code",
        "logits differ by",
    ]
    rows = []
    for case in record["cases"]:
        written = "seconds" in case
        similarity = case.get("expert_similarity")
        rows.append(
            [
                case["init"],
                f"{case['parameters'][1] / 1e6:.0f} M" if written else "",
                f"{case['active_parameters'][1] / 1e6:.0f} M" if written else "",
                "" if similarity is None else f"{similarity:.3f}",
                f"{case['seconds']:.0f}" if written else "",
                f"{case['peak_bytes'] / 1e9:.2f} GB" if written else "",
                f"{case['result_bytes'] / 1e9:.2f} GB" if written else "",
                f"{case['prose_loss']:.4f}",
                f"{case['code_loss']:.4f}",
                f"{case['logit_difference']:.1e}",
            ]
        )
    return _table(header, rows)


def monitoring(record: Record) -> list[str]:
    """One row."""
    case, every = record["case"], record["config"]["log_every_n_steps"]
    header = ["a log every", "steps measured", "CPU seconds a step", "of these in the callback", "share"]
    row = [
        f"{every} steps",
        str(case["steps"]),
        f"{case['cpu_seconds_per_step']:.1f}",
        f"{case['milliseconds_per_step']:.0f} ms",
        f"{100 * case['share']:.2f} %",
    ]
    return _table(header, [row])


def zero_shot(record: Record) -> list[str]:
    """A row for each task, and one sentence on the time."""
    header = ["task", "documents", "answers", "documents that differ", "largest difference of a log p", "dense", "±"]
    rows = []
    for case in record["cases"]:
        metric = next(name for name in ("acc_norm", "acc") if name in case["scores"])
        rows.append(
            [
                f"{case['task']}, {metric}",
                str(case["documents"]),
                str(case["answers"]),
                str(case["documents_that_differ"]),
                f"{case['log_probability_difference']:.1e}",
                f"{100 * case['scores'][metric]:.1f}",
                f"{100 * case['scores'][f'{metric}_stderr']:.1f}",
            ]
        )
    calls = [record[name] for name in ("first_call", "second_call")]
    spent = [f"{c['other_cpu']:.2f} of {c['cpu']:.1f} CPU seconds ({c['documents']} documents)" for c in calls]
    return [*_table(header, rows), f"Not in the forward: {spent[0]} in the first call, {spent[1]} in the second.", ""]


def _spread(figure: dict[str, float]) -> str:
    return f"{figure['median']:.2f} [{figure['q1']:.2f}, {figure['q3']:.2f}]"


def four_bit_memory(record: Record) -> list[str]:
    """One table, a column for each case."""
    cases = record["cases"]
    header = ["MB", *(f"{case['weights']}, {case['optimizer']}" for case in cases)]
    rows = [[part, *(f"{case['parts'][part] / 1e6:.1f}" for case in cases)] for part in cases[0]["parts"]]
    for label, key in (("model", "model_bytes"), ("optimizer's states", "state_bytes"), ("step, peak", "peak_bytes")):
        rows.append([label, *(f"{case[key] / 1e6:.1f}" for case in cases)])
    return _table(header, rows)


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _provenance(record: Record) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    changed = " with uncommitted changes" if record["src_differs_from_commit"] else ""
    rounds = record["config"]["rounds"]
    return (
        f"{record['hardware']}; {record['threads']} thread; {versions}; commit {record['commit'][:8]}{changed}; "
        f"seed {record['seed']}; {rounds} rounds; {record['date'][:10]}; {record['wall_seconds']:.0f} s in all."
        f"{' ' + record['note'] if 'note' in record else ''}"
    )


BENCHMARKS: dict[str, tuple[Callable[[Record], list[str]], tuple[Path, ...]]] = {
    "experts_speed": (experts_speed, (README,)),
    "router_cost": (router_cost, (README, WHICH_ROUTER)),
    "upcycle_memory": (upcycle_memory, (README,)),
    "step_zero": (step_zero, (README,)),
    "monitoring": (monitoring, (README,)),
    "zero_shot": (zero_shot, (README,)),
    "four_bit_memory": (four_bit_memory, (README, MEMORY)),
}


def main() -> None:
    for benchmark, (tables, pages) in BENCHMARKS.items():
        lines = []
        for record in newest_runs(benchmark):
            lines += [*tables(record), _provenance(record), ""]
        body = "\n".join(["", *(lines or ["No run yet.", ""]), ""])
        marked = re.compile(rf"(<!-- {benchmark}: generated by tables.py -->).*?(<!-- end -->)", re.DOTALL)
        for page in pages:
            text = page.read_text()
            if not marked.search(text):
                raise ValueError(f"{page}: no markers for {benchmark}; put the two comments where its tables belong.")
            page.write_text(marked.sub(lambda match, body=body: f"{match[1]}\n{body}{match[2]}", text))  # type: ignore[misc]


if __name__ == "__main__":
    main()
