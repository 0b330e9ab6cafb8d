"""The VQ autoencoder: its definition, codes and images in pieces, its loss and code-book, checkpoints, errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from token_models import SMALL, SMALL_VQ, pictures, tokens_by_formula, vq_by_formula
from torch import Tensor
from torch.nn import functional

from di4c_ext.models import TokenConfig, VQConfig, VQModel
from di4c_ext.models.vqgan_loss import restart_codes, vq_loss

N = 3


class Definition:
    """The published network written down by its names alone, run from a state without any of the model's modules."""

    def __init__(self, model: VQModel) -> None:
        self.state, self.config = model.state_dict(), model.config

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[name + ".weight"]
        padding = 0 if stride == 2 else weight.shape[-1] // 2
        return functional.conv2d(x, weight, self.state[name + ".bias"], stride, padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.state[name + ".weight"]
        groups = min(32, len(weight) // 4)  # 32 as published from 128 feature maps on
        return functional.group_norm(x, groups, weight, self.state[name + ".bias"], 1e-6)

    def swish(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(name + ".conv1", self.swish(self.norm(name + ".norm1", x)))
        h = self.conv(name + ".conv2", self.swish(self.norm(name + ".norm2", h)))
        has_shortcut = name + ".nin_shortcut.weight" in self.state
        return h + (self.conv(name + ".nin_shortcut", x) if has_shortcut else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        y = self.norm(name + ".norm", x)
        q, k, v = (self.conv(f"{name}.{part}", y).flatten(2) for part in "qkv")
        share = torch.einsum("ncp,ncr->npr", q, k).mul(x.shape[1] ** -0.5).softmax(-1)
        return x + self.conv(name + ".proj_out", torch.einsum("npr,ncr->ncp", share, v).view_as(x))

    def middle(self, name: str, x: Tensor) -> Tensor:
        return self.block(name + ".block_2", self.attention(name + ".attn_1", self.block(name + ".block_1", x)))

    def scale(self, name: str, x: Tensor, number: int) -> Tensor:
        for i in range(number):
            x = self.block(f"{name}.block.{i}", x)
            if f"{name}.attn.{i}.q.weight" in self.state:
                x = self.attention(f"{name}.attn.{i}", x)
        return x

    def z(self, images: Tensor) -> Tensor:
        h = self.conv("encoder.conv_in", images)
        for i in range(3):
            h = self.scale(f"encoder.down.{i}", h, 2)
            if i < 2:
                h = self.conv(f"encoder.down.{i}.downsample.conv", functional.pad(h, (0, 1, 0, 1)), stride=2)
        h = self.swish(self.norm("encoder.norm_out", self.middle("encoder.mid", h)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", h))

    def codes(self, images: Tensor) -> Tensor:
        rows = self.z(images).permute(0, 2, 3, 1).flatten(1, 2)
        return (rows[:, :, None] - self.state["quantize.embedding.weight"]).square().sum(-1).argmin(-1)

    def images(self, codes: Tensor) -> Tensor:
        z = self.state["quantize.embedding.weight"][codes].permute(0, 2, 1).unflatten(2, self.config.grid)
        h = self.middle("decoder.mid", self.conv("decoder.conv_in", self.conv("post_quant_conv", z)))
        for i in (2, 1, 0):
            h = self.scale(f"decoder.up.{i}", h, 3)
            if i:
                h = self.conv(f"decoder.up.{i}.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return self.conv("decoder.conv_out", self.swish(self.norm("decoder.norm_out", h)))


def test_definition():
    model = vq_by_formula().double()
    definition, images = Definition(model), pictures(N, model.config)
    codes = model.encode(images)
    assert codes.shape == (N, 6) and codes.dtype == torch.int64 and codes.unique().numel() > 6
    assert torch.equal(codes, definition.codes(images))
    decoded = model.decode(codes)
    assert decoded.shape == images.shape and decoded.std() > 0.5
    torch.testing.assert_close(decoded, definition.images(codes), rtol=0, atol=1e-10)
    with torch.no_grad():
        said = model(images)
    torch.testing.assert_close(said.z, definition.z(images), rtol=0, atol=1e-10)
    torch.testing.assert_close(said.images, decoded, rtol=0, atol=1e-10)


def test_literal_numbers():
    wanted = [0.811454, -0.267451, 0.514510, 0.294656, 0.950333, -0.703398]
    for dtype, atol in ((torch.float64, 2e-6), (torch.float32, 5e-5)):
        model = vq_by_formula().to(dtype)
        codes = model.encode(pictures(2, model.config).to(dtype))
        assert codes.tolist() == [[15, 3, 0, 15, 11, 12], [0, 6, 19, 12, 18, 6]]
        told = model.decode(codes)[:, :, [0, 3, 7], [0, 5, 11]].flatten()[:6]
        torch.testing.assert_close(told, torch.tensor(wanted, dtype=dtype), rtol=0, atol=atol)


def test_pieces_hold_no_graph_and_change_nothing():
    model = vq_by_formula(dropout=0.5).train()
    images = pictures(5, model.config).float().requires_grad_()
    sizes: list[int] = []
    for module in (model.encoder, model.decoder):
        module.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    codes = model.encode(images, batch_size=2)
    decoded = model.decode(codes.int(), batch_size=3)
    assert sizes == [2, 2, 1, 3, 2]
    assert not decoded.requires_grad and model.training and model.encoder.mid.block_1.training
    assert torch.equal(codes, model.encode(images)), "no dropout"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codes, model.encode(images)), "the weights' own precision"
    torch.testing.assert_close(decoded, model.decode(codes), rtol=0, atol=1e-5)
    assert model.encode(images[:0]).shape == (0, 6) and model.decode(codes[:0]).shape == (0, 2, 8, 12)


@pytest.mark.parametrize(
    ("ch_mult", "grid", "attention_scales"), [((1, 2), [14, 14], [1]), ((1, 2, 2), [7, 7], []), ((2,), [28, 28], [])]
)
def test_small_grey_images(ch_mult, grid, attention_scales):
    settings = {"image_size": 28, "num_channels": 1, "base_channels": 4, "num_res_blocks": 1}
    config = VQConfig(
        num_codes=9, embed_dim=4, z_channels=4, ch_mult=ch_mult, attention_scales=attention_scales, **settings
    )
    assert config.grid == grid
    model = VQModel(config)
    codes = model.encode(torch.zeros(2, 1, 28, 28))
    assert codes.shape == (2, config.length)
    assert model.decode(codes).shape == (2, 1, 28, 28)


def test_loss_is_as_written():
    model = vq_by_formula().double()
    images = pictures(N, model.config)
    output = model(images)
    e, z = output.quantized, output.z
    gap = (e - z).square().mean()
    for norm, reconstruction in (
        ("l1", (output.images - images).abs().mean()),
        ("l2", (output.images - images).square().mean()),
    ):
        told = vq_loss(output, images, 20, norm=norm, beta=0.5)
        torch.testing.assert_close(told.loss, reconstruction + 1.5 * gap)
        torch.testing.assert_close(told.reconstruction, reconstruction)
        torch.testing.assert_close(told.commitment, gap)
    assert told.usage.sum() == 18 and torch.equal(told.usage.nonzero()[:, 0], output.codes.unique())
    share = told.usage[told.usage > 0] / 18
    torch.testing.assert_close(told.perplexity, (-(share * share.log()).sum()).exp())
    by_images, by_encoder = torch.autograd.grad(
        (output.images - images).square().mean(), [model.quantize.embedding.weight, model.quant_conv.weight],
        retain_graph=True, allow_unused=True,
    )  # fmt: skip
    assert by_images is None and by_encoder.abs().max() > 0, "the choice of codes passes gradients to the encoder alone"
    only, none = (
        torch.autograd.grad(
            vq_loss(output, images, 20, beta=beta).loss, model.quantize.embedding.weight, retain_graph=True
        )[0]
        for beta in (0.0, 1.0)
    )
    torch.testing.assert_close(only, none)
    for settings, message in (({"norm": "lpips"}, "norm must be one of l1, l2, got 'lpips'"), ({"beta": -1}, "beta")):
        with pytest.raises(ValueError, match=message):
            vq_loss(output, images, 20, **settings)


def test_idle_codes_are_put_where_images_are():
    model = vq_by_formula()
    z = torch.arange(2 * 6 * 2 * 3, dtype=torch.float32).view(2, 6, 2, 3)
    before = model.quantize.embedding.weight.detach().clone()
    usage = torch.full((20,), 3)
    usage[[4, 7, 19]] = 0
    assert restart_codes(model, z, usage, seed=1) == 3
    after = model.quantize.embedding.weight.detach()
    moved = [4, 7, 19]
    kept = [i for i in range(20) if i not in moved]
    assert torch.equal(after[kept], before[kept])
    places = z.flatten(2).mT.flatten(0, 1)
    chosen = [(places == after[i]).all(1).nonzero().flatten().tolist() for i in moved]
    assert all(len(place) == 1 for place in chosen) and len({place[0] for place in chosen}) == 3
    assert restart_codes(model, z, usage, seed=1, at_least=4) == 12, "no more codes than places"
    assert restart_codes(model, z, usage, seed=1, at_least=0) == 0


def test_a_small_one_learns_and_uses_its_codes():
    torch.manual_seed(0)
    settings = {"image_size": 8, "num_channels": 1, "base_channels": 8, "ch_mult": [1, 1], "num_res_blocks": 1}
    model = VQModel(VQConfig(num_codes=16, embed_dim=4, z_channels=8, attention_scales=[], **settings)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    first = last = None
    for step in range(60):
        corner = torch.randint(0, 5, (16, 2))
        images = -torch.ones(16, 1, 8, 8)
        for image, (y, x) in zip(images, corner.tolist(), strict=True):
            image[0, y : y + 4, x : x + 4] = 1
        output = model(images)
        told = vq_loss(output, images, 16)
        if step % 10 == 0 and step < 40:
            restart_codes(model, output.z, told.usage, seed=step)
        optimizer.zero_grad()
        told.loss.backward()
        optimizer.step()
        first, last = told if first is None else first, told
    assert last.reconstruction < 0.5 * first.reconstruction
    assert last.perplexity > 5
    assert (model.decode(model.encode(images)) - images).abs().mean() < 0.5 * first.reconstruction


def test_round_trip_and_fingerprint(tmp_path: Path):
    model = vq_by_formula()
    model.save_pretrained(tmp_path / "vq")
    again = VQModel.from_pretrained(tmp_path / "vq")
    images = pictures(N, model.config).float()
    assert torch.equal(again.encode(images), model.encode(images))
    assert again.config.image_shape == (2, 8, 12) and again.config.grid == [2, 3]
    assert again.fingerprint() == model.fingerprint() == again.to(torch.bfloat16).fingerprint()
    with torch.no_grad():
        model.quantize.embedding.weight[3, 2] += 0.1
    assert again.fingerprint() != model.fingerprint()
    state = model.state_dict() | {"stray": torch.zeros(1)}
    del state["quant_conv.bias"]
    model.save_pretrained(tmp_path / "spoilt", state_dict=state)
    with pytest.raises(
        ValueError, match=r"not those of this VQ model: missing \['quant_conv.bias'\], unexpected \['stray"
    ):
        VQModel.from_pretrained(tmp_path / "spoilt")
    tokens_by_formula().save_pretrained(tmp_path / "tokens")
    with pytest.raises(ValueError, match="tokens: holds a network 'di4c_tokens', a VQ model is wanted"):
        VQModel.from_pretrained(tmp_path / "tokens")


def test_a_denoiser_of_other_codes_is_refused():
    model = vq_by_formula()
    fits = SMALL | {"num_codes": 20, "grid": [2, 3]}
    model.check_denoiser(TokenConfig(**fits))
    model.check_denoiser(TokenConfig(**fits, codebook=model.fingerprint()))
    for settings, message in (
        ({"num_codes": 21}, "codes of another VQ model: num_codes 21, here 20;"),
        ({"grid": 4}, r"grid \[4, 4\], here \[2, 3\]"),
        ({"codebook": "0" * 16}, rf"codebook 0{{16}}, here {model.fingerprint()}"),
        ({"num_codes": 8, "grid": [3, 2]}, r"num_codes 8, here 20; grid \[3, 2\], here \[2, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.check_denoiser(TokenConfig(**fits | settings))


def test_images_and_codes_that_do_not_fit():
    model = vq_by_formula()
    images = pictures(N, model.config).float()
    for call in (model, model.encode):
        with pytest.raises(
            ValueError, match=r"images must be \(N, C, H, W\) with C, H, W = 2, 8, 12, got \(3, 2, 12, 8\)"
        ):
            call(images.mT)
        with pytest.raises(TypeError, match=r"images must be floating, in \[-1, 1\], got torch.uint8.*127\.5 - 1"):
            call(images.to(torch.uint8))
    codes = torch.zeros(N, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"codes must be \(N, D\) with D = 6, a grid of 2 x 3, got \(3, 5\)"):
        model.decode(codes[:, 1:])
    with pytest.raises(TypeError, match=r"codes must be integers, got torch.float32"):
        model.decode(codes.float())
    for wrong, message in ((-1, "got -1"), (21, "got 21"), (20, "got 20; that is the mask")):
        codes[2, 4] = wrong
        with pytest.raises(ValueError, match=rf"codes must be 0\.\.19, {message}"):
            model.decode(codes)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.encode(images, batch_size=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_codes": 0}, "num_codes must be an integer of at least 1, got 0"),
        ({"image_size": [8, 8, 3]}, "image_size must be one number, or height and width"),
        ({"image_size": 10}, r"image_size \[10, 10\] cannot be halved 2 times without a rest"),
        ({"ch_mult": []}, "ch_mult must name at least one scale"),
        ({"ch_mult": [1, 0.5]}, "ch_mult must be an integer"),
        ({"attention_scales": [3]}, r"attention_scales must lie in 0\.\.2"),
        ({"base_channels": 2}, "2 feature maps do not fall into 1 equal groups"),
        ({"base_channels": 144}, "144 feature maps do not fall into 32 equal groups"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_config_is_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        VQConfig(**SMALL_VQ | settings)
