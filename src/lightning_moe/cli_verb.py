"""What the verbs of ``lightning-moe`` share: a parser made of a function's arguments, and how they end."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NoReturn

from jsonargparse import ArgumentParser, Namespace

from lightning_moe.cli_errors import config_error, exit_if_refused, wants_traceback


class VerbParser(ArgumentParser):
    """Tells what is wrong with an option in a few lines."""

    verb: ClassVar[str]
    """As it is typed behind ``lightning-moe``."""

    known: ClassVar[Sequence[type]] = ()
    """The classes that options may name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program; in the parser of a class's arguments, raises for the one around it."""
        found = config_error(self, message, ex, self.known)
        if not self.exit_on_error:
            raise found from ex
        if ex is not None and wants_traceback():
            raise ex
        sys.stderr.write(f"error: {found}\nFor all options: lightning-moe {self.verb} --help\n")
        sys.exit(2)


def verb_parser(kind: type[VerbParser], function: Callable[..., Any], skip: set[str | int]) -> VerbParser:
    """A parser with the arguments of a function, but for those in ``skip``, and with ``--config_file``."""
    description = str(inspect.getdoc(function)).partition("\n\nArgs:")[0]
    parser = kind(prog=f"lightning-moe {kind.verb}", description=description, allow_abbrev=False)
    parser.add_argument("--config_file", action="config", help="YAML with all these options.")
    parser.add_function_arguments(function, skip=skip)
    return parser


def run_verb(parser: VerbParser, args: Sequence[str], function: Callable[..., Any]) -> tuple[Any, Namespace]:
    """Calls the function with the options given; what is refused ends the program with one line.

    Returns:
        What the function returned, and the options.
    """
    given = parser.parse_args(list(args))
    try:
        options = vars(parser.instantiate(given))
        del options["config_file"]
        return function(**options), given
    except Exception as error:
        exit_if_refused(error, given)
        raise
