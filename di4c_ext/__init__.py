"""di4c_ext: distil discrete-diffusion teachers into few-step mixture students.

`import di4c_ext` brings in torch and numpy alone: `di4c_ext.ops` (the kernels as PyTorch operators) and
`di4c_ext.random` (per-sample keys). The layers above are imported by name: `di4c_ext.process`,
`di4c_ext.models`, `di4c_ext.loss`, `di4c_ext.sampler`, `di4c_ext.trainer`, `di4c_ext.metrics`.
"""

from di4c_ext import ops, random

__version__ = "0.1.0"
__all__ = ["__version__", "ops", "random"]
