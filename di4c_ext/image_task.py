"""A run about images: their pixels or codes, the networks of these, the judge that holds samples against real ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from di4c_ext import checkpoints, data, pictures, random
from di4c_ext.arguments import DataArguments, UsageError
from di4c_ext.augment import MIRROR, augment_images, flip_images
from di4c_ext.codes import VQ_FOLDER, Decoder, check_images, classes_like, codes_of, open_vq, vq_beside
from di4c_ext.config import PretrainConfig
from di4c_ext.evaluation.latents import LATENT_EXAMPLES
from di4c_ext.lazy_rows import LazyRows
from di4c_ext.metrics.judge import Judge
from di4c_ext.models import VQModel
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.names import check_names
from di4c_ext.process import Process
from di4c_ext.systems import layout_of, num_classes_of, process_of
from di4c_ext.task import Measuring
from di4c_ext.teachers import bounds, bounds_name, cached_teacher, load_teacher, network_of, new_teacher, num_measured
from di4c_ext.vq import save_vq

if TYPE_CHECKING:
    from di4c_ext.evaluate import EvaluationArguments
    from di4c_ext.trainer import Augment


JUDGED = 50_000  # real images of each side that samples are held against, where not all of them fit into memory


class ImageTask:
    """Images as the process's network takes them, and the pixels behind them; see `task.Task`.

    kept: folder of a run that is gone on with; its VQ model stands in for the one the arguments name.
    trust_remote_code: consent to run the code of a feature extractor.
    """

    unit = "image"
    digits = 1

    def __init__(self, images: DataArguments, kept: Path | None = None, trust_remote_code: bool = False) -> None:
        self.trust_remote_code = trust_remote_code
        self.process: Mapping[str, Any] = images.process_settings()
        self.network = network_of(self.process)
        own = None if kept is None else kept / VQ_FOLDER
        loaded = load_tokens(images, own if own is not None and own.is_dir() else None)
        self.train, self.heldout = data.split(loaded.tokens, images.heldout_fraction)
        self.vq = loaded.vq
        self.real = None if self.vq is None else real_images(loaded.pixels, images.heldout_fraction, self.vq)

    @property
    def pictures(self) -> tuple[data.ImageTokens, data.ImageTokens]:
        """Training and held-out images in pixels, whatever the network works on."""
        return (self.train, self.heldout) if self.real is None else (self.real.train, self.real.heldout)

    @property
    def shown(self) -> data.ImageTokens:
        return self.pictures[0]

    @property
    def drawing(self) -> RealImages | None:
        return self.real

    def new_teacher(self, config: PretrainConfig) -> MixtureDenoiser:
        return new_teacher(self.train, config, self.process)

    def cached_teacher(self, config: PretrainConfig) -> Path:
        return cached_teacher(self.train, config, self.process)

    def load_teacher(self, source: str) -> MixtureDenoiser:
        return load_teacher(Path(source), self.train, self.process)

    def new_student(self, teacher: MixtureDenoiser, settings: dict[str, Any]) -> MixtureDenoiser:
        check_names("--student_model_config", settings, self.network.from_teacher, ("cls", "teacher"))
        return self.network.from_teacher(teacher, **settings)  # type: ignore[arg-type]  # load_teacher saw to it

    def process_of(self, config: Any) -> Process:
        told = {key: value for key, value in self.process.items() if key not in ("name", "schedule")}
        return process_of(config, told if self.process["name"] == "confidence" else None)

    def augment(self, share: float) -> Augment | None:
        return augmentation(self.train, share)

    def save_once(self, output: Path) -> None:
        if self.vq is not None:
            save_vq(self.vq, output / VQ_FOLDER)

    def save_with_model(self, folder: Path) -> list[str]:
        return []  # a network of images is used as it is

    def bounds(self, teacher: MixtureDenoiser, time_min: float) -> dict[str, Any]:
        sides = {"train": self.train, "heldout": self.heldout}
        return {
            "bounds": bounds(teacher, self.train, self.heldout, time_min),
            "num_bounds": {name: num_measured(teacher.config, images) for name, images in sides.items()},
            "bounds_name": bounds_name(teacher.config, time_min),
        }

    def open_judge(self, args: EvaluationArguments) -> Judge:
        return open_judge(*self.pictures, args, self.trust_remote_code)

    def about(self, judge: Any) -> dict[str, Any]:
        best = {} if self.real is None else {"reconstructions": codes_at_best(self.real, self.train, judge)}
        return best | {"accuracy": judge.accuracy}

    def save_samples(self, samples: Tensor, config: Any, stem: Path) -> Tensor:
        shown, columns = self.shown, pictures.columns_for(num_classes_of(config))
        whole_rows = samples[: len(samples) // columns * columns] if len(samples) > columns else samples
        picture = pictures.grid(whole_rows, shown.shape, shown.num_states, columns, shown.layout)
        pictures.save(picture, stem.with_name(stem.name + ".png"), scale=pictures.scale_for(shown.shape))
        return whole_rows


@dataclass(frozen=True)
class Loaded:
    """The images in pixels, as the process's network takes them, and the VQ model that made codes of them, if any."""

    pixels: data.ImageTokens
    tokens: data.ImageTokens
    vq: VQModel | None = None


