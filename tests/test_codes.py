"""The cache of codes: mirror images, a process that is killed in the middle, several at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import VQ

from di4c_ext import codes, data, random
from di4c_ext.augment import flip_images
from di4c_ext.config import PretrainConfig
from di4c_ext.models import TokenConfig, TokenDenoiser, VQConfig, VQModel
from di4c_ext.process import ConfidenceProcess
from di4c_ext.trainer import PretrainTrainer


@pytest.fixture
def vq() -> VQModel:
    """Untrained, its codes spread as its encoder's places are, so that images tell them apart."""
    torch.manual_seed(0)
    model = VQModel(VQConfig(**VQ | {"num_codes": 300}, image_size=8, num_channels=1)).eval()
    with torch.no_grad():
        z = model.quant_conv(model.encoder(2 * torch.rand(75, 1, 8, 8) - 1)).permute(0, 2, 3, 1).reshape(-1, 4)
        model.quantize.embedding.weight.copy_(z[torch.randperm(len(z))[:300]])
    return model


@pytest.fixture
def images() -> data.ImageTokens:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    return data.from_arrays(pixels, np.arange(40) % 3, num_states=256, name="noise", horizontal_flip=True)


def test_mirror_images_have_codes_of_their_own(images: data.ImageTokens, vq: VQModel, tmp_path: Path) -> None:
    made = codes.codes_of(images, vq, tmp_path)
    flipped = replace(images, tokens=images.images().flip(2).flatten(1))
    for rows, origin in ((made.tokens, images), (made.mirrored, flipped)):
        assert rows.dtype == torch.int16
        assert torch.equal(rows.long(), vq.encode(codes.as_input(origin.tokens, origin)))
    mirrored_codes = made.tokens.view(40, 4, 4).flip(2).flatten(1)
    assert (made.mirrored != mirrored_codes).float().mean() > 0.02, "which mirrored codes are not"
    (folder,) = tmp_path.iterdir()
    assert np.load(folder / codes.CODES, mmap_mode="r").shape == (80, 16)
    plain = codes.codes_of(replace(images, horizontal_flip=False), vq, tmp_path)
    assert plain.mirrored is None and torch.equal(plain.tokens, made.tokens)
    assert not made.horizontal_flip, "no augmentation is to take codes for pixels"
    train, heldout = data.split(made, 0.25)
    assert torch.equal(train.mirrored, made.mirrored[train.example]) and len(heldout.mirrored) == 10
    told = {x.fingerprint() for x in (made, plain, train, replace(made, mirrored=made.mirrored + 1))}
    assert len(told) == 4
    batch, one = train.__getitems__([4, 2]), train[4]
    assert torch.equal(batch["mirrored"], train.mirrored[[4, 2]].long()) and torch.equal(
        one["mirrored"], batch["mirrored"][0]
    )
    assert "mirrored" not in plain[0]


