"""Turning "pkg.mod:function" and its arguments into a network."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from deploynorm.errors import ModelError

_OWN = "deploynorm.models"
_EXAMPLE = f"{_OWN}.frn_resnet:resnet20"
_NAME_IT = "name the factory yourself with --factory pkg.mod:function"
_NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")


def build(name: str, kwargs: Mapping[str, Any], where: str, *, typed: bool) -> nn.Module:
    """Calls the factory of a network, "pkg.mod:function"; ModelError if it is none, fails, or makes no nn.Module.

    A name that the user did not type, which comes from a file, must be of deploynorm.models: a file must not choose
    what code runs.
    """
    if not typed:
        return _call(check_own(name, where), name, kwargs, where)
    # Console scripts, unlike `python -m`, do not look for modules where the user stands.
    with current_directory_on_path():
        return _call(_import_typed(name, where), name, kwargs, where)


def is_own(name: object) -> bool:
    """Whether a factory's module is deploynorm.models or inside it."""
    module = str(name).partition(":")[0]
    return module == _OWN or module.startswith(f"{_OWN}.")


def check_own(name: object, where: str) -> Callable[..., Any]:
    """The factory in deploynorm.models of that name, which may come from a file of unknown origin; ModelError for none.

    It must be in its module's __all__, and be an nn.Module class or a function that is declared to return one, so that
    no other function of these modules (training, reading data) can be called.
    """
    if not isinstance(name, str) or not is_own(name):
        problem = "the factory that the file names is not one of deploynorm.models"
        expected = f"a function of {_OWN}, such as {_EXAMPLE}"
        raise ModelError(where, problem, got=repr(name), expected=expected, fix=_typed_again(name, where))
    expected = f"a public function or class that makes a network, such as {_EXAMPLE}"
    refused = ModelError(where, f"{_OWN} has no such network", got=repr(name), expected=expected, fix=_NAME_IT)
    parts = re.fullmatch(r"(deploynorm\.models(?:\.[A-Za-z]\w*)*):([A-Za-z]\w*)", name, re.ASCII)
    if parts is None:
        raise refused
    try:
        module = importlib.import_module(parts[1])
    except ImportError as error:
        raise refused from error
    factory: Any = vars(module).get(parts[2])
    made: object = factory
    if inspect.isfunction(factory):
        try:
            made = typing.get_type_hints(factory).get("return")
        except NameError:
            made = None
    public = parts[2] in getattr(module, "__all__", ())
    if not (public and isinstance(made, type) and issubclass(made, nn.Module)):
        raise refused
    return typing.cast("Callable[..., nn.Module]", factory)


def split_name(name: object, where: str) -> tuple[str, str]:
    """Module and function of a factory's name; ModelError for none, or for the function itself, which no file holds."""
    if not isinstance(name, str):
        called = f"{getattr(name, '__module__', 'pkg.mod')}:{getattr(name, '__qualname__', 'function')}"
        raise ModelError(where, "factory is no text", got=repr(name), expected=f"its name, as in {called!r}")
    parts = _NAME.fullmatch(name)
    if parts is None:
        raise ModelError(where, "not a factory", got=repr(name), expected=f"pkg.mod:function, such as {_EXAMPLE}")
    return parts[1], parts[2]


def _typed_again(name: object, where: str) -> str:
    """What the user of a file is to type who trusts the factory that it names."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        return _NAME_IT
    command = f"deploynorm export {shlex.quote(where)} --factory {name}"
    own = f"if that is your own network, type its factory: {command}, or deploynorm.load(..., factory={name!r})"
    return f"{own}; a file must not choose what code runs"


@contextmanager
def current_directory_on_path() -> Iterator[None]:
    """Lets imports find modules in the current directory."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _import_typed(name: str, where: str) -> Callable[..., Any]:
    module, function = split_name(name, where)
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # the user's module may raise anything while it is imported
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        elsewhere = "run deploynorm in the folder of that module, or install it"
        fix = elsewhere if missing else f'make `python -c "import {module}"` work'
        problem = f"the factory {name} cannot be imported: {_described(error)}"
        raise ModelError(where, problem, fix=fix) from error
    for attribute in function.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            public = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            expected = f"one of {', '.join(public[:12])}" if public else None
            problem, got = f"the factory {name} does not exist", f"no {attribute!r} in {module}"
            raise ModelError(where, problem, got=got, expected=expected) from error
    if not callable(found):
        raise ModelError(where, f"the factory {name} is not callable", got=type(found).__name__, expected="a function")
    return typing.cast("Callable[..., Any]", found)


def _call(factory: Callable[..., Any], name: str, kwargs: Mapping[str, Any], where: str) -> nn.Module:
    signature = None
    with suppress(TypeError, ValueError):  # builtins have none
        signature = inspect.signature(factory)
    if signature is not None:
        try:
            signature.bind(**kwargs)
        except TypeError as error:
            problem = f"the factory {name} does not take the arguments: {error}"
            got = ", ".join(f"{key}={value!r}" for key, value in kwargs.items()) or "none"
            fix = "give them with --factory-kwargs"
            raise ModelError(where, problem, got=got, expected=f"arguments of {signature}", fix=fix) from error
    try:
        network = factory(**kwargs)
    except (Exception, SystemExit) as error:  # the user's function may raise anything
        raise ModelError(where, f"the factory {name} failed: {_described(error)}") from error
    if not isinstance(network, nn.Module):
        problem = f"the factory {name} made no network"
        raise ModelError(where, problem, got=type(network).__name__, expected="a torch.nn.Module")
    return network


def _described(error: BaseException) -> str:
    text = str(error).strip().rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
