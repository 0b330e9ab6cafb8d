"""README.md of the output folder: a model card with the figures and how to use the student."""

from __future__ import annotations

from di4c_ext.metrics.features import num_features
from di4c_ext.metrics.judge import CUTS
from di4c_ext.report.facts import FIGURES, Facts, cast, headline, latent_verdict, number, plural

TEMPLATE = """---
library_name: di4c_ext
tags:
- di4c
- discrete-diffusion
- distillation
datasets:
- {dataset}
---

# A few-step mixture student of {dataset}

{headline}.

A student of {parameters:,} parameters for {diffusion} diffusion, distilled by Di4C (arXiv 2410.08709) from a teacher of
{teacher_parameters:,}. Images of {shape}, {num_states} states a pixel. {latents}

## Use

```python
{use}
```

    python -m di4c_ext.sample --model {folder} --num_steps {num_steps} --num_samples 64 --seed 0

## Figures

{protocol}

{tables}

## What the teacher knows

{bounds_name}: {train_bound:.1f} on training images, {heldout_bound:.1f} on held-out ones.

## Citation

```bibtex
@inproceedings{{hayakawa2025distillation,
  title  = {{Distillation of Discrete Diffusion through Dimensional Correlations}},
  author = {{Hayakawa, Satoshi and Takida, Yuhta and Imaizumi, Masaaki and Wakaki, Hiromi and Mitsufuji, Yuki}},
  booktitle = {{International Conference on Machine Learning}},
  year   = {{2025}}
}}
```
"""


_USE = """from di4c_ext.data import as_images
from di4c_ext.generate import generate, open_model

student = open_model("{folder}", is_student=True)
images = as_images(generate(student, {num_steps}, 64, seed=0), ({shape_tuple}), "{layout}")"""

_USE_OF_CODES = """from di4c_ext.codes import Decoder, vq_beside
from di4c_ext.data import as_images
from di4c_ext.generate import generate, open_model

student, decode = open_model("{folder}", is_student=True), Decoder(vq_beside("{folder}"))
images = as_images(decode(generate(student, {num_steps}, 64, seed=0)), ({shape_tuple}))"""


def protocol(facts: Facts) -> str:
    """What the figures stand on: samples, seeds, references, the feature space."""
    sizes = facts.results["sizes"]
    how = {
        "ancestral": "ancestral sampling",
        "confidence": "the surest codes first",
        "analytic": "posterior steps on an even grid from 1 to 0.01 and, there, the last denoising "
        + ("to the likeliest levels" if facts.settings.get("final", "argmax") == "argmax" else "by a draw"),
    }[facts.sampler]
    return " ".join(
        part
        for part in (
            f"{facts.num_samples:,} samples for each figure, {how}, temperature "
            f"{facts.settings.get('temperature', 1.0):g}, seeds {', '.join(map(str, facts.seeds))}.",
            cast(facts),
            _codes(facts),
            _space(facts),
            f"Distances are to all {sizes['all']:,} real images, or to the {sizes['heldout']:,} held-out ones alone. "
            "A distance falls with the number of samples, so its floor is real against real at this number: as many "
            "real images, at most half of them, against all the others; for the held-out figures, as many training "
            f"images against the held-out ones. Floors, and what real images score, are means of {CUTS} choices.",
        )
        if part
    )


def _codes(facts: Facts) -> str:
    best = facts.results.get("reconstructions", {}).get(facts.main_figure)
    if best is None:
        return ""
    return f"Samples are codes, decoded to pixels; real images that come back from their own codes score {best:.2f}."


def _space(facts: Facts) -> str:
    named, accuracy = facts.settings.get("eval_feature_extractor"), facts.results["accuracy"]
    if named is not None:
        return f"Features: those of the image classifier {named}."
    if accuracy is None:
        return "The images carry no labels, so there is no feature space."
    return (
        f"Features: the {num_features(facts.images.shape)} of a small classifier trained on the labels of the training "
        f"images (right on {accuracy:.1%} of the held-out ones)."
    )


def model_card(facts: Facts) -> str:
    """Markdown with YAML metadata, as model hubs read it."""
    shape, folder = facts.images.shape, facts.settings.get("output_dir", "runs/digits")
    bounds = facts.results["bounds"]
    num_steps = 4 if 4 in facts.steps else facts.steps[0]
    use = _USE_OF_CODES if facts.sampler == "confidence" else _USE
    return TEMPLATE.format(
        use=use.format(
            folder=folder,
            num_steps=num_steps,
            shape_tuple=", ".join(map(str, shape)),
            layout=facts.images.layout,
        ),
        dataset=facts.images.name,
        headline=headline(facts),
        parameters=facts.num_parameters,
        teacher_parameters=facts.teacher_parameters,
        shape=" x ".join(map(str, shape)),
        diffusion=facts.diffusion,
        num_steps=num_steps,
        bounds_name=facts.bounds_name[0].upper() + facts.bounds_name[1:],
        num_states=facts.images.num_states,
        latents=latent_verdict(facts),
        folder=folder,
        protocol=protocol(facts),
        tables="\n\n".join(_table(facts, figure) for figure in facts.figures),
        train_bound=bounds["train"],
        heldout_bound=bounds["heldout"],
    )


def _table(facts: Facts, figure: str) -> str:
    title, unit = FIGURES[figure]
    floor = facts.results["floors"].get(figure)
    lines = [
        f"**{title}**" + (f" ({unit})" if unit else "") + (f", real {number(floor)}" if floor is not None else ""),
        "",
        "| steps | " + " | ".join(map(str, facts.steps)) + " |",
        "|---|" + "---|" * len(facts.steps),
    ]
    for model in facts.models:
        means = [number(facts.mean(model, n, figure)) for n in facts.steps]
        lines.append(f"| {model}, mean | " + " | ".join(means) + " |")
        for i, seed in enumerate(facts.seeds):
            cells = [number(facts.values(model, n, figure)[i]) for n in facts.steps]
            lines.append(f"| {model}, seed {seed} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"({plural(facts.num_samples, 'sample')} each)"])
