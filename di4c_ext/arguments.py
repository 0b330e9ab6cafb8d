"""Command lines: dataclasses as flags, `--preset` and `--config` files beneath them, unknown keys refused by name.

Later wins: defaults < preset < the stored configuration of a resumed run < --config file < flags. A YAML key is the
flag without its dashes. Preset files lie in the package's `presets` folder, one YAML each.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from di4c_ext import checkpoints, data, processes
from di4c_ext.names import nearest
from di4c_ext.process import LEVEL_PROCESSES, PROCESSES, process_from
from di4c_ext.settings_files import UsageError, read_stored, read_yaml
from di4c_ext.settings_files import as_yaml as as_yaml

PRESETS = Path(__file__).parent / "presets"
_OUTSIDE = ("help", "config")  # on the command line only
_ONCE = ("resume", "overwrite_output_dir", "resume_from_checkpoint", "replay")  # of one call, no part of what a run is
_TYPED = ("trust_remote_code", "push_to_hub")  # what runs others' code or sends files away: no file may ask for it
_SCHEDULE = "linear"
_DIGITS = "digits"
MODALITIES = ("image", "text")
_OF_IMAGES = ("num_states", "image_size", "grayscale", "horizontal_flip", "vq_model")
_EXAMPLES = {"process_config": "'{\"rate_sigma\": 3}'"}


@dataclass
class DataArguments:
    """Which data, how images are cut into states, and how these are lost; of text see also TextArguments."""

    modality: str = field(default="image", metadata={"help": "image or text"})
    dataset_name: str = field(
        default=_DIGITS,
        metadata={
            "help": "digits, fashion_mnist, an .npz or .npy, a folder of pictures or of CIFAR-10, a hub name; "
            "text: sotu, a .txt, .jsonl, .parquet or .arrow or a folder of such, a hub name"
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a hub data set"})
    dataset_train_split: str = field(default="train", metadata={"help": "split of a data set that has several"})
    num_states: int | None = field(default=None, metadata={"help": "S, levels of a pixel; default: a picture's 256"})
    image_size: int | None = field(
        default=None, metadata={"help": "make pictures squares of this size, their middle; default: as they are"}
    )
    grayscale: bool | None = field(default=None, metadata={"help": "false: RGB, true: grey; default: as pictures are"})
    horizontal_flip: bool = field(default=False, metadata={"help": "train on mirror images too, half of the time"})
    heldout_fraction: float = field(
        default=1 / 6, metadata={"help": "share of the images, or documents of text, kept from training"}
    )
    process: str = field(
        default="absorbing",
        metadata={
            "help": "absorbing: masks, the compact network; gaussian, uniform: the U-Net; confidence: codes of a VQ "
            "model, the token transformer"
        },
    )
    process_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON: constants of any but absorbing, e.g. '{\"rate_sigma\": 3}'"}
    )
    step_guidance: float | None = field(
        default=None,
        metadata={
            "help": "image tokens: w of guidance in the teacher's steps of distillation; default: 0, as published"
        },
    )
    schedule: str = field(
        default=_SCHEDULE, metadata={"help": "masking, for absorbing: linear, cosine, arccos or log_linear"}
    )
    vq_model: str | None = field(
        default=None,
        metadata={"help": "folder of the VQ model (pretrain --kind vq) that makes codes of images and images of codes"},
    )

    def __post_init__(self) -> None:
        self.process_config = as_dict("process_config", self.process_config)
        if self.modality not in MODALITIES:
            raise ValueError(f"--modality {self.modality!r}: must be one of {', '.join(MODALITIES)}")
        if self.modality == "text":
            self._check_text()
        if self.process not in PROCESSES:
            known = ", ".join(PROCESSES)
            raise ValueError(f"--process {self.process!r}: must be one of {known}{nearest(self.process, PROCESSES)}")
        is_absorbing = self.process == "absorbing"
        if is_absorbing and self.process_config:
            raise ValueError(
                f"--process_config {json.dumps(self.process_config)}: absorbing diffusion has only a --schedule; "
                "leave it out, or give --process gaussian or uniform"
            )
        if not is_absorbing and self.schedule != _SCHEDULE:
            remedy = (
                f'give --process_config \'{{"schedule": "{self.schedule}"}}\''
                if self.process in ("uniform", "confidence")
                else "leave it out; gaussian has constants, --process_config"
            )
            raise ValueError(
                f"--schedule {self.schedule}: is for --process absorbing, this is {self.process}; {remedy}"
            )
        if self.step_guidance is not None and self.process != "confidence":
            raise ValueError(
                f"--step_guidance {self.step_guidance}: is for --process confidence, this is {self.process}"
            )
        states = max(self.num_states or 256, 2)  # the data say how many; here only the constants are looked at
        process_from(self.process_settings(), states, "--schedule" if is_absorbing else "--process_config")

    def _check_text(self) -> None:
        """ValueError for what only images have; the built-in text in place of the built-in images."""
        if self.dataset_name == _DIGITS:
            self.dataset_name = "sotu"
        if self.process != "absorbing":
            raise ValueError(f"--process {self.process}: text is masked; leave it out")
        for name in _OF_IMAGES:
            value = getattr(self, name)
            if value not in (None, False):
                raise ValueError(f"--{name} {value}: is for images, this is text; leave it out")

    def process_settings(self) -> dict[str, Any]:
        """The process by name and constants, as `process_from` takes it; --step_guidance overrides --process_config."""
        if self.process == "absorbing":
            return {"name": self.process, "schedule": self.schedule}
        guided = {} if self.step_guidance is None else {"guidance": self.step_guidance}
        return {"name": self.process, **as_dict("process_config", self.process_config), **guided}

    def load(self, layout: data.Layout | None = None) -> data.ImageTokens:
        """All the images, their positions in the order of the process's network unless `layout` names one.

        Raises ValueError as `data.load` does.
        """
        return data.load(
            self.dataset_name,
            num_states=self.num_states,
            image_size=self.image_size,
            grayscale=self.grayscale,
            dataset_config=self.dataset_config,
            dataset_split=self.dataset_train_split,
            horizontal_flip=self.horizontal_flip,
            layout=layout or ("CHW" if self.process in LEVEL_PROCESSES else "HWC"),
        )


@dataclass
class RunArguments:
    """What to do about an output folder that is not empty."""

    resume: bool = field(default=False, metadata={"help": "go on with the run in --output_dir, its settings included"})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "delete the run in --output_dir first"})
    replay: str | None = field(
        default=None,
        metadata={"help": "FILE of the folder non_finite: compute that batch's loss again and print it; train nothing"},
    )

    def __post_init__(self) -> None:
        self.resume = self.resume or self.replay is not None

    def resuming(self, args: TrainingArguments) -> bool:
        """Whether this continues a run: --resume, or transformers' --resume_from_checkpoint."""
        return self.resume or args.resume_from_checkpoint not in (None, "false", "False")

    def checkpoint(self, args: TrainingArguments, folder: Path | None = None) -> str | None:
        """The checkpoint to go on from, checked; None to begin. `true` and `latest` mean the newest whole one in
        `folder`; one that is named must be whole."""
        if not self.resuming(args):
            return None
        named = args.resume_from_checkpoint
        if folder is None and named is not None and named not in ("true", "True", "latest"):
            found: Path | None = Path(named)
        else:
            found = None

        def checked() -> str | None:
            if found is None:
                newest = checkpoints.latest_whole(folder or Path(str(args.output_dir)))
                return None if newest is None else str(newest)
            checkpoints.check_resumable(found)
            return str(found)

        return processes.on_first(checked)


