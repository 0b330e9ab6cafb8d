"""Turns a published checkpoint into a folder that `from_pretrained` opens.

    python -m di4c_ext.convert --checkpoint ckpt_0001999999.pt --output_dir teacher
    python -m di4c_ext.convert --kind pixels-student --checkpoint tldr-di4c.pt --output_dir student
    python -m di4c_ext.convert --checkpoint MaskGIT_ImageNet_256.pth --output_dir maskgit
    python -m di4c_ext.convert --checkpoint last.ckpt --output_dir vqgan
    python -m di4c_ext.convert --checkpoint kuleshov-group/mdlm-owt --tokenizer_name gpt2 --output_dir mdlm
    python -m di4c_ext.convert --checkpoint jdeschena/sdtt --revision baselines_kld_step_60000 --output_dir sdtt6

The file is read as weights only: nothing in it is executed. Every weight is accounted for; one that is missing, unknown
or of another shape is an error that names it. Where a system's published results use the moving average (pixels) it is
written unless --weights raw asks for the live weights; the published pixel student began from its teacher's live ones.
Language models are published by their live weights; their Lightning checkpoints give the average for --weights ema.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

from transformers import PreTrainedModel

from di4c_ext import checkpoints
from di4c_ext.arguments import as_dict, parse, run
from di4c_ext.models.checkpoint import read_checkpoint
from di4c_ext.models.dit_checkpoint import find_published, is_language_file, language_file, load_language, told_beside
from di4c_ext.models.dit_config import DiTConfig
from di4c_ext.models.token_checkpoint import grid_of, is_token_file, load_tokens, token_file
from di4c_ext.models.token_config import TokenConfig
from di4c_ext.models.unet_checkpoint import Weights, is_pixel_file, load_pixels, pixel_file
from di4c_ext.models.unet_config import UNetConfig
from di4c_ext.models.vqgan_checkpoint import is_vqgan_file, load_vqgan, vqgan_file
from di4c_ext.models.vqgan_config import VQConfig
from di4c_ext.names import check_names, nearest
from di4c_ext.text_sources import Cutter, cutter_of, save_cutter


@dataclass
class ConvertArguments:
    """Which file, what it holds, and where its weights go."""

    checkpoint: str = field(
        metadata={"help": "the file as its authors published it; for language also a repository of the hub"}
    )
    output_dir: str = field(metadata={"help": "new or empty folder for config.json and model.safetensors"})
    kind: str = field(
        default="auto",
        metadata={"help": "auto: told by its weights; or name it, as pixels-teacher, tokens-student, vqgan"},
    )
    weights: str | None = field(
        default=None,
        metadata={"help": "ema: the moving average, the default for pixels; raw: the live weights"},
    )
    model_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: settings of a network that is not of the published size"}
    )
    revision: str | None = field(default=None, metadata={"help": "of a repository of the hub: branch, tag or commit"})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "language: the tokenizer to keep beside the model; gpt2 for the published ones"}
    )

    def __post_init__(self) -> None:
        for name, known in (("kind", ["auto", *KINDS]), ("weights", list(get_args(Weights)))):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"--{name} {value!r}: must be one of {', '.join(known)}{nearest(value, known)}")
        self.model_config = as_dict("model_config", self.model_config)


class Converted(NamedTuple):
    """A model, what its file says of it, and which of the file's weights it has."""

    model: PreTrainedModel
    facts: list[str]
    weights: Weights


class Kind(NamedTuple):
    """How files of one kind are known by their contents, and converted; errors need not name the file."""

    knows: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Any], ConvertArguments], Converted]


def _knows_pixels(contents: Mapping[str, Any], *, is_student: bool) -> bool:
    return is_pixel_file(contents) and pixel_file(contents).is_student == is_student


def _convert_pixels(contents: Mapping[str, Any], args: ConvertArguments, *, is_student: bool) -> Converted:
    settings = as_dict("model_config", args.model_config)
    check_names("--model_config", settings, UNetConfig.__init__, ("is_student",))
    file = pixel_file(contents)
    weights: Weights = "raw" if args.weights == "raw" else "ema"
    model = load_pixels(file, UNetConfig(is_student=is_student, **settings), weights)
    facts = [] if file.iteration is None else [f"iteration {file.iteration:,}"]
    if file.average is None:
        facts.append("no moving average")
    else:
        facts.append(f"moving average of {file.updates or 0:,} updates, decay {file.decay}")
    return Converted(model, facts, weights)


def _knows_tokens(contents: Mapping[str, Any], *, is_student: bool) -> bool:
    return is_token_file(contents) and token_file(contents).is_student == is_student


def _convert_tokens(contents: Mapping[str, Any], args: ConvertArguments, *, is_student: bool) -> Converted:
    settings = as_dict("model_config", args.model_config)
    check_names("--model_config", settings, TokenConfig.__init__, ("is_student",))
    _refuse_average(args)
    file = token_file(contents)
    if "grid" not in settings:
        settings = {"grid": grid_of(file)} | settings
    model = load_tokens(file, TokenConfig(is_student=is_student, **settings))
    told = (("iteration", file.iteration), ("epoch", file.epoch))
    return Converted(model, [f"{name} {number:,}" for name, number in told if number is not None], "raw")


