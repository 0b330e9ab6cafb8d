"""README.md of the output folder: a model card with the figures and how to use the student."""

from __future__ import annotations

from di4c_ext.metrics.features import num_features
from di4c_ext.metrics.judge import CUTS, PAIRED
from di4c_ext.metrics.manifold import DENSITY_K, PRECISION_K
from di4c_ext.metrics.mauve import CLUSTERINGS
from di4c_ext.report.facts import FIGURES, Facts, cast, headline, latent_verdict, number, plural, public_name
from di4c_ext.text import TextTokens

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
{teacher_parameters:,}. {examples} of {kind}. {latents}

## Use

```python
{use}
```

    python -m di4c_ext.sample --model {folder} --num_steps {num_steps} --num_samples 64 --seed 0

## Figures

{protocol}

{tables}

## What the teacher knows

{bounds}

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


# How generative perplexity is taken, by --eval_protocol; as `metrics.perplexity` has it.
_PROTOCOLS = {
    "retokenized": "of the text of the first {read} samples in its own tokens, all of which count alike",
    "first_chunk": "of the first chunk of the text of the first {read} samples in its own tokens, as MDLM takes it",
    "ids": "of the first {read} samples as they were drawn, the mean over them of their means, as SDTT takes it",
}

_USE = """from di4c_ext.data import as_images
from di4c_ext.generate import generate, open_model

student = open_model("{folder}", is_student=True)
images = as_images(generate(student, {num_steps}, 64, seed=0), ({shape_tuple}), "{layout}")"""

_USE_OF_CODES = """from di4c_ext.codes import Decoder, vq_beside
from di4c_ext.data import as_images
from di4c_ext.generate import generate, open_model

student, decode = open_model("{folder}", is_student=True), Decoder(vq_beside("{folder}"))
images = as_images(decode(generate(student, {num_steps}, 64, seed=0)), ({shape_tuple}))"""


_USE_OF_TEXT = """from di4c_ext.generate import generate, open_model
from di4c_ext.text_sources import cutter_of

student, cutter = open_model("{folder}", is_student=True), cutter_of("{folder}")
texts = [cutter.decode(row) for row in generate(student, {num_steps}, 4, seed=0).tolist()]"""


def protocol(facts: Facts) -> str:
    """What the figures stand on: samples, seeds, references, the feature space or the judge."""
    sizes = facts.results["sizes"]
    how = {
        "ancestral": "ancestral sampling",
        "first_hitting": "one token drawn at each evaluation",
        "confidence": _order(facts),
        "analytic": "posterior steps on an even grid from 1 to 0.01 and, there, the last denoising "
        + ("to the likeliest levels" if facts.settings.get("final", "argmax") == "argmax" else "by a draw"),
    }[facts.sampler]
    drawn = (
        f"{facts.num_samples:,} samples for each figure, {how}, temperature "
        f"{facts.settings.get('temperature', 1.0):g}, seeds {', '.join(map(str, facts.seeds))}."
    )
    if facts.example == "sequence":
        return f"{drawn} {_judges(facts)}"
    return " ".join(
        part
        for part in (
            drawn,
            cast(facts),
            _codes(facts),
            _space(facts),
            _pairs(facts),
            f"Distances are to all {sizes['all']:,} real images, or to the {sizes['heldout']:,} held-out ones alone. "
            "A distance falls with the number of samples, so its floor is real against real at this number: as many "
            "real images, at most half of them, against all the others; for the held-out figures, as many training "
            f"images against the held-out ones. Floors, and what real images score, are means of {CUTS} choices.",
        )
        if part
    )


