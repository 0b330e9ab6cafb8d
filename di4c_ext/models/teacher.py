"""What the library must know of a masked language model to use it as a teacher, in one frozen description."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

# Families whose logits at a position are of the next one, as in the autoregressive models they grew from.
SHIFTED = ("Dream",)
# The names by which configs say how long a sequence may be.
_LENGTHS = ("max_position_embeddings", "max_sequence_length", "model_length", "n_positions")
# Tokenizers without a limit say so by a number larger than this.
_UNLIMITED = 10**9
AUTO_CLASSES = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")


@dataclass(frozen=True)
class TeacherDescription:
    """A masked language model as a product denoiser: logits (B, D, S) of the tokens at masked positions.

    num_states          S, classes of its head
    mask_id             the token that means "masked", 0..S; S: a token of its own, which the head has no class for
    embeddings          name of the module that embeds the tokens, where the latent of a student is added
    head                name of the linear map that ends the head; None: the model names none
    num_tokens          ids the tokenizer knows; the head's classes from there on are padding, never drawn
    special_ids         classes never drawn beside the mask; a token that occurs in the data must not be one
    max_positions       longest sequence; None: no limit
    shift               logits at position d - 1 are of position d
    causal              its attention looks back only unless told otherwise; it is then told to look both ways
    pad_id              token of positions that are filled up; they are not attended to
    pad_to_multiple_of  sequences are filled up to a multiple of this, and cut again
    auto_class          the class of transformers that opens it
    remote_code         it is made of code of its own, which runs only with the user's consent

    Raises ValueError, naming the field, for numbers that do not belong together.
    """

    num_states: int
    mask_id: int
    embeddings: str
    head: str | None = None
    num_tokens: int | None = None
    special_ids: tuple[int, ...] = ()
    max_positions: int | None = None
    shift: bool = False
    causal: bool = False
    pad_id: int | None = None
    pad_to_multiple_of: int = 1
    auto_class: str = AUTO_CLASSES[0]
    remote_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "special_ids", tuple(self.special_ids))  # a list, where it was read from a file
        for name in ("num_states", "num_tokens", "max_positions", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is None and name in ("num_tokens", "max_positions"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"TeacherDescription: {name} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.mask_id, int) or not 0 <= self.mask_id <= self.num_states:
            raise ValueError(
                f"TeacherDescription: mask_id must lie in 0..num_states = 0..{self.num_states}, got {self.mask_id!r}"
            )
        bad = [i for i in self.special_ids if not 0 <= i < self.num_states]
        if bad:
            raise ValueError(f"TeacherDescription: special_ids must lie below {self.num_states}, got {bad}")
        if self.pad_to_multiple_of > 1 and self.pad_id is None:
            raise ValueError(
                f"TeacherDescription: pad_to_multiple_of {self.pad_to_multiple_of} needs a pad_id to fill up with"
            )
        if self.auto_class not in AUTO_CLASSES:
            raise ValueError(f"TeacherDescription: auto_class must be one of {AUTO_CLASSES}, got {self.auto_class!r}")

    def never_drawn(self) -> list[tuple[int, int]]:
        """Runs (first, past the last) of the classes that get no probability, in order."""
        ids = set(self.special_ids) | ({self.mask_id} if self.mask_id < self.num_states else set())
        runs: list[tuple[int, int]] = []
        known = self.num_states if self.num_tokens is None else min(self.num_tokens, self.num_states)
        for i in [*sorted(i for i in ids if i < known), *range(known, self.num_states)]:
            if runs and runs[-1][1] == i:
                runs[-1] = (runs[-1][0], i + 1)
            else:
                runs.append((i, i + 1))
        return runs

    def check_length(self, caller: str, length: int) -> None:
        """ValueError for sequences longer than the teacher takes."""
        if self.max_positions is not None and length > self.max_positions:
            raise ValueError(
                f"{caller}: sequences of {length} tokens, but this teacher takes at most {self.max_positions}; "
                "give shorter blocks"
            )

    def check_tokenizer(self, caller: str, num_tokens: int, mask_id: int | None) -> None:
        """ValueError where the data were cut by another tokenizer than the teacher's.

        Args:
            num_tokens: ids 0..num_tokens-1 of the data's tokenizer. mask_id: its mask, None where it has none.
        """
        known = self.num_states if self.num_tokens is None else self.num_tokens
        if num_tokens > known or (num_tokens < known and self.num_tokens is not None):
            raise ValueError(
                f"{caller}: the tokenizer of the data knows {num_tokens} tokens, the teacher {known}; "
                "cut the data with the teacher's own tokenizer"
            )
        if mask_id is not None and mask_id != self.mask_id:
            raise ValueError(
                f"{caller}: token {mask_id} is the mask of the data's tokenizer, but {self.mask_id} is the teacher's; "
                "cut the data with the teacher's own tokenizer, or say which is right by mask_id="
            )

    def check_tokens(self, caller: str, tokens: Tensor) -> None:
        """ValueError for tokens (any shape) that the teacher never predicts: masks, special ids, unknown ones."""
        if tokens.numel() == 0:
            return
        smallest, largest = (int(x) for x in tokens.aminmax())
        if smallest < 0 or largest >= self.num_states:
            raise ValueError(
                f"{caller}: token {smallest if smallest < 0 else largest} lies outside the teacher's "
                f"{self.num_states} classes; cut the data with the teacher's own tokenizer"
            )
        for first, past in self.never_drawn():
            found = (tokens >= first) & (tokens < past)
            if bool(found.any()):
                token = int(tokens[found][0])
                what = "the mask" if token == self.mask_id else "one of those this teacher never draws"
                raise ValueError(
                    f"{caller}: token {token} occurs {int(found.sum())} times, but it is {what}; "
                    "take it out of the data, or out of special_ids="
                )


def describe(model: nn.Module, tokenizer: Any = None, **given: Any) -> TeacherDescription:
    """The description of a model: what its config, its modules and its tokenizer tell, and on top what is `given`.

    Args:
        model: of transformers, or alike: with a config and, unless `embeddings` names them, get_input_embeddings.
        tokenizer: the model's, or None.
        given: fields of TeacherDescription that the user knows better.

    Raises:
        ValueError: where something is not told, or model and tokenizer contradict each other.
    """
    config: Any = model.config
    unknown = sorted(set(given) - {field.name for field in fields(TeacherDescription)})
    if unknown:
        known = ", ".join(field.name for field in fields(TeacherDescription))
        raise ValueError(f"describe: {', '.join(unknown)} is no field of TeacherDescription; it has {known}")
    embeddings = given.get("embeddings") or _name_of(model, "get_input_embeddings")
    if embeddings is None:
        raise ValueError(
            f"{type(model).__name__}: does not tell which module embeds its tokens; name it by embeddings=, one of "
            f"{[name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]}"
        )
    head = given.get("head") or _name_of(model, "get_output_embeddings")
    rows = weight_of(model, embeddings).shape[0]
    num_states = weight_of(model, head).shape[0] if head is not None else getattr(config, "vocab_size", rows)
    found: dict[str, Any] = {
        "num_states": num_states,
        "mask_id": given["mask_id"] if "mask_id" in given else _mask_id(config, tokenizer),
        "embeddings": embeddings,
        "head": head,
        "num_tokens": None if tokenizer is None else len(tokenizer),
        "pad_id": _first_number(getattr(tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None)),
        "max_positions": _max_positions(model, tokenizer),
        "shift": getattr(config, "model_type", None) in SHIFTED,
    }
    found["special_ids"] = _pad_only(tokenizer, found["pad_id"], found["mask_id"], num_states)
    told = TeacherDescription(**(found | given))
    if told.num_tokens is not None and told.num_tokens > rows:
        raise ValueError(
            f"the tokenizer knows {told.num_tokens} tokens, but the teacher embeds {rows}; "
            "give the tokenizer that belongs to it, or resize the teacher's embeddings first"
        )
    if told.mask_id >= rows:
        raise ValueError(f"mask_id {told.mask_id}: the teacher embeds the tokens 0..{rows - 1} only")
    return told


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight (rows, width) of an embedding or linear map by its name; ValueError where there is none."""
    try:
        weight = model.get_submodule(name).weight
    except AttributeError:
        weight = None
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise ValueError(f"{type(model).__name__}: {name!r} names no embedding or linear map with a weight")
    return weight