def test_training_draws_one_of_the_two_by_key(
    images: data.ImageTokens, vq: VQModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often, whatever the batch, anew at every step; and as pixels' mirror images are drawn."""
    made = codes.codes_of(images, vq, tmp_path / "cache")
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_size": 8, "num_classes": 3, "grid": 4}
    model = TokenDenoiser(TokenConfig(num_codes=300, **sizes))
    args = PretrainConfig(output_dir=str(tmp_path / "out"), use_cpu=True, disable_tqdm=True, max_steps=3)
    trainer = PretrainTrainer(
        model, process=ConfidenceProcess(300), args=replace(args, per_device_train_batch_size=8), train_dataset=made
    )
    seen: list[torch.Tensor] = []

    def watch(network: Any, x_0: torch.Tensor, keys: torch.Tensor, **told: Any) -> dict[str, torch.Tensor]:
        seen.append(x_0)
        return {"loss": x_0.sum() * 0.0}

    monkeypatch.setattr(trainer, "loss_parts", watch)

    def drawn(rows: list[int], step: int = 0) -> torch.Tensor:
        trainer.state.global_step = step
        trainer.compute_loss(trainer.model, made.__getitems__(rows))
        return seen[-1]

    everything = list(range(40))
    first = drawn(everything)
    is_mirror = (first == made.mirrored).all(1)
    assert 8 < int(is_mirror.sum()) < 32
    assert torch.equal(first, torch.where(is_mirror[:, None], made.mirrored, made.tokens).long())
    assert torch.equal(drawn([7, 30]), first[[7, 30]]) and not torch.equal(drawn(everything, 1), first)
    keys = random.fold_in(random.fold_in(random.fold_in(random.fold_in(args.seed, made.example), 0), 1), 3)
    ramp = torch.arange(16).expand(40, 16).contiguous()
    assert torch.equal((flip_images(ramp, keys, shape=(1, 16)) != ramp).any(1), is_mirror)


KILLED = """
    import os, signal, sys
    import numpy as np
    from di4c_ext import codes, data
    images = data.from_arrays(np.load(sys.argv[1]), num_states=256, name="noise", horizontal_flip=True)
    vq = codes.open_vq(sys.argv[2])
    codes.CHUNK, encode, calls = 8, vq.encode, []

    def killed_at_the_sixth(inputs, batch_size):  # in the third piece, between the images and their mirror images
        calls.append(len(inputs))
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(inputs, batch_size)

    vq.encode = killed_at_the_sixth
    codes.codes_of(images, vq, __import__("pathlib").Path(sys.argv[3]))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal on this system")
def test_a_process_that_was_killed_is_gone_on_with(
    images: data.ImageTokens, vq: VQModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = replace(images, labels=None)
    np.save(tmp_path / "pixels.npy", images.images().numpy())
    vq.save_pretrained(tmp_path / "vq")
    cache = tmp_path / "cache"
    words = [
        sys.executable,
        "-c",
        textwrap.dedent(KILLED),
        *map(str, (tmp_path / "pixels.npy", tmp_path / "vq", cache)),
    ]
    ended = subprocess.run(
        words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (folder,) = cache.iterdir()
    assert json.loads((folder / codes.STATE).read_text()) == {"done": 16, "images": 40}
    calls: list[int] = []
    model = codes.open_vq(tmp_path / "vq")
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda inputs, size: calls.append(len(inputs)) or encode(inputs, size))
    made = codes.codes_of(images, model, cache)
    assert calls == [24, 24], "its lock died with it, and what it had noted is kept"
    whole = codes.codes_of(images, model, tmp_path / "another")
    assert torch.equal(made.tokens, whole.tokens) and torch.equal(made.mirrored, whole.mirrored)
    assert json.loads((folder / codes.STATE).read_text())["done"] == 40


def test_a_file_that_lost_its_end_is_made_anew(images: data.ImageTokens, vq: VQModel, tmp_path: Path) -> None:
    made = codes.codes_of(images, vq, tmp_path)
    wanted = made.tokens.clone()
    (folder,) = tmp_path.iterdir()
    os.truncate(folder / codes.CODES, 500)

    class Stopped(Exception):
        pass

    def stopped(*_: Any) -> None:
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vq, "encode", stopped)
        with pytest.raises(Stopped):
            codes.codes_of(images, vq, tmp_path)
    assert json.loads((folder / codes.STATE).read_text())["done"] == 0, "a new file has nothing in it"
    assert torch.equal(codes.codes_of(images, vq, tmp_path).tokens, wanted)


def test_of_several_processes_one_makes_them(
    images: data.ImageTokens, vq: VQModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / f"codes-{codes._key(images, vq)}"
    encode = vq.encode

    def locked_out(*arguments: Any) -> torch.Tensor:
        with open(folder / codes.LOCK, "w") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return encode(*arguments)

    monkeypatch.setattr(vq, "encode", locked_out)
    codes.codes_of(images, vq, tmp_path)
    with open(folder / codes.LOCK, "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free again; and those that are there need none
        monkeypatch.setattr(vq, "encode", lambda *_: pytest.fail("they are there"))
        assert len(codes.codes_of(images, vq, tmp_path)) == 40


def test_codes_take_no_more_bytes_than_they_must() -> None:
    kinds = {number: codes._dtype(VQModel(VQConfig(**VQ | {"num_codes": number}))) for number in (256, 257, 32_768)}
    assert kinds == {256: np.uint8, 257: np.int16, 32_768: np.int16}
