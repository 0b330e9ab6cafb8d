"""Draws images or text from a saved teacher or student.

    python -m di4c_ext.sample --model runs/digits --num_steps 4 --num_samples 64 --seed 0
    python -m di4c_ext.sample --model runs/pixels --num_steps 10 --teacher runs/pixels/teacher --hybrid 2
    python -m di4c_ext.sample --model runs/tokens --num_steps 4 --labels 0 3 9 --class_guidance 2
    python -m di4c_ext.sample --model runs/tokens --num_steps 4 --inpaint photo.png --mask hole.png
    python -m di4c_ext.sample --model runs/text --num_steps 8 --num_samples 4 --prompt "fellow citizens of the senate"
    python -m di4c_ext.sample --model runs/text --prompt "we [MASK]*20 the union" --num_new_tokens 0

Networks of image tokens are told of a class each, and their codes become pictures by the VQ model of the run; the grid
has a row for each class then, and beside the array `images` are `codes` and `labels`.

Of images it writes a grid (.png, of the first 256) and the states (.npz, array `images`); of text a .txt and, with the
tokens, a .jsonl. Sample i is a function of the model, its options, the number of steps, the seed and i: not of the
batch size, nor of how many are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from di4c_ext import checkpoints, pictures
from di4c_ext.arguments import UsageError, parse, run
from di4c_ext.codes import Decoder, vq_beside
from di4c_ext.data import Layout, as_images
from di4c_ext.evaluate import open_pair
from di4c_ext.generate import SamplingArguments, check_sampling, generate
from di4c_ext.inpainting import start_of
from di4c_ext.systems import image_shape_of, layout_of, modality_of, num_classes_of
from di4c_ext.text_samples import PromptArguments, Start

SHOWN = 256  # images in the grid at most
ROW = 16  # images side by side in a grid by classes


@dataclass
class SampleArguments:
    """What to draw, and where to put it."""

    model: str = field(default="runs/digits", metadata={"help": "folder of a teacher or student"})
    teacher: str | None = field(
        default=None, metadata={"help": "folder of the student's teacher, for --hybrid, --guidance, --teacher_guides"}
    )
    num_steps: int = field(default=4, metadata={"help": "sampling steps, one call of the network each"})
    num_samples: int = field(default=64, metadata={"help": "images, or texts"})
    seed: int = field(default=0, metadata={"help": "same seed, same samples"})
    batch_size: int = field(default=256, metadata={"help": "samples at a time; changes none of them"})
    labels: list[int] | None = field(
        default=None, metadata={"help": "image tokens: classes that take turns; default: all"}
    )
    inpaint: str | None = field(
        default=None,
        metadata={"help": "image tokens: .npz or .npy of codes, or a picture or a folder of them, to begin from"},
    )
    mask: str | None = field(
        default=None,
        metadata={"help": "image tokens, with --inpaint: what is drawn anew, an array not 0 or a picture white there"},
    )
    vq_model: str | None = field(
        default=None, metadata={"help": "image tokens: folder of the VQ model; default: that of the run"}
    )
    output: str | None = field(
        default=None, metadata={"help": "name without ending; default: samples/MODEL-STEPSsteps-seedSEED in --model"}
    )

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.mask is not None and self.inpaint is None:
            raise ValueError(f"--mask {self.mask}: goes with --inpaint, which names what is to be kept")


def decoder_of(config: Any, args: SampleArguments) -> Decoder | None:
    """What makes pictures of a network's codes; None for one of pixels. ValueError for another VQ model's codes."""
    if config.model_type != "di4c_tokens":
        if args.vq_model is not None:
            raise UsageError(f"--vq_model {args.vq_model}: {args.model} is no network of codes; leave it out")
        return None
    vq: Any = vq_beside(args.model, args.vq_model)
    vq.check_denoiser(config)
    return Decoder(vq.to("cuda" if torch.cuda.is_available() else "cpu"))


def labels_of(config: Any, args: SampleArguments) -> Tensor | None:
    """The classes of the samples, those of --labels or all in turn; None for a network that takes none."""
    number = num_classes_of(config)
    if not number:
        if args.labels is not None:
            raise UsageError(f"--labels {args.labels}: {args.model} was trained without classes; leave them out")
        return None
    for label in args.labels or ():
        if not 0 <= label < number:
            raise UsageError(f"--labels {label}: the classes of {args.model} are 0..{number - 1}")
    turns = torch.tensor(args.labels or range(number))
    return turns[torch.arange(args.num_samples) % len(turns)]


def _save_picture(
    shown: Tensor, labels: Tensor | None, shape: tuple[int, ...], num_states: int, layout: Layout, file: Path
) -> None:
    """A square of images, or a row of them for each class."""
    scale = pictures.scale_for(shape)
    if labels is None:
        picture = pictures.grid(shown, shape, num_states, max(1, round(len(shown) ** 0.5)), layout)
        return pictures.save(picture, file, scale=scale)
    kinds = labels[: len(shown)]
    rows = [(f"class {label}", shown[kinds == label]) for label in kinds.unique().tolist()]
    picture = pictures.labelled_grid(rows, shape, num_states, columns=ROW, layout=layout, scale=scale)
    pictures.save(picture, file, scale=1)


def main(argv: Sequence[str]) -> int:
    (args, prompt, options), _ = parse(
        "sample",
        [SampleArguments, PromptArguments, SamplingArguments],
        argv,
        description="Draw images or text from a saved teacher or student.",
    )
    if args.teacher is not None and not options.wants_teacher:
        raise UsageError(f"--teacher {args.teacher}: is for --hybrid or --guidance; give one of them, or leave it out")
    models = open_pair(args.model, args.teacher, prompt.trust_remote_code)
    kind, model = list(models.items())[-1]
    teacher = models["teacher"] if len(models) == 2 else None
    check_sampling(model, args.num_steps, teacher=teacher, options=options)
    name = f"hybrid{options.hybrid}" if options.hybrid else kind
    if options.guidance is not None:
        name = f"guided{options.guidance:g}"
    default = Path(args.model) / "samples" / f"{name}-{args.num_steps}steps-seed{args.seed}"
    stem = Path(args.output) if args.output is not None else default
    drawing = _Images if modality_of(model.config) == "image" else _Texts
    prepared = drawing(args, prompt, model.config)
    start = time.perf_counter()
    tokens = generate(
        model,
        args.num_steps,
        args.num_samples,
        seed=args.seed,
        batch_size=args.batch_size,
        teacher=teacher,
        options=options,
        **prepared.told,
    )
    seconds = time.perf_counter() - start
    files = prepared.write(tokens, stem)
    what = f"{len(tokens)} {prepared.noun} in {args.num_steps} steps, {seconds:.2f} s ({name})"
    print("\n".join([what, *map(str, files)]))
    return 0


class _Images:
    """Samples of images, or of codes that become images."""

    noun = "images"

    def __init__(self, args: SampleArguments, prompt: PromptArguments, config: Any) -> None:
        prompt.refuse()
        self.args, self.layout = args, layout_of(config)
        self.shape, self.num_states = image_shape_of(config), config.num_states
        self.decoder = decoder_of(config, args)
        if self.decoder is not None:
            self.shape, self.num_states = self.decoder.shape, self.decoder.num_states
        self.labels = labels_of(config, args)
        self.told = {"labels": self.labels}
        if args.inpaint is not None and self.decoder is None:
            raise UsageError(f"--inpaint {args.inpaint}: {args.model} is no network of codes; leave it out")
        if args.inpaint is not None and self.decoder is not None:
            self.told["start"] = start_of(args.inpaint, args.mask, config, self.decoder.vq, args.num_samples)

    def write(self, codes: Tensor, stem: Path) -> list[Path]:
        tokens = codes if self.decoder is None else self.decoder(codes)
        image_file, array_file = (stem.with_name(stem.name + ending) for ending in (".png", ".npz"))
        _save_picture(tokens[:SHOWN], self.labels, self.shape, self.num_states, self.layout, image_file)
        told: dict[str, Any] = {} if self.decoder is None else {"codes": codes.numpy()}
        told |= {} if self.labels is None else {"labels": self.labels.numpy()}
        kind = np.uint8 if self.num_states <= 256 else np.int32
        with checkpoints.whole_file(array_file) as staging, open(staging, "wb") as handle:
            np.savez_compressed(
                handle,
                images=as_images(tokens, self.shape, self.layout).numpy().astype(kind),
                num_steps=self.args.num_steps,
                seed=self.args.seed,
                **told,
            )
        return [image_file, array_file]


class _Texts:
    """Samples of text, from nothing or from a prompt."""

    noun = "texts"

    def __init__(self, args: SampleArguments, prompt: PromptArguments, config: Any) -> None:
        for name in ("labels", "vq_model", "inpaint", "mask"):
            if getattr(args, name) is not None:
                raise UsageError(f"--{name} {getattr(args, name)}: {args.model} is a model of text; leave it out")
        self.args = args
        self.start = Start(args.model, config, prompt)
        is_plain = prompt.prompt is None and len(self.start.row) == config.length
        self.told = {} if is_plain else {"start": self.start.rows(args.num_samples)}

    def write(self, tokens: Tensor, stem: Path) -> Sequence[Path]:
        return self.start.write(tokens, stem, {"num_steps": self.args.num_steps, "seed": self.args.seed})


if __name__ == "__main__":
    run(main)
