"""Which text, and how it is cut into tokens and blocks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass
class TextArguments:
    """What `--modality text` adds to the arguments of the data."""

    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "text: characters (27 of them), gpt2, a folder or hub name; default: the teacher's own"},
    )
    block_size: int | None = field(
        default=None, metadata={"help": "text: D, tokens in a sequence; default: as many as the teacher was trained on"}
    )
    text_column: str | None = field(default=None, metadata={"help": "text: column of a data set; default: text"})
    separator: str | None = field(
        default=None,
        metadata={"help": "text: what parts the documents of a .txt file, e.g. '\\n\\n'; default: nothing"},
    )
    streaming: bool = field(default=False, metadata={"help": "text: read it as it is needed, not whole into memory"})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "consent to run the code that a model, tokenizer or feature extractor brings along"},
    )

    def __post_init__(self) -> None:
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"--block_size {self.block_size}: must be at least 1, e.g. 128")

    def refuse(self) -> None:
        """ValueError where any of these that is of text alone was given and the run is not about text."""
        for known in fields(self):
            value = getattr(self, known.name)
            if known.name != "trust_remote_code" and value != known.default:
                raise ValueError(f"--{known.name} {value}: is for text; give --modality text, or leave it out")

    @property
    def parting(self) -> str | None:
        """The separator, its escapes as a shell leaves them made into what they stand for."""
        return None if self.separator is None else self.separator.replace("\\n", "\n").replace("\\t", "\t")
