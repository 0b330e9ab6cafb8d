"""What a run is about: the commands train, sample and measure, a task gives what is peculiar to images or to text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from di4c_ext.config import PretrainConfig
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.process import Process

if TYPE_CHECKING:
    from di4c_ext.arguments import DataArguments
    from di4c_ext.evaluate import EvaluationArguments
    from di4c_ext.text_arguments import TextArguments
    from di4c_ext.trainer import Augment


class Encoder(NamedTuple):
    """The masked language model that a teacher begins from, what is said of it, and the seed of what it lacks.

    config: None, or settings on top of the config that `source` then is: its weights begin at random.
    """

    source: str
    settings: dict[str, Any]
    seed: int
    config: dict[str, Any] | None = None


class Named(NamedTuple):
    """A teacher that is named: a folder, of text also a file or a hub name; a revision of the latter.

    second_round: it may be a student, whose student then begins as it.
    """

    source: str
    revision: str | None = None
    second_round: bool = False


class Judge(Protocol):
    """Measures samples; see `metrics.judge.Judge` and `metrics.text_judge.TextJudge`."""

    floors: dict[str, float]
    sizes: dict[str, int]

    def measure(self, samples: Tensor, num_bootstraps: int = 0, seed: int = 0) -> dict[str, float]:
        """Figures by name; with num_bootstraps also the ends of their intervals, <figure>_low and <figure>_high."""
        ...


@runtime_checkable
class Bounding(Protocol):
    """A judge that also bounds the likelihood of what a model makes in few steps, which hangs on no samples."""

    def of_model(
        self, model: MixtureDenoiser, num_steps: int, num_bootstraps: int = 0, seed: int = 0
    ) -> dict[str, float]: ...


class Drawing(Protocol):
    """How samples are drawn that need more than a model and a number, and what is made of them before they are seen."""

    def told(self, config: Any, n: int) -> dict[str, Any]:
        """Further arguments of `generate` for n samples of a network of this config."""
        ...

    def decode(self, samples: Tensor) -> Tensor: ...


class Measuring(NamedTuple):
    """What a saved model is measured by: the judge, how samples are drawn, held-out examples as the network takes them,
    and the data set that a report shows beside samples."""

    judge: Judge
    drawing: Drawing | None
    heldout: Any
    shown: Any


class Task(Protocol):
    """The data of a run, its networks and its judge.

    train, heldout: data sets of {"x_0", "example"}. process: by name and constants. unit: what an example is called.
    digits: behind the point of a teacher's bound.
    """

    heldout: Any
    process: Mapping[str, Any]
    unit: str
    digits: int

    @property
    def train(self) -> Any: ...

    def new_teacher(self, config: PretrainConfig) -> MixtureDenoiser:
        """Untrained, a function of config.seed; ValueError for settings it cannot have."""
        ...

    def cached_teacher(self, config: PretrainConfig) -> Path | None:
        """Where the cache keeps the teacher of this data and these settings, whether it is there or not.

        None: it keeps none, of a model that began as another.
        """
        ...

    def load_teacher(self, source: str) -> MixtureDenoiser:
        """From a folder (or what else this task takes), held against data and process; ValueError naming the fault."""
        ...

    def new_student(self, teacher: MixtureDenoiser, settings: dict[str, Any]) -> MixtureDenoiser:
        """An untrained student; TypeError or ValueError for settings it cannot have."""
        ...

    def process_of(self, config: Any) -> Process:
        """The process of a model of this config, with what this run says of a teacher's steps."""
        ...

    def augment(self, share: float) -> Augment | None:
        """What training does to a batch before it is noised; None: nothing."""
        ...

    def save_once(self, output: Path) -> None:
        """Writes what the whole run needs into its folder: the VQ model of codes."""
        ...

    def save_with_model(self, folder: Path) -> list[str]:
        """Writes what every model's folder holds beside the model, so that it can be used alone: the tokenizer.

        Gives the names of the files.
        """
        ...

    def bounds(self, teacher: MixtureDenoiser, time_min: float) -> dict[str, Any]:
        """`bounds` by side, `num_bounds`, how many examples each stands on, and `bounds_name`, what they are."""
        ...

    def open_judge(self, args: EvaluationArguments) -> Judge:
        """What samples are held against."""
        ...

    @property
    def drawing(self) -> Drawing | None:
        """How samples are drawn."""
        ...

    def about(self, judge: Judge) -> dict[str, Any]:
        """What a report says of this data's judge beside its floors."""
        ...

    def save_samples(self, samples: Tensor, config: Any, stem: Path) -> Any:
        """Writes samples a person can look at, `stem` without ending; gives what a report shows of them."""
        ...

    @property
    def shown(self) -> Any:
        """The data set that a report describes: whole, or as much of a stream as is held."""
        ...


def open_task(
    images: DataArguments,
    text: TextArguments,
    *,
    named: Named | None = None,
    encoder: Encoder | None = None,
    seed: int = 0,
    kept: Path | None = None,
) -> Task:
    """The task of these arguments.

    named: the teacher that is named, if any. encoder: what a new one begins from. seed: of the order in which data that
    are read as a stream come. kept: the folder of a run that is gone on with.
    """
    if images.modality == "text":
        from di4c_ext.text_task import TextTask

        return TextTask(images, text, named=named, encoder=encoder, seed=seed)
    from di4c_ext.image_task import ImageTask

    text.refuse()
    if encoder is not None:
        raise ValueError("--kind masked-lm: is for text; give --modality text")
    if named is not None and (named.second_round or named.revision is not None):
        flag = "second_round" if named.second_round else f"teacher_revision {named.revision}"
        raise ValueError(f"--{flag}: is for text; leave it out")
    return ImageTask(images, kept, text.trust_remote_code)
