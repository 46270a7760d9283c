"""Writes the tables and plots of a suite from the cells that `run.py` left: tables.md, tables.tex and PNGs beside them.

Suites may be incomplete, with failed runs among them: the page says so. It tells which differences are resolved by
paired tests, corrected for their number, and which are not.
"""

import argparse
import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path


def main() -> None:
    """Runs the command."""
    # not for who wanted the package of the same name
    from suite_page import write_page

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", required=True, help="a name in benchmarks/suites, or a YAML's path")
    parser.add_argument("--results", type=Path, help="where the records are (default: beside the suites)")
    args = parser.parse_args()
    try:
        written = write_page(args.suite, args.results)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(map(str, written)))


def _give_way() -> None:
    # The folder of a running script comes first in the search for modules, so that sacrebleu, which lm-eval imports,
    # and PyTorch find this file in the place of the package tabulate.
    others = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
    found = PathFinder.find_spec(__name__, others)
    if found is None or found.loader is None:
        raise ModuleNotFoundError(f"No module named {__name__!r}", name=__name__)
    sys.modules[__name__] = module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)


if __name__ == "__main__":
    main()
else:
    _give_way()
