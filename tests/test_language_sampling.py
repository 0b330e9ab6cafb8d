"""Text from a given start: prefix and infilling, every sampler and any number of steps, a batch as its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import language
import pytest
import torch
from dits import by_formula
from torch import Tensor

from di4c_ext.generate import SamplingArguments, generate, sampler_of
from di4c_ext.models import Di4CForMaskedLM
from di4c_ext.models.base import MixtureDenoiser
from di4c_ext.systems import process_of

SAMPLERS = ("ancestral", "analytic", "first_hitting")
N = 5


def masked_lm(folder: Path, family: str = "bert", student: bool = True) -> Di4CForMaskedLM:
    """Its latents have a say: every weight is away from its start."""
    source = language.save(family, folder)
    if not student:
        return Di4CForMaskedLM.as_teacher(source).eval()
    model = Di4CForMaskedLM.from_teacher(source, latent_dim=3, latent_hidden_size=8)
    torch.manual_seed(1)
    language.stir(model.latent_in)
    return model.eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MixtureDenoiser]:
    return {
        "dit teacher": by_formula(),
        "dit student": by_formula(is_student=True, hidden_logits=True),
        "bert student": masked_lm(tmp_path_factory.mktemp("bert")),
        "roberta teacher": masked_lm(tmp_path_factory.mktemp("roberta"), "roberta", student=False),
    }


KINDS = pytest.mark.parametrize("kind", ["dit teacher", "dit student", "bert student", "roberta teacher"])


def begun(model: MixtureDenoiser, length: int = 12) -> Tensor:
    """A prefix, a gap in the middle, every third position, nothing given, everything given."""
    mask, first = model.config.mask_id, 6
    start = torch.full((N, length), mask)
    start[0, :5] = first
    start[1] = torch.arange(length) + first
    start[1, 4:8] = mask
    start[2, ::3] = first + 1
    start[4] = first + 2
    return start


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 6])
@KINDS
def test_clean_positions_never_change(models: Any, kind: str, num_steps: int, sampler: str) -> None:
    model = models[kind]
    start, mask = begun(model), model.config.mask_id
    kept = start.clone()
    options = SamplingArguments(sampler=sampler)
    found = generate(model, num_steps, N, seed=0, start=start, options=options)
    assert torch.equal(start, kept) and found.shape == start.shape
    assert torch.equal(found[start != mask], start[start != mask])
    assert (found != mask).all() and (found >= 0).all() and (found < process_of(model.config).num_states).all()
    other = generate(model, num_steps, N, seed=1, start=start, options=options)
    assert not torch.equal(other, found) and torch.equal(other[4], found[4])


@pytest.mark.parametrize("sampler", SAMPLERS)
@KINDS
def test_batched_equals_one_by_one_in_any_order(models: Any, kind: str, sampler: str) -> None:
    """Sample i hangs on the seed, its number and its start; which others there are, and when, changes nothing."""
    model = models[kind]
    start, options = begun(model), SamplingArguments(sampler=sampler, top_p=0.9, temperature=0.9)
    whole = generate(model, 4, N, seed=3, start=start, options=options)
    for size in (1, 2, 3):
        assert torch.equal(generate(model, 4, N, seed=3, batch_size=size, start=start, options=options), whole)
    assert torch.equal(generate(model, 4, 2, seed=3, start=start[:2], options=options), whole[:2])


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_filling_up_changes_nothing(tmp_path: Path, family: str) -> None:
    """Sequences of several lengths in one batch, filled up with the pad token: each as if it were alone."""
    model = masked_lm(tmp_path, family)
    mask, pad, lengths = model.config.mask_id, language.SPECIAL["pad"], (12, 7, 9)
    start = torch.full((3, 12), mask)
    start[:, :2] = 8
    attention = torch.arange(12) < torch.tensor(lengths)[:, None]
    start[~attention] = pad
    for sampler in SAMPLERS:
        options = SamplingArguments(sampler=sampler)
        told: dict[str, Any] = {"seed": 2, "options": options, "attention_mask": attention.long()}
        whole = generate(model, 5, 3, start=start, **told)
        assert (whole[~attention] == pad).all() and (whole != mask).all()
        # Cut to the longest that is left, sample after sample: the last ones first.
        for count in (1, 2):
            shorter = generate(model, 5, 3, seed=2, options=options, start=_only(start, count, lengths[count]))
            assert torch.equal(shorter[count], whole[count, : lengths[count]])
    for bad, message in (
        ({"attention_mask": attention[:, :5]}, "goes with start and has its shape"),
        ({"attention_mask": torch.zeros_like(start)}, "holds masks where attention_mask is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, 5, 3, seed=2, start=start, **bad)


def _only(start: Tensor, row: int, length: int) -> Tensor:
    """The sample alone of interest at its own length; the others stay, cut."""
    mask = start[0, -1]
    out = start[:, :length].clone()
    out[out == language.SPECIAL["pad"]] = mask
    out[row] = start[row, :length]
    return out


def test_skipping_idle_steps(models: Any) -> None:
    for kind in ("dit student", "bert student"):
        model, start = models[kind], begun(models[kind])
        seen: list[int] = []
        handle = model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(len(args[0])), with_kwargs=True
        )
        plain = generate(model, 60, N, seed=1, start=start)
        assert seen == [N] * 60
        seen.clear()
        options = SamplingArguments(skip_idle=True)
        assert torch.equal(generate(model, 60, N, seed=1, start=start, options=options), plain)
        assert sum(seen) <= int((start == model.config.mask_id).sum()) < 60 * N
        handle.remove()


def test_first_hitting_makes_an_evaluation_for_each_mask(models: Any) -> None:
    model = models["dit teacher"]
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    options = SamplingArguments(sampler="first_hitting")
    start = begun(model)
    generate(model, 1, N, seed=0, start=start, options=options)
    masks = (start == model.config.mask_id).sum(1)
    assert len(seen) == int(masks.max()) and sum(seen) == int(masks.sum())
    seen.clear()
    generate(model, 7, 2, seed=0, options=options)
    assert seen == [2] * model.config.length
    handle.remove()


def test_a_network_in_training_mode_is_sampled_without_dropout() -> None:
    quiet, noisy = (by_formula(is_student=True, dropout=rate) for rate in (0.0, 0.5))
    noisy.train()
    for sampler in SAMPLERS:
        options = SamplingArguments(sampler=sampler)
        found, expected = (generate(model, 3, 4, seed=0, options=options) for model in (noisy, quiet))
        assert torch.equal(found, expected) and noisy.training and noisy.backbone.blocks[0].dropout.training


def test_a_nucleus_of_one_is_the_likeliest(models: Any) -> None:
    """With one step a product teacher's every token is then its argmax, which temperature 0 takes as well."""
    model = models["dit teacher"]
    nucleus = generate(model, 1, 4, seed=0, options=SamplingArguments(top_p=1e-6))
    coldest = generate(model, 1, 4, seed=0, options=SamplingArguments(temperature=0.0))
    assert torch.equal(nucleus, coldest) and not torch.equal(nucleus, generate(model, 1, 4, seed=0))


