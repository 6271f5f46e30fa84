"""Our own checkpoint: a dict of tensors and plain data that torch.load(weights_only=True) reads."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deploynorm.checkpoint._factory import check_own, is_own, split_name
from deploynorm.checkpoint._find import is_extra_state, is_state_dict
from deploynorm.errors import InputError, ModelError
from deploynorm.files import as_path, staging
from deploynorm.image import ImageSpec
from deploynorm.trace import check_network

_FORMAT = "deploynorm"
_REQUIRED = ("format", "factory", "kwargs", "state_dict")
_OPTIONAL = ("input", "labels", "training")
_MOST, _DEEPEST = 1_000_000, 50
"""How many values plain data may have, and how many may be inside each other."""

_PLAIN = "text, numbers, None, and lists and dicts of them"


def save(
    path: Path | str,
    *,
    factory: str,
    kwargs: Mapping[str, Any] | None = None,
    model: nn.Module,
    image: ImageSpec | None = None,
    labels: Sequence[str] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint that `load` and every command read: weights, and how the network is made.

        # nets.py has def unet(width: int) -> nn.Module
        deploynorm.save("own.pt", factory="nets:unet", kwargs={"width": 16}, model=network)

        deploynorm export own.pt --factory nets:unet                # in the folder of nets.py, or where it is installed
        deploynorm.load("own.pt", factory="nets:unet")

    A network of your own requires the factory to be typed again, as here, because a file must not choose what code
    runs; its arguments come from the file. One of deploynorm.models does not. A failure leaves an old file whole.

    Args:
        path: The file.
        factory: "pkg.mod:function", which makes the network when it is called with kwargs.
        kwargs: Its keyword arguments, plain data; none by default.
        model: The network whose parameters and buffers are written.
        image: How an image becomes its input. Commands take the input's shape from it, and read images.
        labels: Name of each class, which `deploynorm run` prints.
        training: What is to be known of the training, plain data.

    Raises:
        InputError: kwargs or training is not plain data, labels are not text, or the file cannot be written.
        ModelError: factory is not such a name, or deploynorm.models has no such factory.
    """
    path = as_path("save", path)
    where = f"save {path}"
    check_network(model)
    given = {"kwargs": (kwargs, Mapping), "image": (image, ImageSpec), "training": (training, Mapping)}
    for option, (value, expected) in given.items():
        if not (value is None or isinstance(value, expected)):
            problem = f"{option} is of another type"
            raise InputError(where, problem, got=type(value).__name__, expected=expected.__name__)
    if is_own(factory):
        check_own(factory, where)
    else:
        split_name(factory, where)
    content = {
        "format": _FORMAT,
        "factory": factory,
        "kwargs": dict(kwargs or {}),
        "input": None if image is None else image.to_dict(),
        "labels": None if labels is None else list(labels),
        "state_dict": _on_cpu(model.state_dict()),
    }
    if training is not None:
        content["training"] = dict(training)
    for name, kind in _odd(content):
        raise InputError(where, f"{name} is not plain data", got=kind, expected=_PLAIN)
    archive = io.BytesIO()  # torch.save's own errors do not tell of a full disk
    torch.save(content, archive)
    with staging(path) as folder:
        (folder / path.name).write_bytes(archive.getbuffer())


def unpacked(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What `save` was given and wrote as this dict; ModelError if a key is missing, unknown or of another kind."""
    missing = [key for key in _REQUIRED if key not in content]
    unknown = [repr(key) for key in content if key not in _REQUIRED + _OPTIONAL]
    if missing or unknown:
        wrong = (("without", missing), ("with", unknown))
        got = "; ".join(f"{kind} {', '.join(keys)}" for kind, keys in wrong if keys)
        expected = f"{', '.join(_REQUIRED)}, and perhaps {', '.join(_OPTIONAL)}"
        raise ModelError(where, "not a whole deploynorm checkpoint", got=got, expected=expected)
    for name, kind in _odd(content):
        raise ModelError(where, f"its {name} is not plain data", got=kind, expected=_PLAIN)
    try:
        image = None if content.get("input") is None else ImageSpec.from_dict(content["input"])
    except InputError as error:
        problem = f"its {error.where} is wrong: {error.problem}"
        raise ModelError(where, problem, got=error.got, expected=error.expected) from error
    tensors, labels = content["state_dict"], content.get("labels")
    if not is_state_dict(tensors):
        raise ModelError(where, "its state_dict is none", got=outline(tensors), expected="tensors by their names")
    labels = None if labels is None else tuple(labels)
    return {"training": None, **content, "image": image, "labels": labels}


def _on_cpu(state: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """A state dict on the CPU, apart from the network, with the versions of the layers (_metadata)."""
    result = OrderedDict(
        (name, value.detach().cpu() if isinstance(value, Tensor) else value) for name, value in state.items()
    )
    vars(result)["_metadata"] = getattr(state, "_metadata", OrderedDict())
    return result


def is_own_format(content: object) -> bool:
    """Whether what a file holds claims to be a deploynorm checkpoint."""
    return isinstance(content, Mapping) and isinstance(name := content.get("format"), str) and name == _FORMAT


def outline(content: object) -> str:
    """What an object is, for a message: a dict with its first keys, or its type."""
    if not isinstance(content, Mapping):
        return type(content).__name__
    items = [f"{key!r} ({type(value).__name__})" for key, value in [*content.items()][:8]]
    return f"a dict of {len(content)}: {', '.join(items)}" if items else "an empty dict"


def _odd(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and type of each value of kwargs, labels, training and layers' extra state that is none of their kinds."""
    state = content["state_dict"]
    for name in filter(is_extra_state, state) if isinstance(state, Mapping) else ():
        yield from _odd_inside(state[name], f"state_dict.{name}", Tensor)
    for key, kind in (("kwargs", dict), ("labels", list | tuple), ("training", dict)):
        value = content.get(key)
        if value is None and key != "kwargs":
            continue
        if not isinstance(value, kind):
            yield key, type(value).__name__
        elif key == "labels":
            texts = enumerate(value)
            yield from ((f"labels[{at}]", type(text).__name__) for at, text in texts if not isinstance(text, str))
        else:
            yield from _odd_inside(value, key)


def _odd_inside(value: object, name: str, *also: type) -> Iterator[tuple[str, str]]:
    todo, whole = [(value, name, 0)], name
    for _ in range(_MOST):  # what is shared counts each time, and what holds itself comes to no end
        if not todo:
            return
        value, name, depth = todo.pop()
        inside: list[tuple[str, object]] = []
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            inside = [(f"{name}.{key}", item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            inside = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
        elif not (value is None or isinstance(value, (str, int, float, *also))):
            yield name, type(value).__name__
        if inside and depth == _DEEPEST:
            break
        todo += [(item, inner, depth + 1) for inner, item in reversed(inside)]
    yield whole, f"more than {_MOST:,} values, or more than {_DEEPEST} inside each other"
