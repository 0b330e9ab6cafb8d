"""Latents: their law, their keys, their embedding."""

import pytest
import torch

from di4c_ext import random
from di4c_ext.models import LatentEmbedding, draw_latents


def test_shape_and_batch_invariance():
    keys = random.keys(0, 6)
    latents = draw_latents(keys, 5, 3)
    assert latents.shape == (6, 5, 3) and latents.dtype == torch.float32
    for i in range(6):
        assert torch.equal(draw_latents(keys[i : i + 1], 5, 3)[0], latents[i])
    assert torch.equal(draw_latents(keys, 5, 3), latents)
    assert not torch.equal(draw_latents(keys, 5, 3, stream=1), latents)


@pytest.mark.parametrize("index", [0, 7, 15])
def test_every_single_latent_is_standard_normal(index):
    values = draw_latents(random.keys(1, 20_000), 16, 4)[:, index].double()
    quantile = torch.special.ndtr(values).sort(0).values
    grid = torch.arange(1, 20_001, dtype=torch.float64)[:, None] / 20_000
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by chance once in a thousand.
    assert (quantile - grid).abs().max() < 1.95 / 20_000**0.5
    correlation = torch.corrcoef(values.T) - torch.eye(4)
    assert correlation.abs().max() < 4 / 20_000**0.5


def test_latents_of_a_key_cover_the_law_better_than_independent_draws():
    keys, num_latents = random.keys(2, 4000), 16
    covered = torch.special.ndtr(draw_latents(keys, num_latents, 2)[..., 0].double())
    # Variance of the mean of L uniforms: 1 / (12 L) where they are independent.
    assert covered.mean(1).var() < 0.2 / (12 * num_latents)


def test_latents_of_two_keys_are_independent():
    latents = draw_latents(random.keys(3, 20_000), 1, 1)[:, 0, 0]
    pairs = latents.view(-1, 2)
    assert torch.corrcoef(pairs.T)[0, 1].abs() < 4 / 10_000**0.5


@pytest.mark.parametrize(("num_latents", "latent_dim", "name"), [(0, 2, "num_latents"), (2, 0, "latent_dim")])
def test_refuses_nothing_to_draw(num_latents, latent_dim, name):
    with pytest.raises(ValueError, match=name):
        draw_latents(random.keys(0, 2), num_latents, latent_dim)


def test_embedding_separates_latents():
    torch.manual_seed(0)
    embedding = LatentEmbedding(3, 8)
    latents = draw_latents(random.keys(0, 4), 5, 3)
    assert embedding(latents).shape == (4, 5, 8)
    assert torch.pdist(embedding(latents).flatten(0, 1)).min() > 0


def test_uniform_law():
    """The same numbers as the Gaussian latents, before the quantile function."""
    keys = random.keys(4, 2000)
    uniform = draw_latents(keys, 8, 2, law="uniform")
    assert uniform.dtype == torch.float32 and uniform.min() >= 0 and uniform.max() <= 1
    torch.testing.assert_close(torch.special.ndtr(draw_latents(keys, 8, 2)), uniform, rtol=0, atol=1e-5)
    classes = (uniform * 8).floor().clamp(max=7).sort(1).values
    # float32 may round a number up into the next class, rarely
    assert (classes == torch.arange(8.0)[:, None]).float().mean() > 0.9999
    values = uniform[:, 3, 0].double().sort().values
    assert (values - torch.arange(1, 2001) / 2000).abs().max() < 1.95 / 2000**0.5


@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_independent_latents(law):
    keys = random.keys(5, 4000)
    latents = draw_latents(keys, 4, 1, law=law, independent=True)
    assert torch.equal(draw_latents(keys[7:8], 4, 1, law=law, independent=True)[0], latents[7])
    quantile = latents.double() if law == "uniform" else torch.special.ndtr(latents.double())
    correlation = torch.corrcoef(quantile[..., 0].T) - torch.eye(4)
    assert correlation.abs().max() < 4 / 4000**0.5
    mean = quantile[..., 0].mean(1)
    assert abs(mean.var() * 12 * 4 - 1) < 0.1, "the mean of L independent uniforms has variance 1 / (12 L)"
    if law == "uniform":  # one latent of a key is the same number drawn apart or spread out
        assert torch.equal(draw_latents(keys, 1, 1, law=law), draw_latents(keys, 1, 1, law=law, independent=True))


def test_refuses_an_unknown_law():
    with pytest.raises(ValueError, match=r"law must be one of \('normal', 'uniform'\), got 'gaussian'"):
        draw_latents(random.keys(0, 2), 2, 2, law="gaussian")