def test_shorter_than_the_model(models: Any) -> None:
    model = models["dit student"]
    start = begun(model, 7)
    found = generate(model, 3, N, seed=0, start=start)
    assert found.shape == (N, 7) and sampler_of(model) == "ancestral"


def test_refusals(models: Any) -> None:
    model = models["dit teacher"]
    start = begun(model)
    for bad, message in (
        (start[:2], r"must be int64 \(N, D\) with N = 5 samples and D from 1 to 12"),
        (start.float(), "got torch.float32"),
        (torch.full((N, 13), 20), r"got torch.int64 \(5, 13\)"),
        (start[:, :0], "D from 1 to 12"),
        (start - 21, r"must hold states 0\.\.19 and the mask 20, got -15"),
    ):
        with pytest.raises(ValueError, match=f"start: .*{message}"):
            generate(model, 2, N, seed=0, start=bad)
    with pytest.raises(ValueError, match="a di4c_dit attends to every position"):
        generate(model, 2, N, seed=0, start=start, attention_mask=torch.ones_like(start))
    for options, message in (
        ({"sampler": "tau_leaping"}, "this model is masked, it takes ancestral, analytic or first_hitting"),
        ({"sampler": "first_hitting", "skip_idle": True}, "--skip_idle: is for the ancestral sampler"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, 2, 1, seed=0, options=SamplingArguments(**options))
    for top_p in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="--top_p"):
            SamplingArguments(top_p=top_p)