def _convert_vqgan(contents: Mapping[str, Any], args: ConvertArguments) -> Converted:
    settings = as_dict("model_config", args.model_config)
    check_names("--model_config", settings, VQConfig.__init__)
    _refuse_average(args)
    file = vqgan_file(contents)
    facts = [] if file.step is None else [f"step {file.step:,}"]
    if file.left_out:
        facts.append(f"left out {len(file.left_out)} tensors of its training loss (loss.*)")
    return Converted(load_vqgan(file, VQConfig(**settings)), facts, "raw")


def _knows_language(contents: Mapping[str, Any], *, is_student: bool) -> bool:
    return is_language_file(contents) and language_file(contents).is_student == is_student


def _convert_language(contents: Mapping[str, Any], args: ConvertArguments, *, is_student: bool) -> Converted:
    settings = as_dict("model_config", args.model_config)
    file = language_file(contents)
    weights: Weights = "ema" if args.weights == "ema" else "raw"
    config = file.config(**told_beside(find_published(args.checkpoint, args.revision)) | settings)
    model = load_language(file, config, weights, is_student)
    facts = [] if file.step is None else [f"step {file.step:,}"]
    if file.average is not None:
        facts.append(f"moving average of {file.updates or 0:,} updates, decay {file.decay}")
    return Converted(model, facts, weights)


def _refuse_average(args: ConvertArguments) -> None:
    if args.weights == "ema":
        raise ValueError("files of this kind hold no moving average; leave --weights out, the live weights are written")


KINDS = {
    "pixels-teacher": Kind(partial(_knows_pixels, is_student=False), partial(_convert_pixels, is_student=False)),
    "pixels-student": Kind(partial(_knows_pixels, is_student=True), partial(_convert_pixels, is_student=True)),
    "tokens-teacher": Kind(partial(_knows_tokens, is_student=False), partial(_convert_tokens, is_student=False)),
    "tokens-student": Kind(partial(_knows_tokens, is_student=True), partial(_convert_tokens, is_student=True)),
    "language-teacher": Kind(partial(_knows_language, is_student=False), partial(_convert_language, is_student=False)),
    "language-student": Kind(partial(_knows_language, is_student=True), partial(_convert_language, is_student=True)),
    "vqgan": Kind(is_vqgan_file, _convert_vqgan),
}


def convert(args: ConvertArguments) -> Converted:
    """Reads, checks and writes; raises ValueError naming the file and what is wrong with it."""
    output = Path(args.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output_dir {output}: exists and is not an empty folder; name another")
    contents = read_checkpoint(find_published(args.checkpoint, args.revision))
    try:
        kind = _kind_of(contents) if args.kind == "auto" else args.kind
        converted = KINDS[kind].convert(contents, args)
    except ValueError as error:
        raise ValueError(f"{args.checkpoint}: {error}") from error
    tensors = list(converted.model.parameters())
    size = f"{sum(tensor.numel() for tensor in tensors):,} parameters in {len(tensors)} tensors"
    converted = converted._replace(facts=[kind, size, *converted.facts])
    cutter = None if args.tokenizer_name is None else _tokenizer(args.tokenizer_name, converted.model.config)
    with checkpoints.whole_folder(output) as staging:
        converted.model.save_pretrained(staging)
        if cutter is not None:
            wrap = cutter.bos is not None and cutter.eos is not None
            save_cutter(cutter, staging, converted.model.config.length, wrap)
    return converted


def _tokenizer(name: str, config: Any) -> Cutter:
    """The tokenizer that is named; ValueError where the model is not one of its tokens."""
    from di4c_ext.text_teachers import description_of

    if not isinstance(config, DiTConfig):
        raise ValueError(
            f"--tokenizer_name {name}: is for language models, this is a {config.model_type}; leave it out"
        )
    cutter = cutter_of(name)
    description_of(config, cutter).check_tokenizer(f"--tokenizer_name {name}", cutter.num_tokens, cutter.mask_id)
    return cutter


def _kind_of(contents: Mapping[str, Any]) -> str:
    for name, kind in KINDS.items():
        if kind.knows(contents):
            return name
    held = ", ".join(str(key) for key in list(contents)[:5]) or "nothing"
    raise ValueError(f"is of no kind known here, {', '.join(KINDS)}; it holds {held}; name its kind by --kind")


def main(argv: Sequence[str]) -> int:
    (args,), _ = parse("convert", [ConvertArguments], argv, description="Convert a published checkpoint.")
    model, facts, weights = convert(args)
    which = "moving average" if weights == "ema" else "live weights"
    print(f"found: {'; '.join(facts)}\nwrote: {which} as a {type(model).__name__} in {args.output_dir}")
    return 0


if __name__ == "__main__":
    run(main)