def load_tokens(images: DataArguments, vq_model: Path | None = None) -> Loaded:
    """The images that the arguments name, and their codes where the process is one of codes.

    vq_model: a folder in place of the one that the arguments name. Codes are made on first use and kept in the cache.
    """
    loaded, named = images.load(), vq_model or images.vq_model
    if images.process != "confidence":
        if named is not None:
            raise ValueError(f"--vq_model {named}: is for --process confidence, this is {images.process}; leave it out")
        return Loaded(loaded, loaded)
    if named is None:
        raise ValueError(
            "--process confidence: works on the codes of a VQ model; train one by "
            "`python -m di4c_ext.pretrain --kind vq` and name its folder by --vq_model"
        )
    vq: Any = open_vq(named)
    vq = vq.to("cuda" if torch.cuda.is_available() else "cpu")
    return Loaded(loaded, codes_of(loaded, vq, checkpoints.cache_folder()), vq)


def augmentation(train: data.ImageTokens, share: float) -> Augment | None:
    """What training does to images: mirrors some if the data says so, alters a `share` of them; None for neither."""
    if not share and not train.horizontal_flip:
        return None
    if share and len(train.shape) != 2:
        raise ValueError(f"--augment_share {share}: works on grey images, these have shape {train.shape}; give 0")
    flip = partial(flip_images, shape=train.shape, layout=train.layout)
    size = train.shape[0], train.shape[1]
    alter = partial(augment_images, shape=size, num_states=train.num_states, share=share)

    def augment(x_0: Tensor, keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        own = random.fold_in(keys, 1)
        if train.horizontal_flip:
            x_0 = flip(x_0, random.fold_in(own, MIRROR))
        if not share:
            return x_0, {}
        altered, amounts = alter(x_0, own)
        return altered, {"augmentation": amounts}

    return augment


@dataclass(frozen=True)
class RealImages:
    """The pixels behind a data set of codes: training and held-out images, and what makes pixels of codes."""

    train: data.ImageTokens
    heldout: data.ImageTokens
    decoder: Decoder

    def told(self, config: Any, n: int) -> dict[str, Any]:
        """Classes of n samples in the proportions of the images, for a network that is told of them."""
        return {"labels": classes_like(self.train, n)} if num_classes_of(config) else {}

    def decode(self, samples: Tensor) -> Tensor:
        """Codes (N, D) -> levels of pixels."""
        return self.decoder(samples)


def real_images(images: data.ImageTokens, heldout_fraction: float, vq: VQModel) -> RealImages:
    """The images cut as their codes are, some of each side where they do not fit into memory; ValueError where the VQ
    model is not for them."""
    check_images(images, vq.config, "--vq_model")
    train, heldout = data.split(images, heldout_fraction)
    if isinstance(images.tokens, LazyRows):
        train, heldout = (data.spread(side, JUDGED) for side in (train, heldout))
    return RealImages(train, heldout, Decoder(vq, images.num_states))


def codes_at_best(real: RealImages, codes: data.ImageTokens, judge: Judge) -> dict[str, float]:
    """The figures of images that come back from their own codes, as many as the floors are taken at."""
    evenly = torch.arange(judge.floor_size) * len(codes) // judge.floor_size
    return judge.measure(real.decode(codes.tokens[evenly].long()))


def open_judge(
    train: data.ImageTokens, heldout: data.ImageTokens, args: EvaluationArguments, trust_remote_code: bool = False
) -> Judge:
    """The judge of these images, its floors at the number of samples of `args`, its classifier and what is known of the
    real images from the cache. Of more images than memory holds, 50,000 of a side are looked at."""
    train, heldout = (
        data.spread(side, JUDGED) if isinstance(side.tokens, LazyRows) else side for side in (train, heldout)
    )
    extractor = args.eval_feature_extractor
    return Judge(train, heldout, checkpoints.cache_folder(), args.eval_num_samples, extractor, trust_remote_code)


def judged(
    model: str, config: Any, images: DataArguments, args: EvaluationArguments, trust_remote_code: bool = False
) -> Measuring:
    """For `evaluate`: what the model in folder `model` is measured by, of the images that it is for."""
    is_tokens = config.model_type == "di4c_tokens"
    if not is_tokens and images.num_states is None and data.BUILT_IN.get(images.dataset_name) is None:
        images.num_states = config.num_states
    loaded = images.load(layout=layout_of(config))
    if is_tokens:
        vq: Any = vq_beside(model, images.vq_model)
        vq.check_denoiser(config)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        real = real_images(loaded, images.heldout_fraction, vq.to(device))
        some = real.heldout.subset(torch.arange(min(LATENT_EXAMPLES, len(real.heldout))))
        codes = codes_of(some, vq, checkpoints.cache_folder())
        return Measuring(open_judge(real.train, real.heldout, args, trust_remote_code), real, codes, real.train)
    if images.vq_model is not None:
        raise UsageError(f"--vq_model {images.vq_model}: {model} is no network of codes; leave it out")
    train, heldout = data.split(loaded, images.heldout_fraction)
    if (config.num_states, config.length) != (train.num_states, train.length):
        raise UsageError(
            f"--model {model}: has S = {config.num_states}, D = {config.length}; the images of "
            f"{train.name!r} have S = {train.num_states}, D = {train.length}; name the data it was trained on"
        )
    return Measuring(open_judge(train, heldout, args, trust_remote_code), None, heldout, train)