class Parser(HfArgumentParser):
    """HfArgumentParser whose errors are exceptions, and which never guesses an abbreviated flag."""

    def __init__(self, types: Iterable[Any], **kwargs: Any) -> None:
        super().__init__(types, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def known(self) -> dict[str, argparse.Action]:
        """Every key with its action, leaving out the `--no_...` twins of flags that are on by default."""
        named: dict[str, argparse.Action] = {}
        for action in self._actions:
            if action.dest not in _OUTSIDE:
                named.setdefault(action.dest, action)
        return named


def parse(
    command: str,
    types: Sequence[Any],
    argv: Sequence[str],
    *,
    default_preset: str | None = None,
    translate: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    stored: Callable[[argparse.Namespace], dict[str, Any]] | None = None,
    description: str = "",
) -> tuple[list[Any], dict[str, Any]]:
    """(one instance of each dataclass in `types`, the resolved settings, which as a --config file make them again).

    translate turns a preset's keys into this command's; stored(early) gives what an interrupted run was told, from
    the flags known so far (`preset`, `config`, `output_dir`, `resume`). Raises UsageError.
    """
    parser = Parser(types, prog=f"python -m di4c_ext.{command}", description=description)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings, one key a flag; flags come on top")
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--output_dir", "--preset"):
        early.add_argument(name)
    early.add_argument("--resume", "--resume_from_checkpoint", "--replay", nargs="?", const="true")
    if default_preset is not None:
        parser.add_argument("--preset", default=default_preset, help=f"one of: {', '.join(preset_names())}")
    first, _ = early.parse_known_args(list(argv))
    layers: list[tuple[str, dict[str, Any]]] = []
    if stored is not None and first.resume not in (None, "false", "False"):
        layers.append(("the stored configuration", stored(first)))
    if first.config is not None:
        layers.append((first.config, read_yaml(Path(first.config))))
    if default_preset is not None:
        named = [first.preset, *(layer.get("preset") for _, layer in reversed(layers)), default_preset]
        preset = next(str(name) for name in named if name is not None)
        layers.insert(0, (f"preset {preset!r}", translate(read_preset(preset))))
    known = parser.known()
    merged: dict[str, Any] = {}
    for source, layer in layers:
        for key in layer:
            if key not in known:
                raise UsageError(f"unknown key {key!r} in {source}{nearest(key, known)}")
            if key in _TYPED and layer[key]:
                raise UsageError(f"key {key!r} in {source}: is taken from the command line only; give --{key} there")
        merged.update(layer)
    tokens = [token for key, value in merged.items() for token in _tokens(key, value, known[key])]
    namespace, unknown = parser.parse_known_args([*tokens, *argv])
    if unknown:
        _refuse(unknown, known)
    values = vars(namespace)
    made = [kind(**{f.name: values[f.name] for f in kind.__dataclass_fields__.values() if f.init}) for kind in types]
    theirs = TrainingArguments.__dataclass_fields__
    own = [name for kind in types for name in kind.__dataclass_fields__ if name not in theirs]
    resolved = {name: values[name] for name in own if values[name] is not None} | merged | _given(parser, argv)
    return made, {key: value for key, value in resolved.items() if key not in (*_ONCE, *_TYPED)}


def told_early(argv: Sequence[str], names: Sequence[str], output_dir: str, stored: str) -> dict[str, Any]:
    """What flags, a --config file or the run to resume say of some settings, before all of them are parsed.

    output_dir: the default one. stored: the name of a run's settings in its folder. For what decides which default
    preset, or which of a preset's keys, is meant.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in (*names, "config", "output_dir"):
        early.add_argument(f"--{name}")
    early.add_argument("--resume", "--resume_from_checkpoint", "--replay", nargs="?", const="true")
    given, _ = early.parse_known_args(list(argv))
    told: dict[str, Any] = {}
    if given.resume not in (None, "false", "False"):
        told |= read_stored(Path(given.output_dir or output_dir) / stored)
    if given.config is not None:
        told |= read_yaml(Path(given.config))
    told |= {name: value for name, value in vars(given).items() if value is not None}
    return {name: told[name] for name in names if name in told}


def preset_names() -> list[str]:
    """The presets in the package."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def read_preset(name: str) -> dict[str, Any]:
    """A preset's keys and values; raises UsageError listing the known ones."""
    file = PRESETS / f"{name}.yaml"
    if name not in preset_names():
        names = preset_names()
        raise UsageError(f"unknown preset {name!r}{nearest(name, names)}; known presets: {', '.join(names)}")
    return read_yaml(file)


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command: what the user can mend is one line and exit code 2; DI4C_TRACEBACK=1 shows where it arose."""
    quiet_libraries()
    try:
        code = main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        code = 130
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("DI4C_TRACEBACK") == "1":
            raise
        if processes.is_first():
            print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.exit(code)


def quiet_libraries() -> None:
    """Turns off transformers' own bars for saving and loading, which would tear the training's bar."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def as_dict(flag: str, value: Any) -> dict[str, Any]:
    """The mapping in a JSON flag or YAML key; raises ValueError for anything else."""
    example = _EXAMPLES.get(flag, "'{\"dropout\": 0.1}'")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"--{flag} {value!r}: not JSON ({error}); write e.g. {example}") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"--{flag} {value!r}: write a mapping, e.g. {example}")
    return dict(value or {})


