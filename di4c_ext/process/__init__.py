"""Forward processes q and their reverse steps. They know no network: logits come in, states go out."""

from di4c_ext.process.absorbing import SCHEDULES, AbsorbingProcess
from di4c_ext.process.base import Process

__all__ = ["SCHEDULES", "AbsorbingProcess", "Process"]
