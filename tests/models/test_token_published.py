"""The image-token system beside the published one: names, sizes and numbers of transformer and VQ autoencoder."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from token_models import codes, tokens_by_formula
from torch import Tensor
from unets import shared

from di4c_ext.models import TokenConfig, TokenDenoiser, VQConfig, VQModel

PARAMETERS = {False: 174_160_874, True: 174_620_906}
TENSORS = {False: 305, True: 309}


@cache
def published(is_student: bool) -> dict[str, Tensor]:
    """The weights of the published size, without numbers."""
    with torch.device("meta"):
        return TokenDenoiser(TokenConfig(is_student=is_student)).state_dict()


@cache
def published_vq() -> dict[str, Tensor]:
    with torch.device("meta"):
        return VQModel(VQConfig()).state_dict()


def listed(name: str) -> list[tuple[str, str]]:
    """Names and shapes in the order in which the published state has them."""
    lines = shared(f"reference/keys/{name}.txt").read_text().splitlines()
    return [(line.split("\t")[0], line.split("\t")[1]) for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("is_student", [False, True])
def test_published_size(is_student):
    weights = published(is_student)
    assert (len(weights), sum(w.numel() for w in weights.values())) == (TENSORS[is_student], PARAMETERS[is_student])
    assert weights["net.tok_emb.weight"].shape == (2026, 768) and weights["net.bias"].shape == (257, 2026)
    assert weights["net.transformer.layers.23.0.fn.mha.in_proj_weight"].shape == (2304, 768)
    assert weights["net.transformer.layers.23.1.fn.net.3.weight"].shape == (768, 3072)
    added = set(weights) - set(published(False))
    assert added == {name for name in weights if TokenDenoiser.is_latent_name(name)}
    assert sum(weights[name].numel() for name in added) == (460_032 if is_student else 0)


@pytest.mark.parametrize("is_student", [False, True])
def test_published_names_shapes_and_order(is_student):
    wanted = listed(f"tokens_{'student' if is_student else 'teacher'}")
    assert [(n.removeprefix("net."), str(tuple(w.shape))) for n, w in published(is_student).items()] == wanted


def test_published_vq_model():
    weights = published_vq()
    assert (len(weights), sum(w.numel() for w in weights.values())) == (343, 72_141_699)
    assert weights["quantize.embedding.weight"].shape == (1024, 256)
    assert weights["decoder.up.3.block.0.nin_shortcut.weight"].shape == (256, 512, 1, 1)
    assert [(name, str(tuple(weight.shape))) for name, weight in weights.items()] == listed("vqgan")
    assert VQConfig().grid == TokenConfig().grid == [16, 16]


@torch.no_grad()
def test_the_published_implementation_says_the_same():
    found = torch.load(shared("fixtures/tokens.pt"), weights_only=True)
    told = found["config"]
    x_t, labels, drop = found["masked_code"].flatten(1), found["y"], found["drop_label"]
    assert drop.any() and not drop.all()
    for state, is_student, names in (
        ("teacher_state", False, ("logits_teacher", "eval_teacher_logits")),
        ("student_state", True, ("eval_student_logits",)),
    ):
        config = TokenConfig(
            num_codes=told["codebook_size"],
            num_classes=told["nclass"],
            grid=told["img_size"] // 16,
            hidden_size=told["hidden_dim"],
            num_layers=told["depth"],
            num_heads=told["heads"],
            mlp_size=told["mlp_dim"],
            is_student=is_student,
        )
        model = TokenDenoiser(config).eval()
        assert list(model.state_dict()) == ["net." + name for name in found[state]]
        model.load_state_dict({"net." + name: weight for name, weight in found[state].items()})
        said = model(x_t, latents=found["eval_z"] if is_student else None, labels=labels, drop_label=drop)
        for name in names:
            assert said.shape == found[name].shape == (6, 16, 1025)
            # 1e-5 of the logits' scale
            torch.testing.assert_close(said, found[name], rtol=0, atol=1e-5 * found[name].abs().max().item())
    assert (found["eval_student_logits"] - found["eval_teacher_logits"]).abs().max() > 0.01, "the latent matters"


# Positions 0, 5, 11 by states 0, 7, 12 (the mask); weights and codes by formula, label 2 kept, the other dropped. The
# network that says this agrees with the published one on the weights of tokens.pt; the added form is our own.
PLACES, STATES = [0, 5, 11], [0, 7, 12]
TEACHER = [
    [-0.829213, -0.245510, -0.719250, 0.390006, -1.647770, 1.399519, -0.514847, -0.423617, 0.359526],
    [-2.162615, -0.961942, -1.054899, -0.318465, -0.879999, 1.164120, -1.422906, -0.363406, -0.096968],
]
STUDENT = {  # latents 0.25 and 0.75 of the first image, 0 and 1 of the second
    "token": [
        [-0.893788, -0.219441, -0.813836, 0.224257, -1.593522, 1.242435, -0.538241, -0.528317, 0.373263],
        [-0.926878, -0.344581, -0.883049, 0.292724, -1.655877, 1.338361, -0.582018, -0.401218, 0.303643],
        [-2.053940, -1.120785, -0.985018, -0.332833, -1.253564, 1.151364, -1.333429, -0.681443, 0.013168],
        [-2.197727, -0.967593, -1.058449, -0.378436, -0.817758, 1.133538, -1.475042, -0.325081, -0.138042],
    ],
    "added": [
        [-0.190107, -0.757771, -0.400788, 0.518125, -1.576116, 1.289264, -0.498341, -0.359518, 0.260845],
        [-1.660804, 0.057719, -1.029491, -0.217783, -1.738032, 1.272769, -0.927520, -0.952913, 0.306276],
        [-2.071634, -0.962006, -1.068744, 0.217157, -1.284899, 1.382667, -0.854512, -0.681783, 0.270221],
        [-2.183059, -1.055290, -1.112980, -1.087330, -0.729127, 0.771071, -1.230114, -0.693471, 0.143271],
    ],
}


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 2e-6), (torch.float32, 2e-5)])
@torch.no_grad()
def test_literal_numbers(dtype, atol):
    latents = torch.tensor([[[0.25], [0.75]], [[0.0], [1.0]]], dtype=torch.float64)
    labels, drop = torch.tensor([2, 0]), torch.tensor([False, True])
    for form, numbers in ((None, TEACHER), *STUDENT.items()):
        model = tokens_by_formula(**({"is_student": True, "latent_form": form} if form else {})).to(dtype)
        said = model(codes(2, model.config), latents=latents if form else None, labels=labels, drop_label=drop)
        wanted = torch.tensor(numbers, dtype=dtype)
        assert said.dtype == dtype
        torch.testing.assert_close(said[..., PLACES, :][..., STATES].reshape(-1, 9), wanted, rtol=0, atol=atol)
