"""Inpainting by the command: codes and pictures to begin from, masks of the grid and of pixels, what is refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import TOKENS, VQ
from torch import Tensor

from di4c_ext import codes, random, sample
from di4c_ext.generate import generate
from di4c_ext.inpainting import start_of
from di4c_ext.models import TokenConfig, TokenDenoiser, VQConfig, VQModel
from di4c_ext.sampler import sample_confidence
from di4c_ext.systems import latents_of, load_model, process_of

NETWORK = TOKENS | {"num_codes": 12, "num_classes": 3, "grid": 4, "embedding_std": 0.5, "mask_logit": True}
MASK, D = 12, 16


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of image tokens with its teacher and its VQ model, of three channels, untrained."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    vq = VQModel(VQConfig(**VQ, image_size=8, num_channels=3))
    teacher = TokenDenoiser(TokenConfig(**NETWORK, codebook=vq.fingerprint()))
    student = TokenDenoiser.from_teacher(teacher)
    for model, place in ((vq, "vq"), (teacher, "teacher"), (student, ".")):
        model.save_pretrained(folder / place)
    return folder


@pytest.fixture(scope="module")
def vq(run: Path) -> VQModel:
    return codes.open_vq(run / "vq")


def written(run: Path, output: Path, **flags: Any) -> dict[str, np.ndarray]:
    words = {"model": run, "num_steps": 3, "num_samples": 4, "output": output} | flags
    assert sample.main([word for name, value in words.items() for word in (f"--{name}", str(value))]) == 0
    with np.load(f"{output}.npz") as file:
        return dict(file)


def pictures(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def test_codes_that_are_given_are_kept(run: Path, tmp_path: Path) -> None:
    given = np.arange(2 * D).reshape(2, 4, 4) % 12
    hole = np.zeros((4, 4), int)
    hole[1:3, 1:] = 1
    np.savez(tmp_path / "codes.npz", codes=given)
    np.save(tmp_path / "hole.npy", hole)
    made = written(run, tmp_path / "out", inpaint=tmp_path / "codes.npz", mask=tmp_path / "hole.npy")
    start = torch.from_numpy(np.where(hole, MASK, given)).flatten(1)[[0, 1, 0, 1]]
    open_ = start == MASK
    found = torch.from_numpy(made["codes"])
    assert torch.equal(found[~open_], start[~open_]) and (found != MASK).all()
    assert torch.equal(found, generate(load_model(run), 3, 4, seed=0, start=start))
    assert len({tuple(row) for row in found[open_].view(4, -1).tolist()}) == 4, "each by its own key"
    decoded = codes.Decoder(codes.open_vq(run / "vq"))(found).view(4, 8, 8, 3)
    assert np.array_equal(made["images"], decoded.numpy())
    # The same, masked in the codes themselves; and the command reads what it has written.
    np.save(tmp_path / "masked.npy", start[:2].numpy())
    assert np.array_equal(written(run, tmp_path / "again", inpaint=tmp_path / "masked.npy")["codes"], made["codes"])
    third = written(run, tmp_path / "third", inpaint=tmp_path / "out.npz", mask=tmp_path / "hole.npy", seed=5)
    assert np.array_equal(third["codes"][:, ~open_[0]], made["codes"][:, ~open_[0]])
    assert not np.array_equal(third["codes"], made["codes"])


def test_pictures_become_codes_and_masks_of_pixels_cover_whole_ones(vq: VQModel, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels, config = pictures(2), TokenConfig(**NETWORK)
    (tmp_path / "two").mkdir()
    for i, one in enumerate(pixels):
        image.fromarray(one).save(tmp_path / "two" / f"{i}.png")
    np.savez(tmp_path / "two.npz", images=pixels)
    wanted = vq.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    hole = np.zeros((8, 8), np.uint8)
    hole[2, 3] = hole[7, 7] = 255  # codes 1, 1 and 3, 3
    image.fromarray(hole).save(tmp_path / "hole.png")
    np.save(tmp_path / "hole.npy", hole > 0)
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[1, 1] = inside[3, 3] = True
    for source, n in (("two", 2), ("two.npz", 2), ("two/0.png", 1)):
        for mask in ("hole.png", "hole.npy"):
            start = start_of(str(tmp_path / source), str(tmp_path / mask), config, vq, 3)
            expected = torch.where(inside.flatten(), MASK, wanted[:n])[torch.arange(3) % n]
            assert start.dtype == torch.int64 and torch.equal(start, expected), (source, mask)
    np.savez(tmp_path / "holes.npz", mask=np.stack([hole, 255 - hole]))
    start = start_of(str(tmp_path / "two"), str(tmp_path / "holes.npz"), config, vq, 2)
    assert (start == MASK).sum(1).tolist() == [2, 16]
    image.fromarray(pixels[0]).resize((32, 16)).save(tmp_path / "wide.png")
    assert start_of(str(tmp_path / "wide.png"), str(tmp_path / "hole.png"), config, vq, 1).shape == (1, 16)


def save(tmp_path: Path, name: str, **arrays: Any) -> Path:
    np.savez(tmp_path / name, **arrays)
    return tmp_path / name


def test_what_does_not_fit_is_named(run: Path, vq: VQModel, tmp_path: Path) -> None:
    fine, hole = np.zeros((1, D), int), np.ones((4, 4), int)
    there, whole = save(tmp_path, "fine.npz", codes=fine), save(tmp_path, "hole.npz", mask=hole)
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / "empty").mkdir()

    config = TokenConfig(**NETWORK)

    def refused(message: str, inpaint: Path = there, mask: Path | None = whole) -> None:
        with pytest.raises(ValueError, match=message):
            start_of(str(inpaint), None if mask is None else str(mask), config, vq, 2)

    refused(
        r"--inpaint .*: codes must be codes 0\.\.11 or the mask 12, got 13", save(tmp_path, "a.npz", codes=fine + 13)
    )
    refused(r"codes 0\.\.11 or the mask 12, got -1", save(tmp_path, "b.npz", codes=fine - 1))
    refused(
        r"codes must be \(N, 16\) or \(N, 4, 4\), the model's grid is 4 x 4, got \(1, 9\)",
        save(tmp_path, "c.npz", codes=fine[:, :9]),
    )
    refused("codes must be integers, got float64", save(tmp_path, "d.npz", codes=fine * 0.5))
    refused(r"holds \['x'\], no array named 'codes' or 'images'", save(tmp_path, "e.npz", x=fine))
    refused(
        "takes images of 8 x 8 x 3, those of .* are 8 x 8", save(tmp_path, "f.npz", images=np.zeros((1, 8, 8), int))
    )
    refused(
        r"images must have the levels 0\.\.255, got 0\.\.300",
        save(tmp_path, "g.npz", images=pictures(1) * 0 + np.arange(3) * 150),
    )
    refused(
        r"images must be integers \(N, height, width\[, 3\]\), got float64",
        save(tmp_path, "h.npz", images=pictures(1) / 2),
    )
    refused("no such file; give one of", tmp_path / "none.npz")
    refused("no such file; give one of", tmp_path / "none.png")
    refused("not a readable array file", tmp_path / "broken.npz")
    refused("--inpaint .*: no pictures", tmp_path / "empty")
    refused("nothing of image 0 is left to draw; name by --mask what is, or give codes that are 12", mask=None)
    refused("nothing of image 0 is left to draw", mask=save(tmp_path, "i.npz", mask=hole * 0))
    refused(
        r"--mask .*: must be 4 x 4, the grid of codes, or 8 x 8, the pixels, got int64 \(5, 4\)",
        mask=save(tmp_path, "j.npz", mask=np.ones((5, 4), int)),
    )
    refused("no array named 'mask'", mask=there)
    refused(
        "holds 2 masks for 1 images; give one, or one each", mask=save(tmp_path, "k.npz", mask=np.stack([hole] * 2))
    )
    refused("--mask .*: no such file", mask=tmp_path / "none.png")
    for flags, message in (
        ({"mask": whole}, "--mask .*: goes with --inpaint"),
        ({"inpaint": there}, "nothing of image 0 is left to draw"),
    ):
        with pytest.raises(ValueError, match=message):
            written(run, tmp_path / "out", **flags)
        assert not (tmp_path / "out.npz").exists()


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"temperature": 0.5}, {"temperature": 0.5}),
    ({"gumbel": 0, "randomize": "warm_up"}, {"gumbel": 0.0, "randomize": "warm_up"}),
    ({"randomize": "random"}, {"randomize": "random"}),
    ({"class_guidance": 3}, {"guidance": 3.0}),
    *(({"reveal_schedule": name}, {"schedule": name}) for name in ("cosine", "linear", "square", "root")),
]


@pytest.mark.parametrize(("flags", "options"), OPTIONS, ids=lambda value: " ".join(map(str, value.items())))
@pytest.mark.parametrize("num_steps", [1, 3])
def test_flags_of_sampling_are_the_samplers(
    run: Path, tmp_path: Path, flags: dict[str, Any], options: dict[str, Any], num_steps: int
) -> None:
    made = written(run, tmp_path / "out", num_steps=num_steps, **flags)
    assert np.array_equal(made["codes"], by_hand(load_model(run), num_steps, **options).numpy())


def test_a_teacher_guides(run: Path, tmp_path: Path) -> None:
    made = written(run, tmp_path / "out", class_guidance=6, teacher_guides=True, teacher=run / "teacher")
    teacher = load_model(run / "teacher")
    wanted = by_hand(load_model(run), 3, guidance=6.0, unconditional=partial(teacher, drop_label=True), hybrid=True)
    assert np.array_equal(made["codes"], wanted.numpy())
    with pytest.raises(ValueError, match=r"--reveal_schedule 'sqrt': must be one of .*root"):
        written(run, tmp_path / "none", reveal_schedule="sqrt")


def by_hand(student: Any, num_steps: int, **options: Any) -> Tensor:
    """Four samples of the classes in turn, in every way as the command draws them."""
    keys, latents = random.keys(0, 4), latents_of(student.config)
    options = {"unconditional": partial(student, drop_label=True)} | options
    return sample_confidence(
        partial(student, labels=torch.arange(4) % 3),
        process_of(student.config),
        torch.full((4, D), MASK),
        num_steps,
        keys,
        latents=lambda key: latents(key, 1)[:, 0],
        **options,
    )
