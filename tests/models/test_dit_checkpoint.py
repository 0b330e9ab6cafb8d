"""Published files of language models: laid out as theirs, opened, converted, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dits import SMALL, by_formula, drawn, noised
from safetensors.torch import save_file
from torch import Tensor

from di4c_ext import convert, systems
from di4c_ext.models import DiTDenoiser
from di4c_ext.models.dit_checkpoint import find_published, open_language

LENGTH = SMALL["length"]
STEP, UPDATES = 400_000, 399_999
BUFFER = "rotary_emb.inv_freq"


def bare(model: DiTDenoiser, prefix: str = "backbone.") -> dict[str, Tensor]:
    """The published state, with what its writer put before each name."""
    return {prefix + name: value.clone() for name, value in model.backbone.state_dict().items()}


def lightning(model: DiTDenoiser, prefix: str = "backbone.") -> dict[str, Any]:
    """The outer layout of a Lightning checkpoint; every weight of the average is one more than the live one."""
    average = [weight.detach() + 1 for weight in model.backbone.parameters()]
    return {
        "epoch": 0,
        "global_step": STEP,
        "pytorch-lightning_version": "2.2.1",
        "state_dict": bare(model, prefix),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "a.ckpt", "best_model_score": None}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 3e-4}]}],
        "lr_schedulers": [{"last_epoch": STEP}],
        "ema": {"decay": 0.9999, "num_updates": UPDATES, "shadow_params": average},
    }


@pytest.fixture
def teacher() -> DiTDenoiser:
    return by_formula()


@pytest.fixture
def student() -> DiTDenoiser:
    return by_formula(is_student=True)


def hub(model: DiTDenoiser, folder: Path, prefix: str = "backbone.", **config: Any) -> Path:
    """A snapshot of a repository of the hub."""
    folder.mkdir()
    save_file(bare(model, prefix), folder / "model.safetensors")
    told = {"model_type": "mdlm", "cond_dim": 129, "dropout": 0.2, "model_length": LENGTH, "time_conditioning": False}
    (folder / "config.json").write_text(json.dumps(told | config))
    return folder


def same(got: DiTDenoiser, model: DiTDenoiser, plus: float = 0.0) -> bool:
    pairs = zip(got.named_parameters(), model.named_parameters(), strict=True)
    return all(a == b and torch.equal(x, y + plus) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize(
    "prefix", ["", "backbone.", "backbone.backbone.", "_orig_mod.backbone.", "backbone._orig_mod.backbone._orig_mod."]
)
def test_every_prefix(teacher, tmp_path, prefix):
    file = tmp_path / "model.safetensors"
    save_file(bare(teacher, prefix), file)
    assert same(open_language(file, length=LENGTH), teacher)
    torch.save({"state_dict": bare(teacher, prefix)}, tmp_path / "last.ckpt")
    assert same(open_language(tmp_path / "last.ckpt", length=LENGTH), teacher)


def test_a_hub_repository(teacher, tmp_path):
    """Sizes come from shapes, whatever config.json says of them; the rest from config.json, the caller before it."""
    folder = hub(teacher, tmp_path / "mdlm")
    model = open_language(folder, is_student=False)
    assert same(model, teacher) and not model.training
    wanted = teacher.config
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "cond_dim", "mlp_ratio", "mask_id", "length"):
        assert getattr(model.config, name) == getattr(wanted, name)
    assert model.config.dropout == 0.2 and not model.config.time_conditioning
    assert open_language(folder, dropout=0.0, length=7).config.length == 7
    x = noised(2, wanted)
    with torch.no_grad():
        torch.testing.assert_close(model(x), teacher(x), rtol=1e-5, atol=2e-5)


def test_the_hub_is_asked_for_a_revision(teacher, tmp_path, monkeypatch):
    folder, asked = hub(teacher, tmp_path / "sdtt"), []

    def fetched(repository: str, name: str, revision: str | None = None) -> str:
        asked.append((repository, name, revision))
        return str(folder / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    assert same(open_language("jdeschena/sdtt", revision="baselines_kld_step_60000"), teacher)
    files = ["model.safetensors", "config.json"]
    assert asked == [("jdeschena/sdtt", name, "baselines_kld_step_60000") for name in files]
    convert.main(
        ["--checkpoint", "jdeschena/sdtt", "--revision", "teacher_1M_sm", "--output_dir", str(tmp_path / "out")]
    )
    assert same(DiTDenoiser.from_pretrained(tmp_path / "out"), teacher)
    assert asked[-1] == ("jdeschena/sdtt", "config.json", "teacher_1M_sm")

    def refused(*_: Any, **__: Any) -> str:
        raise OSError("401 Client Error\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    with pytest.raises(ValueError, match=r"jdeschena/sdtt: no such file, and model.safetensors .* fetched: 401 Client"):
        open_language("jdeschena/sdtt")


@pytest.mark.parametrize(("weights", "plus"), [("raw", 0.0), ("ema", 1.0)])
@pytest.mark.parametrize("is_student", [False, True])
def test_lightning_checkpoints(tmp_path, weights, plus, is_student):
    model = by_formula(is_student=is_student)
    torch.save(lightning(model), tmp_path / "last.ckpt")
    got = open_language(tmp_path / "last.ckpt", weights=weights, length=LENGTH)
    assert same(got, model, plus) and got.config.is_student == is_student
    assert torch.equal(got.backbone.rotary_emb.inv_freq, model.backbone.rotary_emb.inv_freq)
    assert got.config.latent_embed_dim == (8 if is_student else 128)


@pytest.mark.parametrize(("flags", "plus"), [([], 0.0), (["--weights", "ema"], 1.0)])
def test_converted(student, tmp_path, capsys, flags, plus):
    file = tmp_path / "sdtt6-di4c2.ckpt"
    torch.save(lightning(student, "backbone.backbone."), file)
    settings = json.dumps({"length": LENGTH})
    words = ["--checkpoint", str(file), "--output_dir", str(tmp_path / "out"), "--model_config", settings]
    assert convert.main([*words, *flags]) == 0
    got = systems.load_model(tmp_path / "out", is_student=True)
    assert same(got, student, plus) and got.config.length == LENGTH
    said = capsys.readouterr().out
    count = sum(weight.numel() for weight in student.parameters())
    for fact in ("language-student", f"{count:,} parameters", "step 400,000", "399,999 updates, decay 0.9999"):
        assert fact in said
    assert ("moving average as a DiTDenoiser" in said) == bool(plus)
    with torch.no_grad():
        assert got(noised(2, got.config), latents=drawn(2, 3)).shape == (2, 3, LENGTH, 20)


def refused(contents: dict[str, Any], tmp_path: Path, **kwargs: Any) -> str:
    file = tmp_path / "last.ckpt"
    torch.save(contents, file)
    with pytest.raises(ValueError) as stop:
        open_language(file, **{"length": LENGTH} | kwargs)
    assert str(stop.value).startswith(f"{file}: ")
    return str(stop.value)


NAME = "backbone.blocks.1.mlp.2.bias"
BARE = "blocks.1.mlp.2.bias"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop(NAME), f"missing [{BARE}]"),
        (lambda state: state.update(stray=torch.zeros(2)), "unexpected [stray]"),
        (lambda state: state.update({NAME: torch.zeros(3)}), f"of another shape [{BARE} (3,), not (16,)]"),
        (lambda state: state.update({NAME: [1.0]}), f"no floating tensor [{BARE}]"),
        (lambda state: state.update({"backbone." + NAME: torch.zeros(16)}), f"two tensors are called {BARE}"),
        (lambda state: state.pop("backbone." + BUFFER), f"{BUFFER} is missing"),
        (lambda state: state["backbone." + BUFFER].mul_(1.01), f"{BUFFER} are not the frequencies"),
        (lambda state: state.update({"backbone." + BUFFER: torch.ones(3)}), "no half of a head"),
        (lambda state: state.pop("backbone.sigma_map.mlp.0.weight"), "sigma_map.mlp.0.weight is missing"),
        (lambda state: state.update({"backbone.blocks.3.norm1.weight": torch.ones(16)}), "blocks.2.norm1.weight"),
    ],
)
def test_spoilt_weights_are_named(teacher, tmp_path, spoil, message):
    contents = lightning(teacher)
    contents["ema"] = None
    spoil(contents["state_dict"])
    assert message in refused(contents, tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda average: average.pop(), "shadow_params lists 29 tensors, the file has 30 weights"),
        (lambda average: average.reverse(), "moving average: the weights are not the model's: of another shape"),
    ],
)
@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_a_spoilt_average(teacher, tmp_path, weights, spoil, message):
    contents = lightning(teacher)
    spoil(contents["ema"]["shadow_params"])
    assert message in refused(contents, tmp_path, weights=weights)


def test_no_average(teacher, tmp_path):
    contents = lightning(teacher)
    del contents["ema"]
    assert "holds no moving average" in refused(contents, tmp_path, weights="ema")


def test_latents_are_neither_dropped_nor_made_up(teacher, student, tmp_path):
    message = refused(lightning(student), tmp_path, is_student=False)
    assert "holds a student, a teacher is wanted: latent_projection.0.weight and 3 more" in message
    message = refused(lightning(teacher), tmp_path, is_student=True)
    assert "holds a teacher, a student is wanted" in message and "from_teacher" in message
    words = ["--checkpoint", str(tmp_path / "last.ckpt"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="holds a teacher, a student is wanted"):
        convert.main([*words, "--kind", "language-student"])
    assert not (tmp_path / "out").exists()


def test_settings_that_are_not_open(teacher, tmp_path):
    contents = lightning(teacher)
    assert "'hidden_size' follows from other settings" in refused(contents, tmp_path, hidden_size=16)
    assert "unknown setting 'lenght'; did you mean 'length'" in refused(contents, tmp_path, lenght=3)


def test_folders_and_files_that_are_none(teacher, tmp_path):
    folder = hub(teacher, tmp_path / "mdlm")
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: no JSON"):
        open_language(folder)
    torch.save({}, folder / "last.ckpt")
    with pytest.raises(ValueError, match=r"one file of weights is wanted, it has last.ckpt, model.safetensors"):
        open_language(folder)
    with pytest.raises(ValueError, match=r"last.ckpt: no such file"):
        open_language(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="revision 'main' goes with a repository of the hub"):
        find_published(folder / "model.safetensors", "main")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model.safetensors: cannot be read"):
        open_language(folder / "model.safetensors")
    teacher.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"is a converted model; open it with DiTDenoiser.from_pretrained"):
        open_language(tmp_path / "ours")
    refused({"state_dict": {"weight": torch.zeros(2)}}, tmp_path)