def _refuse(unknown: Sequence[str], known: dict[str, argparse.Action]) -> NoReturn:
    flag = next((token for token in unknown if token.startswith("-")), unknown[0])
    if not flag.startswith("-"):
        raise UsageError(f"unexpected argument {flag!r}; every setting is a flag: --name value")
    key = flag.lstrip("-").split("=")[0].replace("-", "_")
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    raise UsageError(f"unknown flag {flag.split('=')[0]!r}" + (f"; did you mean '--{close[0]}'?" if close else ""))


def _tokens(key: str, value: Any, action: argparse.Action) -> list[str]:
    """A YAML value as command-line words, so that files and flags are converted and checked by the same code."""
    if value is None:
        return []
    if isinstance(value, list):
        if action.nargs != "+":
            raise UsageError(f"key {key!r}: takes one value, got the list {value}")
        return [f"--{key}", *(str(item) for item in value)]
    if isinstance(value, dict):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, bool):
        return [f"--{key}={str(value).lower()}"]
    if action.nargs == "+":
        return [f"--{key}", str(value)]
    return [f"--{key}={value}"]


def _given(parser: Parser, argv: Sequence[str]) -> dict[str, Any]:
    """The flags that were typed, converted; nothing that is a default."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    typed = vars(parser.parse_known_args(list(argv))[0])
    return {key: value for key, value in typed.items() if key not in _OUTSIDE}
