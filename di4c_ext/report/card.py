"""README.md of the output folder: a model card with the figures and how to use the student."""

from __future__ import annotations

from di4c_ext.report.facts import FIGURES, Facts, headline, latent_verdict, number, plural

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

A masked-diffusion student of {parameters:,} parameters, distilled by Di4C (arXiv 2410.08709) from a teacher of
{teacher_parameters:,}. Images of {shape}, {num_states} states a pixel. {latents}

## Use

```python
from di4c_ext.evaluate import generate
from di4c_ext.models import CompactDenoiser

student = CompactDenoiser.from_pretrained("{folder}").eval()
images = generate(student, num_steps=4, num_samples=64, seed=0).reshape(-1, {shape_tuple})
```

    python -m di4c_ext.sample --model {folder} --num_steps 4 --num_samples 64 --seed 0

## Figures

{protocol}

{tables}

## Likelihood of the teacher

Bound in nats an image: {train_bound:.1f} on training images, {heldout_bound:.1f} on held-out ones.

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


def protocol(facts: Facts) -> str:
    """What the figures stand on: samples, seeds, references, the feature space."""
    sizes = facts.results["sizes"]
    accuracy = facts.results["accuracy"]
    space = (
        "Features: the 32 of a small classifier trained on the labels of the training images "
        f"(right on {accuracy:.1%} of the held-out ones). "
        if accuracy is not None
        else "The images carry no labels, so there is no feature space. "
    )
    return (
        f"{facts.num_samples:,} samples for each figure, ancestral sampling in float32 logits at temperature 1, "
        f"seeds {', '.join(map(str, facts.seeds))}. {space}"
        f"Distances are to all {sizes['all']:,} real images, or to the {sizes['heldout']:,} held-out ones alone. "
        "Floor: real against real, two halves of all images (mean of 10 cuts); for the held-out figures, the "
        f"{sizes['train']:,} training images against the held-out ones."
    )


def model_card(facts: Facts) -> str:
    """Markdown with YAML metadata, as model hubs read it."""
    shape = facts.images.shape
    bounds = facts.results["bounds"]
    return TEMPLATE.format(
        dataset=facts.images.name,
        headline=headline(facts),
        parameters=facts.num_parameters,
        teacher_parameters=facts.teacher_parameters,
        shape=" x ".join(map(str, shape)),
        shape_tuple=", ".join(map(str, shape)),
        num_states=facts.images.num_states,
        latents=latent_verdict(facts),
        folder=facts.settings.get("output_dir", "runs/digits"),
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
    for model in ("teacher", "student"):
        means = [number(facts.mean(model, n, figure)) for n in facts.steps]
        lines.append(f"| {model}, mean | " + " | ".join(means) + " |")
        for i, seed in enumerate(facts.seeds):
            cells = [number(facts.values(model, n, figure)[i]) for n in facts.steps]
            lines.append(f"| {model}, seed {seed} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"({plural(facts.num_samples, 'sample')} each)"])
