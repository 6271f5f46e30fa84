"""Reading model.pt without running code that it names, writing our own checkpoints, and importing other projects'."""

from deploynorm.checkpoint._import import Import, import_checkpoint
from deploynorm.checkpoint._load import Checkpoint, load
from deploynorm.checkpoint._own import save
from deploynorm.checkpoint._translate import translate
from deploynorm.checkpoint._translation import Translation

__all__ = ["Checkpoint", "load", "save", "translate", "Translation", "import_checkpoint", "Import"]
