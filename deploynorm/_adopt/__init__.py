"""Layers of other projects -> ours."""

from deploynorm._adopt.adopting import adopt, adopted
from deploynorm._adopt.report import AdoptReport, AdoptResult, adopted_notes

__all__ = ["AdoptReport", "AdoptResult", "adopt", "adopted", "adopted_notes"]
