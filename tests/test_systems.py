"""What a config tells of its process and latents, and which saved models open."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from unets import SMALL, by_formula

from di4c_ext import random
from di4c_ext.models import CompactConfig, CompactDenoiser, TokenConfig, UNetConfig, UNetDenoiser
from di4c_ext.process import AbsorbingProcess, ConfidenceProcess, GaussianProcess, UniformProcess
from di4c_ext.systems import image_shape_of, latents_of, layout_of, load_model, process_of


def test_process_of() -> None:
    masked = process_of(CompactConfig(num_states=9, schedule="cosine", mask_id=4))
    assert isinstance(masked, AbsorbingProcess)
    assert (masked.num_states, masked.schedule, masked.mask_id) == (9, "cosine", 4)
    assert repr(process_of(UNetConfig())) == repr(GaussianProcess(256))  # the published one
    settings = {"name": "gaussian", "rate_sigma": 3, "q_sigma": 64, "time_base": 0.3}
    small = process_of(UNetConfig(num_states=32, process=settings))
    assert repr(small) == repr(GaussianProcess(32, rate_sigma=3, q_sigma=64, time_base=0.3))
    assert isinstance(process_of(UNetConfig(process={"name": "uniform"})), UniformProcess)


def test_process_of_image_tokens() -> None:
    for is_in, states in ((True, 13), (False, 12)):  # whether the mask is a class of the logits
        process = process_of(TokenConfig(num_codes=12, mask_logit=is_in, schedule="cosine"))
        assert repr(process) == repr(ConfidenceProcess(states, "cosine", 12))
    assert repr(process_of(TokenConfig(num_codes=12), {"guidance": 2})) == repr(
        ConfidenceProcess(13, "arccos", 12, guidance=2)
    )
    with pytest.raises(ValueError, match="a di4c_unet has its process's constants itself"):
        process_of(UNetConfig(), {"guidance": 2})


def test_a_config_checks_its_process() -> None:
    for process, message in (
        ({"name": "absorbing"}, "process must be one of gaussian, uniform"),
        ({"name": "unifrm"}, "did you mean 'uniform'?"),
        ({"name": "gaussian", "q_sigm": 3}, "unknown setting 'q_sigm'; did you mean 'q_sigma'?"),
    ):
        with pytest.raises(ValueError, match="UNetConfig: process") as error:
            UNetConfig(process=process)
        assert message in str(error.value)


def test_latents_of() -> None:
    assert latents_of(UNetConfig()) is None and latents_of(CompactConfig()) is None
    keys = random.keys(0, 500)
    uniform = latents_of(UNetConfig(is_student=True, latent_dim=2))
    normal = latents_of(CompactConfig(is_student=True, latent_dim=3))
    assert uniform is not None and normal is not None
    drawn = uniform(keys, 4)
    assert drawn.shape == (500, 4, 2) and drawn.min() >= 0 and drawn.max() <= 1
    assert normal(keys, 4).shape == (500, 4, 3) and normal(keys, 4).min() < -1


def test_images_of() -> None:
    colour, grey = UNetConfig(image_size=[16, 8]), UNetConfig(num_channels=1, image_size=8)
    assert (image_shape_of(colour), layout_of(colour)) == ((16, 8, 3), "CHW")
    assert image_shape_of(grey) == (8, 8)
    compact = CompactConfig(length=15, image_shape=[3, 5])
    assert (image_shape_of(compact), layout_of(compact)) == ((3, 5), "HWC")


def test_models_come_back_with_their_process(tmp_path: Path) -> None:
    saved = by_formula(ch_mult=[1, 2], is_student=True, process={"name": "uniform", "schedule": "cosine"})
    saved.save_pretrained(tmp_path / "unet")
    opened = load_model(tmp_path / "unet")
    assert isinstance(opened, UNetDenoiser) and not opened.training
    assert repr(process_of(opened.config)) == repr(UniformProcess(SMALL["num_states"], "cosine"))
    for name, value in saved.state_dict().items():
        assert torch.equal(value, opened.state_dict()[name]), name
    CompactDenoiser(CompactConfig(hidden_size=8, num_blocks=1)).save_pretrained(tmp_path / "compact")
    assert isinstance(load_model(tmp_path / "compact", is_student=False), CompactDenoiser)
    with pytest.raises(ValueError, match="holds a student, a teacher is wanted"):
        load_model(tmp_path / "unet", is_student=False)
    with pytest.raises(ValueError, match="holds a teacher, a student is wanted"):
        load_model(tmp_path / "compact", is_student=True)


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    CompactDenoiser(CompactConfig(hidden_size=8, num_blocks=1)).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    told = json.loads(config.read_text())
    for change, message in (
        ({"model_type": "di4c_unets"}, "names the network 'di4c_unets'; did you mean 'di4c_unet'?"),
        ({"model_type": None}, "names the network None"),
        ({"num_blocks": 0}, "num_blocks must be an integer of at least 1"),
        ({"hidden_size": 9}, "does not fit its config"),
    ):
        config.write_text(json.dumps(told | change))
        with pytest.raises(ValueError) as error:
            load_model(tmp_path)
        assert message in str(error.value) and str(tmp_path) in str(error.value), change
    config.write_text("[1]")
    with pytest.raises(ValueError, match="names the network None"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        load_model(tmp_path / "nowhere")