def _name_of(model: nn.Module, getter: str) -> str | None:
    """The name of the module that model.getter() gives, None where it gives none."""
    try:
        wanted = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _mask_id(config: Any, tokenizer: Any) -> int:
    """The mask's id from the tokenizer and the config, which must agree."""
    cut, told = getattr(tokenizer, "mask_token_id", None), getattr(config, "mask_token_id", None)
    if cut is not None and told is not None and cut != told:
        raise ValueError(
            f"the mask is token {cut} by the tokenizer and {told} by the teacher's config; say which by mask_id="
        )
    found = _first_number(cut, told)
    if found is None:
        raise ValueError(
            "neither the teacher's config nor a tokenizer tells which token is the mask; give mask_id= or tokenizer="
        )
    return found


def _pad_only(tokenizer: Any, pad_id: int | None, mask_id: int, num_states: int) -> tuple[int, ...]:
    """The padding token, where it is nothing else beside: packed blocks hold none of it."""
    others = {getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "cls", "sep", "unk")}
    if pad_id is None or pad_id in others or pad_id == mask_id or not 0 <= pad_id < num_states:
        return ()
    return (pad_id,)


def _max_positions(model: nn.Module, tokenizer: Any) -> int | None:
    config: Any = model.config
    told = _first_number(*(getattr(config, name, None) for name in _LENGTHS))
    if told is not None:
        for name, module in model.named_modules():
            # RoBERTa counts positions from the one after its padding.
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                told = min(told, module.num_embeddings - int(module.padding_idx) - 1)
    cut = getattr(tokenizer, "model_max_length", None)
    limits = [x for x in (told, cut) if x is not None and x < _UNLIMITED]
    return min(limits) if limits else None


def _first_number(*values: Any) -> int | None:
    numbers: Iterable[int] = (x for x in values if isinstance(x, int) and not isinstance(x, bool))
    return next(iter(numbers), None)
