from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest


@pytest.mark.parametrize(
    ("required", "outcome"), [("native,trt", pytest.skip.Exception), ("ort,trt", pytest.fail.Exception)]
)
def test_a_missing_backend_skips_with_its_reason_unless_it_is_required(
    required: str, outcome: type[BaseException], require: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("DEPLOYNORM_REQUIRE", required)
    # Both are caught, so that a wrong skip fails this test and does not skip it.
    with pytest.raises(
        (pytest.skip.Exception, pytest.fail.Exception), match="ort: onnxruntime is not installed"
    ) as got:
        require("ort")
    assert got.type is outcome
