"""The command line: one file a verb; here the verbs are listed, parsed and called.

Nothing here imports torch, so that `--help` answers at once: a verb's module imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn, TextIO

import deploynorm
from deploynorm.cli import build, check, doctor, export, fold, inspect, plugins, rewrite, run
from deploynorm.errors import DeployNormError
from deploynorm.packages import naming_missing_packages

__all__ = ["main"]

# In the order of the pipeline, which is the order of --help.
_VERBS = {
    "fold": fold,
    "export": export,
    "rewrite": rewrite,
    "build": build,
    "check": check,
    "run": run,
    "inspect": inspect,
    "plugins": plugins,
    "doctor": doctor,
}

_EXIT_CODES = """
exit codes: 0 done and parity holds, 1 parity broken, 2 usage or bad model, 3 something is missing on this machine
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings(), naming_missing_packages():
            warnings.showwarning = _show_warning
            return int(options.run(options))
    except DeployNormError as error:
        print(f"deploynorm {options.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"deploynorm {options.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, `head` for one, has gone
        sys.stderr.close()
        return 0
    except Exception:
        traceback.print_exc()
        print("This is a fault of deploynorm: please report it with the lines above.", file=sys.stderr)
        return 70  # EX_SOFTWARE; 1 would say that parity is broken


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as a sentence, without the line of code that it came from."""
    print(message, file=sys.stderr)


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
        summary, _, rest = (module.__doc__ or "").partition("\n")
        verb = verbs.add_parser(
            name,
            help=summary,
            description=summary + "\n" + rest,
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser
