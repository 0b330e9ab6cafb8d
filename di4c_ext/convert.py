"""Turns a published checkpoint into a folder that `from_pretrained` opens.

    python -m di4c_ext.convert --checkpoint ckpt_0001999999.pt --output_dir teacher
    python -m di4c_ext.convert --kind pixels-student --checkpoint tldr-di4c.pt --output_dir student

The file is read as weights only: nothing in it is executed. Every weight is accounted for; one that is missing, unknown
or of another shape is an error that names it. The published results use the moving average, which is written unless
--weights raw asks for the live weights; the published student began from its teacher's live ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from di4c_ext import checkpoints
from di4c_ext.arguments import nearest, parse, run
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.models.checkpoint import read_checkpoint
from di4c_ext.models.unet_checkpoint import Weights, is_pixel_file, load_pixels, pixel_file
from di4c_ext.models.unet_config import UNetConfig
from di4c_ext.pretrain import as_dict, check_names


@dataclass
class ConvertArguments:
    """Which file, what it holds, and where its weights go."""

    checkpoint: str = field(metadata={"help": "the file as its authors published it"})
    output_dir: str = field(metadata={"help": "new or empty folder for config.json and model.safetensors"})
    kind: str = field(default="auto", metadata={"help": "pixels-teacher, pixels-student, or auto: told by its weights"})
    weights: str = field(default="ema", metadata={"help": "ema: the moving average; raw: the live weights"})
    model_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: settings of a network that is not of the published size"}
    )

    def __post_init__(self) -> None:
        for name, known in (("kind", ["auto", *KINDS]), ("weights", list(get_args(Weights)))):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"--{name} {value!r}: must be one of {', '.join(known)}{nearest(value, known)}")
        self.model_config = as_dict("model_config", self.model_config)


class Converted(NamedTuple):
    """A model, and what its file says of it."""

    model: MixtureDenoiser
    facts: list[str]


class Kind(NamedTuple):
    """How files of one kind are known by their contents, and converted; errors need not name the file."""

    knows: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Any], ConvertArguments], Converted]


def _knows_pixels(contents: Mapping[str, Any], *, is_student: bool) -> bool:
    return is_pixel_file(contents) and pixel_file(contents).is_student == is_student


def _convert_pixels(contents: Mapping[str, Any], args: ConvertArguments, *, is_student: bool) -> Converted:
    settings = as_dict("model_config", args.model_config)
    check_names("model_config", settings, UNetConfig.__init__, ("is_student",))
    file = pixel_file(contents)
    model = load_pixels(file, UNetConfig(is_student=is_student, **settings), "ema" if args.weights == "ema" else "raw")
    facts = [] if file.iteration is None else [f"iteration {file.iteration:,}"]
    if file.average is None:
        facts.append("no moving average")
    else:
        facts.append(f"moving average of {file.updates or 0:,} updates, decay {file.decay}")
    return Converted(model, facts)


KINDS = {
    "pixels-teacher": Kind(partial(_knows_pixels, is_student=False), partial(_convert_pixels, is_student=False)),
    "pixels-student": Kind(partial(_knows_pixels, is_student=True), partial(_convert_pixels, is_student=True)),
}


def convert(args: ConvertArguments) -> Converted:
    """Reads, checks and writes; raises ValueError naming the file and what is wrong with it."""
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output_dir {output}: exists and is not an empty folder; name another")
    contents = read_checkpoint(args.checkpoint)
    try:
        kind = _kind_of(contents) if args.kind == "auto" else args.kind
        converted = KINDS[kind].convert(contents, args)
    except ValueError as error:
        raise ValueError(f"{args.checkpoint}: {error}") from error
    tensors = list(converted.model.parameters())
    size = f"{sum(tensor.numel() for tensor in tensors):,} parameters in {len(tensors)} tensors"
    converted = converted._replace(facts=[kind, size, *converted.facts])
    with checkpoints.whole_folder(output) as staging:
        converted.model.save_pretrained(staging)
    return converted


def _kind_of(contents: Mapping[str, Any]) -> str:
    for name, kind in KINDS.items():
        if kind.knows(contents):
            return name
    held = ", ".join(str(key) for key in list(contents)[:5]) or "nothing"
    raise ValueError(f"is of no kind known here, {', '.join(KINDS)}; it holds {held}; name its kind by --kind")


def main(argv: Sequence[str]) -> int:
    (args,), _ = parse("convert", [ConvertArguments], argv, description="Convert a published checkpoint.")
    model, facts = convert(args)
    which = "moving average" if args.weights == "ema" else "live weights"
    print(f"found: {'; '.join(facts)}\nwrote: {which} as a {type(model).__name__} in {args.output_dir}")
    return 0


if __name__ == "__main__":
    run(main)
