"""Forward processes q and their reverse steps. They know no network: logits come in, states go out."""

from di4c_ext.process.absorbing import AbsorbingProcess
from di4c_ext.process.base import Process
from di4c_ext.process.gaussian import GaussianProcess
from di4c_ext.process.schedules import SCHEDULES
from di4c_ext.process.uniform import UniformProcess

__all__ = ["SCHEDULES", "AbsorbingProcess", "GaussianProcess", "Process", "UniformProcess"]
