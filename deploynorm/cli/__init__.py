"""The command line: one file a verb; here the verbs are listed, parsed and called.

Nothing here imports torch, so that `--help` answers at once: a verb's module imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from traceback import walk_stack
from types import FrameType
from typing import Any, Final, NoReturn

import deploynorm
from deploynorm.cli import build, check, doctor, export, fold, import_, inspect, options, plugins, rewrite, run
from deploynorm.cli.terminal import Terminal, steady_output
from deploynorm.errors import DeployNormError, InputError
from deploynorm.packages import naming_missing_packages

__all__ = ["main"]

atexit.register(gc.freeze)  # or Python would look through all of torch for garbage before it ends

_VERBS: Final[dict[str, Any]] = {
    module.__name__.rpartition(".")[2].rstrip("_"): module
    for module in (import_, fold, export, rewrite, build, check, run, inspect, plugins, doctor)
}
"""In the order of the pipeline, which is the order of --help. Each has `add_arguments`, and `run`, which takes a
Terminal and by name the options that `add_arguments` added, and returns the exit code, or None for 0."""

_EXIT_CODES = """
exit codes: 0 done and parity holds, 1 parity broken, 2 usage or bad model, 3 something is missing on this machine
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb to its end, whatever becomes of what it prints, and returns the exit code."""
    with steady_output() as lost:
        code = _main(arguments)
    if lost and code == 0:
        print(f"deploynorm: standard output: cannot write there: {lost[0].strerror}", file=sys.stderr)
        return 2
    return code


def _main(arguments: Sequence[str] | None) -> int:
    try:
        given = vars(_parser().parse_args(arguments))
    except SystemExit as stop:  # after --help, or a wrong argument
        return int(stop.code or 0)
    verb, ending = given.pop("verb"), given.pop("ending", None)
    try:
        with _terminable(), warnings.catch_warnings(), naming_missing_packages():
            warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr)  # without its line of code
            if ending is not None and given["output"] is None:
                ending = ending(given)
                given["output"] = given["model"].with_suffix(ending)
                if given["output"] == given["model"]:
                    raise InputError(str(given["model"]), f"ends in {ending} already, as what {verb} writes does")
            options.check_files(given)
            for name, parse in options.PARSED.items():
                if name in given:
                    given[name] = parse(given[name] or ())
            terminal = Terminal(quiet=given.pop("quiet"), verbose=given.pop("verbose"), json=given.pop("json"))
            return _VERBS[verb].run(terminal, **given) or 0
    except DeployNormError as error:
        return _failed(verb, str(error).removeprefix(f"{verb}: "), error.exit_code)
    except _Terminated as stop:
        return _failed(verb, f"ended by {stop.signal.name}", 128 + stop.signal)
    except KeyboardInterrupt:
        return _failed(verb, "interrupted", 128 + signal.SIGINT)
    except OSError as error:  # a file that has gone meanwhile, a full disk of temporary files
        of = "" if error.filename is None else f" ({os.fsdecode(error.filename)})"
        return _failed(verb, f"cannot read or write a file: {error.strerror or error}{of}", 2)
    except Exception:
        traceback.print_exc()
        print("This is a fault of deploynorm: please report it with the lines above.", file=sys.stderr)
        return 70  # EX_SOFTWARE; 1 would say that parity is broken


def _failed(verb: str, problem: str, code: int) -> int:
    print(f"deploynorm {verb}: {problem}", file=sys.stderr)
    return code


_IMPORT_SECONDS: Final = 5
"""How long a signal waits for an import, which may be of the user's own module and may never end."""


class _Terminated(KeyboardInterrupt):
    """A signal was sent to end the process; what it has begun is cleaned up as after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


@contextmanager
def _terminable() -> Iterator[None]:
    """Raises _Terminated for signals that would end the process at once, with its unfinished files left behind.

    An import is waited for, some seconds: a compiled module prints the exception, or makes another error of it.
    """
    received = dict[int, float]()

    def stop(number: int, frame: FrameType | None) -> None:
        since = received.setdefault(number, time.monotonic())
        importing = any(each.f_code.co_filename.startswith("<frozen importlib") for each, _ in walk_stack(frame))
        if not importing or time.monotonic() - since > _IMPORT_SECONDS:
            raise KeyboardInterrupt if number == signal.SIGINT else _Terminated(number)
        again = threading.Timer(0.05, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()

    in_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT) if in_main else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    taken = {n: handler for n, handler in handlers.items() if handler in (signal.SIG_DFL, signal.default_int_handler)}
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    except Exception as error:
        if received:
            raise _Terminated(next(iter(received))) from error
        raise
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)


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
