"""Reading model.pt without running code that it names, and writing our own checkpoints."""

from deploynorm.checkpoint._load import Checkpoint, load
from deploynorm.checkpoint._own import save

__all__ = ["Checkpoint", "load", "save"]