def _judges(facts: Facts) -> str:
    """Who finds the text how perplexing, and what all figures hang on."""
    named, read = facts.settings.get("eval_causal_lm"), facts.settings.get("eval_num_judged")
    first = ""
    if named is not None:
        how = _PROTOCOLS[facts.settings.get("eval_protocol", "retokenized")].format(read=read)
        first = f"Generative perplexity: by {named} in {facts.settings.get('eval_dtype', 'float32')}, {how}. "
    if "mauve" in facts.figures:
        first += (
            f"MAUVE-style agreement: of that model's states of these texts with those of as many real ones (at most "
            f"{read}), from 0 to 1, mean of {CLUSTERINGS} clusterings; other features or numbers give other values. "
        )
    return (
        f"{first}The n-grams are of up to four training tokens, interpolated as Witten and Bell do. Entropies are in "
        "nats; that of a sample's own tokens hangs on its length. Lower perplexity is better at the same entropy only, "
        f"and all figures hang on the number of samples: real text stands beside them, as many of the "
        f"{facts.results['sizes']['heldout']:,} held-out sequences, at most all."
    )


def _order(facts: Facts) -> str:
    """In which order codes are revealed."""
    randomize = facts.settings.get("randomize", "linear")
    if randomize == "linear":
        return f"the surest codes first under Gumbel noise of scale {facts.settings.get('gumbel', 4.5):g} at the start"
    return {"random": "codes in random order", "none": "the surest codes first"}.get(
        randomize, "the surest codes first after two steps in random order"
    )


def _codes(facts: Facts) -> str:
    best = facts.results.get("reconstructions", {}).get(facts.main_figure)
    if best is None:
        return ""
    return f"Samples are codes, decoded to pixels; real images that come back from their own codes score {best:.2f}."


def _space(facts: Facts) -> str:
    named, accuracy = facts.settings.get("eval_feature_extractor"), facts.results["accuracy"]
    if named is not None:
        return f"Features: those of the network {named}."
    if accuracy is None:
        return "The images carry no labels, so there is no feature space."
    return (
        f"Features: the {num_features(facts.pictures.shape)} of a small classifier trained on the labels of the "
        f"training images (right on {accuracy:.1%} of the held-out ones)."
    )


def _pairs(facts: Facts) -> str:
    """What the figures that look at every pair of images stand on."""
    if "kid" not in facts.figures:
        return ""
    return (
        f"Kernel distance, precision, recall, density and coverage look at {PAIRED:,} images of each side at most; "
        f"neighbours: {PRECISION_K} for precision and recall, {DENSITY_K} for density and coverage."
    )


def model_card(facts: Facts) -> str:
    """Markdown with YAML metadata, as model hubs read it."""
    folder = facts.settings.get("output_dir", "runs/digits")
    num_steps = 4 if 4 in facts.steps else facts.steps[0]
    if isinstance(facts.images, TextTokens):
        use, shape, layout = _USE_OF_TEXT, "", ""
    else:
        use = _USE_OF_CODES if facts.sampler == "confidence" else _USE
        shape, layout = ", ".join(map(str, facts.images.shape)), facts.images.layout
    return TEMPLATE.format(
        use=use.format(
            folder=folder,
            num_steps=num_steps,
            shape_tuple=shape,
            layout=layout,
        ),
        dataset=public_name(facts.images.name),
        headline=headline(facts),
        parameters=facts.num_parameters,
        teacher_parameters=facts.teacher_parameters,
        kind=facts.kind,
        diffusion=facts.diffusion,
        num_steps=num_steps,
        examples=facts.example.capitalize() + "s",
        bounds=_bounds(facts),
        latents=latent_verdict(facts),
        folder=folder,
        protocol=protocol(facts),
        tables="\n\n".join(_table(facts, figure) for figure in facts.figures),
    )


def _bounds(facts: Facts) -> str:
    """What the teacher knows, in a sentence."""
    bounds = facts.results["bounds"]
    if not bounds:
        return "The teacher is a mixture itself, of which no bound was taken."
    name = facts.bounds_name[0].upper() + facts.bounds_name[1:]
    train, heldout = facts.bound(bounds["train"]), facts.bound(bounds["heldout"])
    return f"{name}: {train} on training {facts.example}s, {heldout} on held-out ones."


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
