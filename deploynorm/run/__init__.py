"""Running a network on any backend through one protocol; a backend is imported when it is first asked for."""

from deploynorm.run.backends import BACKENDS, ENGINE_SUFFIXES, available, open_runner
from deploynorm.run.base import Runner

__all__ = ["BACKENDS", "ENGINE_SUFFIXES", "Runner", "available", "open_runner"]
