"""The language network beside the published one: names, sizes and numbers."""

from __future__ import annotations

import pytest
import torch
from dits import by_formula, drawn, noised
from torch import Tensor
from unets import shared

from di4c_ext.models import DiTConfig, DiTDenoiser
from di4c_ext.models.dit_config import SIZES
from di4c_ext.process import AbsorbingProcess

PARAMETERS = {
    "small": (169_627_218, 170_087_250),
    "medium": (424_477_010, 425_068_370),
    "large": (863_158_098, 864_012_114),
}


def empty(size: str = "small", *, is_student: bool) -> DiTDenoiser:
    with torch.device("meta"):
        return DiTDenoiser(DiTConfig(**SIZES[size], is_student=is_student))


@pytest.mark.parametrize("is_student", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size, is_student):
    weights = list(empty(size, is_student=is_student).parameters())
    blocks = SIZES[size]["num_layers"]
    assert sum(weight.numel() for weight in weights) == PARAMETERS[size][is_student]
    assert len(weights) == 10 + 10 * blocks + 4 * is_student


@pytest.mark.parametrize("is_student", [False, True])
def test_published_names_shapes_and_order(is_student):
    lines = shared(f"reference/keys/language_{'student' if is_student else 'teacher'}.txt").read_text().splitlines()
    model = empty(is_student=is_student)
    parameters = {name for name, _ in model.named_parameters()}
    ours = [
        f"{name.removeprefix('backbone.')}\t{tuple(value.shape)}\t{'param' if name in parameters else 'buffer'}"
        for name, value in model.state_dict().items()
    ]
    assert ours == [line for line in lines if not line.startswith("#")]
    assert all(name.startswith("backbone.") for name in model.state_dict())


def fixture(kind: str, *, is_student: bool) -> tuple[DiTDenoiser, Tensor, Tensor, dict[str, Tensor]]:
    """The published network with its weights, and what it was shown and said."""
    found = torch.load(shared("fixtures/language.pt"), weights_only=True)
    dims, forward = found["dims"], found["forward"]
    config = DiTConfig(
        vocab_size=dims["vocab_without_mask"] + 1,
        length=dims["length"],
        hidden_size=dims["hidden"],
        num_layers=dims["n_blocks"],
        num_heads=dims["n_heads"],
        cond_dim=dims["cond_dim"],
        time_conditioning=kind == "nonzero",
        is_student=is_student,
    )
    assert config.mask_id == dims["mask_index"]
    model = DiTDenoiser(config).eval()
    state = {k: v for k, v in forward["state_dict"].items() if is_student or not DiTDenoiser.is_latent_name(k)}
    assert list(model.backbone.state_dict()) == list(state)
    model.backbone.load_state_dict(state)
    said = forward[kind]
    # The t whose noise level under the log-linear schedule is the sigma they gave.
    t = -torch.expm1(-said["sigma"].double()) / (1 - 1e-3)
    return model, forward["ids"], t, said


@pytest.mark.parametrize("is_student", [False, True])
@pytest.mark.parametrize("kind", ["zero", "nonzero"])
@torch.no_grad()
def test_the_published_implementation_says_the_same(kind, is_student):
    model, ids, t, said = fixture(kind, is_student=is_student)
    wanted = said["student_logits" if is_student else "teacher_logits"]
    got = model(ids, t, said["z"][:, None] if is_student else None)
    # Their last column is the mask's, which ours has none of.
    torch.testing.assert_close(got, wanted[..., :-1], rtol=0, atol=1e-5 * wanted.abs().max().item())


@torch.no_grad()
def test_their_probabilities():
    """With clean tokens carried over; theirs has -1e6 where ours has no column, or minus infinity."""
    model, ids, t, said = fixture("zero", is_student=True)
    config = model.config
    process = AbsorbingProcess(config.num_states, config.schedule, config.mask_id)
    got = process.carry_over(model(ids, t, said["z"][:, None]), ids).log_softmax(-1)
    wanted = said["student_logp"]
    assert (wanted[..., -1].exp() == 0).all()
    possible = got > -1e5
    assert torch.equal(possible, wanted[..., :-1] > -1e5)
    torch.testing.assert_close(got[possible], wanted[..., :-1][possible], rtol=0, atol=1e-4)
    torch.testing.assert_close(got.exp(), wanted[..., :-1].exp(), rtol=0, atol=1e-6)


# Logits of positions 0, 5, 11 and tokens 0, 7, 19 for each row; weights, ids and latents by formula. The network that
# says this agrees with the published one on the weights of language.pt.
PLACES, TOKENS = [0, 5, 11], [0, 7, 19]
TEACHER = [
    [7.795049, 0.465248, -0.723003, 6.158824, 2.779371, -0.58818, 4.724235, -1.965211, 0.551681],
    [4.154753, -0.274357, -1.512284, 6.511522, 0.998734, 0.665904, 5.020289, 0.193485, 1.644013],
]
TIMED = [  # t = 0.9 and 0.2
    [7.20507, 0.404733, -1.865457, 6.280467, 2.252669, 0.090189, 3.934423, -1.860385, -0.846902],
    [3.654399, -0.494901, -1.599583, 6.57003, 1.44304, 0.151152, 4.884526, -0.025576, 1.731391],
]
TOKEN = [  # two latents of each row
    [7.75982, 0.456499, -0.766645, 6.147241, 2.779903, -0.589901, 4.724286, -1.9642, 0.551658],
    [7.842194, 0.540776, -0.797254, 6.151993, 2.765878, -0.608234, 4.725044, -1.963726, 0.551427],
    [4.150262, -0.284005, -1.521573, 6.513435, 1.000834, 0.664478, 5.020353, 0.193609, 1.644293],
    [4.177544, -0.278394, -1.518975, 6.507075, 0.993045, 0.669244, 5.02037, 0.193615, 1.644159],
]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 2e-6), (torch.float32, 5e-5)])
@pytest.mark.parametrize(
    ("settings", "numbers"),
    [({}, TEACHER), ({"time_conditioning": True}, TIMED), ({"is_student": True}, TOKEN)],
    ids=["teacher", "timed", "token"],
)
@torch.no_grad()
def test_literal_numbers(settings, numbers, dtype, atol):
    model = by_formula(**settings).to(dtype)
    latents = drawn(2, 2) if model.config.is_student else None
    got = model(noised(2, model.config), torch.tensor([0.9, 0.2]), latents)
    assert got.dtype == dtype
    rows = got.flatten(0, -3)[:, PLACES][..., TOKENS].flatten(1)
    torch.testing.assert_close(rows, torch.tensor(numbers, dtype=dtype), rtol=0, atol=atol)
