"""The verb ``lightning-moe tasks prepare``: a directory of lm-eval tasks that need no network."""

import sys
from collections.abc import Sequence

from lightning_moe.cli_errors import nearest
from lightning_moe.cli_verb import VerbParser, run_verb, verb_parser
from lightning_moe.local_tasks import LOCAL_TASKS, prepare_tasks

_VERBS = ("prepare",)


class _Parser(VerbParser):
    verb = "tasks prepare"


def main(args: Sequence[str]) -> None:
    """Runs ``lightning-moe tasks prepare`` and says where the tasks are."""
    known = "\n".join(f"For all options: lightning-moe tasks {verb} --help" for verb in _VERBS)
    if list(args[:1]) in (["-h"], ["--help"]):
        print(f"usage: lightning-moe tasks {{{','.join(_VERBS)}}} ...\n{known}")
        return
    if not args or args[0] not in _VERBS:
        got = f"invalid choice: {args[0]!r}" if args else "wanted one more word"
        meant = nearest(args[0], _VERBS) if args else None
        hint = f"\n  Did you mean {meant!r}?" if meant else ""
        sys.stderr.write(f"error: tasks: {got} (choose from {', '.join(_VERBS)}){hint}\n{known}\n")
        sys.exit(2)
    parser = verb_parser(_Parser, prepare_tasks, {"tasks"})
    names = f"Names of tasks; all if left out: {', '.join(LOCAL_TASKS)}."
    parser.add_argument("--tasks", nargs="+", type=str, action="extend", help=names)
    written, options = run_verb(parser, args[1:], prepare_tasks)
    for file in written:
        with file.with_suffix(".jsonl").open("rb") as documents:
            print(f"{file.stem:<14}  {sum(1 for _ in documents):>5} documents")
    if not written:
        print(f"{options.output} holds these tasks already; nothing was changed.")
    else:
        print(f"Written to {options.output}: give it as --include_path.")
