"""Fixtures for the tests of the layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deploynorm.layers import _native


@pytest.fixture(params=["native", "plain"])
def way(request: pytest.FixtureRequest, require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways in which FRN runs: on the native kernels, and in plain PyTorch."""
    if request.param == "native":
        require("native")
    else:
        monkeypatch.setattr(_native, "LIBRARY", None)
    return str(request.param)
