"""What the layers refuse, and with which messages."""

from __future__ import annotations

import pytest
from cases import ERRORS, ErrorCase


@pytest.mark.parametrize("case", ERRORS, ids=str)
def test_a_mistake_is_refused_with_where_and_what(case: ErrorCase) -> None:
    with pytest.raises(case.exception, match=case.match):
        case.call()
