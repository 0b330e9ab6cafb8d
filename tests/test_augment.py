"""Augmentation: what stays, what is told, what hangs on the key."""

import pytest
import torch

from di4c_ext import data, random
from di4c_ext.augment import AUGMENTATION_DIM, augment_images, flip_images
from di4c_ext.image_task import augmentation

SHAPE, S, N = (8, 8), 17, 400


@pytest.fixture
def x_0() -> torch.Tensor:
    """A bright square on black, grey at its rim."""
    image = torch.zeros(8, 8, dtype=torch.int64)
    image[2:6, 2:6] = 8
    image[3:5, 3:5] = 16
    return image.flatten().expand(N, 64).contiguous()


def altered(x_0, **settings):
    return augment_images(x_0, random.keys(0, N), shape=SHAPE, num_states=S, **settings)


def test_told_and_untold(x_0):
    image, amount = altered(x_0, share=0.5)
    assert image.shape == x_0.shape and image.dtype == torch.int64
    assert amount.shape == (N, AUGMENTATION_DIM) and amount.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= S - 1
    told = (amount != 0).any(1)
    assert torch.equal(image[~told], x_0[~told])
    assert (image[told] != x_0[told]).any(1).float().mean() > 0.99
    assert 0.4 < told.float().mean() < 0.6


def test_share_bounds(x_0):
    image, amount = altered(x_0, share=0.0)
    assert torch.equal(image, x_0) and not amount.any()
    assert (altered(x_0, share=1.0)[1] != 0).all()
    with pytest.raises(ValueError, match="share"):
        altered(x_0, share=1.5)


def test_shift_moves_the_image_as_told(x_0):
    image, amount = altered(x_0, share=1.0)
    column = torch.arange(8.0).repeat(8)
    centre = (image * column).sum(1) / image.sum(1)
    # A positive shift x looks further right, so the image moves left.
    assert torch.corrcoef(torch.stack([centre, amount[:, 0]]))[0, 1] < -0.9
    brightness = image.float().mean(1)
    assert torch.corrcoef(torch.stack([brightness, amount[:, 6]]))[0, 1] > 0.3


def test_hangs_on_the_key_alone(x_0):
    image, amount = altered(x_0)
    keys = random.keys(0, N)
    for i in (0, 17, 399):
        one, told = augment_images(x_0[i : i + 1], keys[i : i + 1], shape=SHAPE, num_states=S)
        assert torch.equal(one[0], image[i]) and torch.equal(told[0], amount[i])


def test_wrong_shape(x_0):
    with pytest.raises(ValueError, match="x_0 must be"):
        augment_images(x_0[:, :-1], random.keys(0, N), shape=SHAPE, num_states=S)


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
def test_mirror_images(layout):
    shape = (2, 4, 3)
    tokens = data.from_arrays(torch.arange(24).view(1, *shape).expand(N, *shape).numpy(), num_states=24, layout=layout)
    x_0, keys = tokens.tokens.long(), random.keys(1, N)
    flipped = flip_images(x_0, keys, shape=shape, layout=layout)
    mirrored = (flipped != x_0).any(1)
    assert 0.4 < mirrored.float().mean() < 0.6
    assert torch.equal(flipped[~mirrored], x_0[~mirrored])
    images = data.as_images(flipped, shape, layout)
    assert torch.equal(images[mirrored], tokens.images()[mirrored].flip(2).long())
    assert torch.equal(
        torch.cat([flip_images(x_0[:1], key[None], shape=shape, layout=layout) for key in keys]), flipped
    )
    with pytest.raises(ValueError, match=r"x_0 must be \(B, 2 \* 4 \* 3\)"):
        flip_images(x_0[:, 1:], keys, shape=shape)


def test_training_mirrors_where_the_data_says_so(x_0):
    digits = data.load("digits")
    keys = random.keys(2, N)
    assert augmentation(digits, 0.0) is None
    flips = augmentation(data.load("digits", horizontal_flip=True), 0.0)
    ramp = torch.arange(64).remainder(8).expand(N, 64).contiguous()
    image, told = flips(ramp, keys)
    assert told == {} and 0.4 < (image != ramp).any(1).float().mean() < 0.6
    assert torch.equal(image[(image != ramp).any(1)], ramp[(image != ramp).any(1)].flip(1))
    both, told = augmentation(data.load("digits", horizontal_flip=True), 0.5)(ramp, keys)
    alone, same = augmentation(digits, 0.5)(ramp, keys)
    untouched = (told["augmentation"] == 0).all(1)
    assert torch.equal(told["augmentation"], same["augmentation"])
    assert torch.equal(both[untouched], image[untouched]) and torch.equal(alone[untouched], ramp[untouched])
