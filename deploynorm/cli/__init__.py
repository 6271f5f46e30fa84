"""The command line: one file a verb; here the verbs are listed, parsed and called.

Nothing here imports torch, so that `--help` answers at once: a verb's module imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import deploynorm
from deploynorm.cli import build, check, doctor, export, fold, inspect, options, plugins, rewrite, run
from deploynorm.cli.terminal import Terminal
from deploynorm.errors import DeployNormError
from deploynorm.packages import naming_missing_packages

__all__ = ["main"]

_VERBS: Final[dict[str, Any]] = {
    module.__name__.rpartition(".")[2]: module
    for module in (fold, export, rewrite, build, check, run, inspect, plugins, doctor)
}
"""In the order of the pipeline, which is the order of --help. Each has `add_arguments`, and `run`, which takes a
Terminal and by name the options that `add_arguments` added, and returns the exit code, or None for 0."""

_EXIT_CODES = """
exit codes: 0 done and parity holds, 1 parity broken, 2 usage or bad model, 3 something is missing on this machine
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    given = vars(_parser().parse_args(arguments))
    verb = given.pop("verb")
    terminal = Terminal(quiet=given.pop("quiet"), verbose=given.pop("verbose"), json=given.pop("json"))
    try:
        with warnings.catch_warnings(), naming_missing_packages():
            warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr)  # without its line of code
            for name, parse in options.PARSED.items():
                if name in given:
                    given[name] = parse(given[name] or ())
            return _VERBS[verb].run(terminal, **given) or 0
    except DeployNormError as error:
        print(f"deploynorm {verb}: {str(error).removeprefix(f'{verb}: ')}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"deploynorm {verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` for one, has gone
        sys.stderr.close()
        return 0
    except Exception:
        traceback.print_exc()
        print("This is a fault of deploynorm: please report it with the lines above.", file=sys.stderr)
        return 70  # EX_SOFTWARE; 1 would say that parity is broken


class _Parser(argparse.ArgumentParser):
    """A parser that reports a wrong argument in a line, and points at its help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="deploynorm",
        description="Takes a CNN with FRN or MABN layers from model.pt to a checked ONNX file and a TensorRT engine.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"deploynorm {deploynorm.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in _VERBS.items():
        text = str(module.__doc__)
        verb = verbs.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(verb)
        options.add_output_control(verb)
    return parser
