"""Forward processes q and their reverse steps. They know no network: logits come in, states go out."""

from di4c_ext.process.absorbing import AbsorbingProcess
from di4c_ext.process.base import Process
from di4c_ext.process.confidence import ConfidenceProcess
from di4c_ext.process.gaussian import GaussianProcess
from di4c_ext.process.named import LEVEL_PROCESSES, PROCESSES, process_from
from di4c_ext.process.schedules import SCHEDULES
from di4c_ext.process.uniform import UniformProcess

__all__ = [
    "LEVEL_PROCESSES",
    "PROCESSES",
    "SCHEDULES",
    "AbsorbingProcess",
    "ConfidenceProcess",
    "GaussianProcess",
    "Process",
    "UniformProcess",
    "process_from",
]
