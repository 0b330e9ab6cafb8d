"""A run about text: its blocks of tokens, the networks of these, the judge that holds samples against real blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from di4c_ext import checkpoints, random, text
from di4c_ext.arguments import DataArguments
from di4c_ext.config import PretrainConfig
from di4c_ext.metrics.likelihood import mean_likelihood_bound
from di4c_ext.metrics.perplexity import open_causal_lm
from di4c_ext.metrics.text_judge import TextJudge
from di4c_ext.models import Di4CForMaskedLM
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.names import check_names
from di4c_ext.process import Process
from di4c_ext.stages import trainable_copy
from di4c_ext.systems import process_of
from di4c_ext.task import Encoder, Judge, Measuring, Named
from di4c_ext.teachers import cache_name, check_process, recipe_of
from di4c_ext.text_arguments import TextArguments
from di4c_ext.text_sources import Cutter, cutter_of, save_cutter, told_beside
from di4c_ext.text_teachers import check_plain, description_of, new_dit, new_masked_lm, open_text_teacher

if TYPE_CHECKING:
    from di4c_ext.evaluate import EvaluationArguments
    from di4c_ext.trainer import Augment

LENGTH = 128  # tokens in a sequence where neither the user nor a teacher says
MOST = 1024  # as many as the published models have, where a teacher would take more
MEASURED = 1000  # sequences of each side on which a teacher's bound is taken
STREAMED = 2**20  # tokens of each side of a stream that are held, to measure and to report
_MOST_LOGITS = 2**26  # numbers that a forward of measuring makes at once


class TextTask:
    """Text in blocks of D tokens; see `task.Task`.

    named, encoder: the teacher, or the masked language model that a new one begins from; of it come the tokenizer and
    the length where the arguments name none. model: folder and config of a trained model, where it is only measured.
    seed: of the order in which a stream comes.
    """

    unit = "sequence"
    digits = 3

    def __init__(
        self,
        images: DataArguments,
        options: TextArguments,
        *,
        named: Named | None = None,
        encoder: Encoder | None = None,
        model: tuple[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.process: Mapping[str, Any] = images.process_settings()
        self.options, self.named, self.encoder = options, named, encoder
        source = model[0] if model is not None else next((x.source for x in (encoder, named) if x is not None), None)
        self.cutter = _cutter(options, source)
        self._opened: MixtureDenoiser | None = None
        config = None if model is None else model[1]
        if encoder is not None:
            self.begun = new_masked_lm(encoder, self.cutter, self.process["schedule"], options.trust_remote_code)
            config = self.begun.config
        elif named is not None:
            config = self.load_teacher(named.source).config
        beside = {} if source is None else told_beside(source)
        longest = LENGTH if config is None else config.length or LENGTH
        self.length: int = options.block_size or beside.get("block_size") or min(longest, MOST)
        self._told: dict[str, Any] = {
            "dataset_name": images.dataset_name,
            "length": self.length,
            "tokenizer": self.cutter,
            "teacher": None if config is None else description_of(config, self.cutter),
            "heldout_fraction": images.heldout_fraction,
            "dataset_config": images.dataset_config,
            "dataset_split": images.dataset_train_split,
            "text_column": options.text_column,
            "document_separator": options.parting,
            "wrap": beside.get("wrap"),
            "trust_remote_code": options.trust_remote_code,
        }
        self.seed = seed
        streaming: dict[str, Any] = (
            {"streaming": True, "most": max(MEASURED, STREAMED // self.length)} if options.streaming else {}
        )
        self.shown = text.load(side="train", **self._told, **streaming)
        self.heldout = text.load(side="heldout", **self._told, **streaming)

    @property
    def train(self) -> Any:
        """The blocks; of text that is streamed all of them, from their beginning whenever this is asked for."""
        return text.stream(side="train", seed=self.seed, **self._told) if self.options.streaming else self.shown

    @property
    def drawing(self) -> Blank:
        return Blank(self.length)

    def new_teacher(self, config: PretrainConfig) -> MixtureDenoiser:
        if self.encoder is None:
            return new_dit(self.cutter, self.length, config, self.process)
        check_plain(config)
        return self.begun

    def cached_teacher(self, config: PretrainConfig) -> Path | None:
        if self.encoder is not None:
            return None
        told = f"{self.process['schedule']} {self.length} {self.cutter.num_tokens}"
        if self.options.streaming:
            told += f" {self.train.state_dict()['settings']} {self.seed}"
        return cache_name(self.shown.fingerprint(), told, recipe_of(config, ("bf16", "fp16")))

    def load_teacher(self, source: str) -> MixtureDenoiser:
        is_named = self.named is not None and source == self.named.source
        if is_named and self._opened is not None:
            return self._opened
        opened = open_text_teacher(
            self.named if is_named and self.named is not None else Named(source),
            tokenizer=getattr(self.cutter, "tokenizer", None),
            schedule=self.process["schedule"],
            consent=self.options.trust_remote_code,
        )
        check_process(source, process_of(opened.config), self.process)
        self._opened = opened if is_named else None
        return opened

    def new_student(self, teacher: MixtureDenoiser, settings: dict[str, Any]) -> MixtureDenoiser:
        network: Any = type(teacher)
        if "lora" in settings and network is not Di4CForMaskedLM:
            raise ValueError(
                f"--lora_rank: is for masked language models of transformers, this teacher is a {network.__name__}; "
                "leave it out"
            )
        check_names("--student_model_config", settings, network.from_teacher, ("cls", "teacher", "teacher_options"))
        if not teacher.config.is_student:
            student: MixtureDenoiser = network.from_teacher(teacher, **settings)
            return student
        different = {name: value for name, value in settings.items() if getattr(teacher.config, name, value) != value}
        if different:
            raise ValueError(
                f"--student_model_config {json.dumps(different)}: in a second round the student begins as its teacher, "
                "whose latent it keeps; leave it out"
            )
        return trainable_copy(teacher)

    def process_of(self, config: Any) -> Process:
        return process_of(config)

    def augment(self, share: float) -> Augment | None:
        if share:
            raise ValueError(f"--augment_share {share:g}: alters images; leave it out")
        return None

    def save_once(self, output: Path) -> None:
        """Nothing: what text needs lies beside each model."""

    def save_with_model(self, folder: Path) -> list[str]:
        return save_cutter(self.cutter, folder, self.length, self.wraps)

    @property
    def wraps(self) -> bool:
        """Whether a block lies between a beginning and an end of its own."""
        return self.cutter.bos is not None and self.cutter.eos is not None

    def bounds(self, teacher: MixtureDenoiser, time_min: float) -> dict[str, Any]:
        """The likelihood bound in nats per token, and as a perplexity; of a student in the role of teacher, nothing."""
        if teacher.config.is_student:
            return {"bounds": {}, "num_bounds": {}, "bounds_name": "", "perplexity_bound": {}}
        process: Any = process_of(teacher.config)
        found, counts = {}, {}
        for name, side in (("train", self.shown), ("heldout", self.heldout)):
            some = torch.arange(min(MEASURED, len(side))) * len(side) // min(MEASURED, len(side))
            x_0 = side.tokens[some].long().to(teacher.device)
            keys = random.keys(0, len(x_0), device=teacher.device)
            at_once = max(1, _MOST_LOGITS // (self.length * teacher.config.num_states))
            bound = mean_likelihood_bound(teacher, process, x_0, keys, draws=4, batch_size=min(at_once, 512))
            found[name], counts[name] = bound / self.length, len(x_0)
        return {
            "bounds": found,
            "num_bounds": counts,
            "bounds_name": "likelihood bound in nats a token",
            "perplexity_bound": {name: float(torch.tensor(value).exp()) for name, value in found.items()},
        }

    def open_judge(self, args: EvaluationArguments) -> Judge:
        return open_judge(self.shown, self.heldout, args)

    def about(self, judge: Judge) -> dict[str, Any]:
        return {"accuracy": None}

    def save_samples(self, samples: Tensor, config: Any, stem: Path) -> list[str]:
        texts = self.shown.text(samples)
        checkpoints.write_text(stem.with_name(stem.name + ".txt"), "\n\n".join(texts) + "\n")
        return texts


class Blank:
    """Samples of text begin as `length` masks."""

    def __init__(self, length: int) -> None:
        self.length = length

    def told(self, config: Any, n: int) -> dict[str, Any]:
        return {} if config.length == self.length else {"start": torch.full((n, self.length), config.mask_id)}

    def decode(self, samples: Tensor) -> Tensor:
        """The tokens, as they are."""
        return samples


def open_judge(train: text.TextTokens, heldout: text.TextTokens, args: EvaluationArguments) -> Judge:
    """The judge of these blocks, its floors at the number of samples of `args`."""
    causal_lm = None if args.eval_causal_lm is None else open_causal_lm(args.eval_causal_lm, args.eval_dtype)  # type: ignore[arg-type]  # checked there
    return TextJudge(
        train,
        heldout,
        args.eval_num_samples,
        causal_lm,
        args.eval_num_judged,
        args.eval_protocol,  # type: ignore[arg-type]  # checked there
        args.eval_num_bounded,
    )


def judged(
    model: str, config: Any, images: DataArguments, options: TextArguments, args: EvaluationArguments
) -> Measuring:
    """For `evaluate`: what the model in folder `model` is measured by, of the text that is named, cut as it has it."""
    task = TextTask(replace(images, modality="text"), options, model=(model, config))
    return Measuring(task.open_judge(args), task.drawing, task.heldout, task.shown)


def _cutter(options: TextArguments, source: str | None) -> Cutter:
    """The tokenizer that is named, or the one that lies with a teacher."""
    if options.tokenizer_name is not None:
        return cutter_of(options.tokenizer_name, options.trust_remote_code)
    if source is None:
        raise ValueError(
            "--tokenizer_name is missing: a teacher that is trained from nothing has none of its own; give "
            "characters, gpt2, or the folder or hub name of one"
        )
    if Path(source).is_file():
        raise ValueError(
            f"--tokenizer_name is missing: no tokenizer lies with the file {source}; the published language models "
            "have gpt2"
        )
    return cutter_of(source, options.trust_remote_code)
