"""The published settings of the Di4C objective, by the name of the system: `Di4CObjective.preset(name)`."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Discretised Gaussian diffusion of CIFAR-10's pixels. There the L latents of a sample are drawn apart, uniformly.
    "pixels": {
        "num_latents": 16,
        "data": 1.0,
        "distillation_rows": 16,
        "time_min": 0.01,
        "window": 0.02,
        "step_min": 0.001,
        "step_max": 0.01,
        "step_law": "log_uniform",
        "target_dropout": True,
    },
    # Masked codes of ImageNet pictures, to go with ConfidenceProcess(1025, mask_id=1024). There t is uniform, the step
    # is as long as the window, and L_distil weighs as much as its window is rare: with another window give
    # distillation = 1 / window, window_share = window and the same step. data = 0 leaves the correlation at the data
    # out. Published accumulation kept the last micro-batch alone; here all of them add up.
    "tokens": {
        "num_latents": 32,
        "distillation": 20.0,
        "clean_positions": True,
        "window": 0.05,
        "window_share": 0.05,
        "step_min": 0.05,
        "step_max": 0.05,
        "step_share": 1.0,
    },
    # Masked diffusion language models. t lies on the grid of 1,024 steps, one of which the teacher takes; the latents
    # are uniform. The published code moves x_t's time along its grid twice; here it is moved once.
    "language": {
        "num_latents": 16,
        "data": 0.1,
        "window": 0.02,
        "window_share": 0.3,
        "step_min": 1 / 1024,
        "step_max": 1 / 1024,
        "time_grid": 1024,
    },
}
