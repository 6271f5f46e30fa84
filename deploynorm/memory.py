"""Whether arrays fit into this machine's memory: asked first, for the system promises more than it has."""

from __future__ import annotations

import os

from deploynorm.errors import InputError


def check_fits(where: str, size: int, got: object) -> None:
    """InputError where `size` bytes, which `got` takes, are more than this machine has."""
    try:
        most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return
    if size > most:
        expected = f"at most {most / 2**30:.0f} GiB, the memory of this machine"
        raise InputError(where, f"takes {size / 2**30:,.0f} GiB", got=got, expected=expected)
