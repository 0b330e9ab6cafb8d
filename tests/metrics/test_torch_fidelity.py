"""The figures of features against torch-fidelity's, 0.4.0, on the same features: its numbers, and itself where it is
installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from di4c_ext.metrics import Moments, frechet_distance, kid, label_score
from di4c_ext.metrics.manifold import manifold_figures


def cloud(phase: float) -> Tensor:
    """60 vectors of 8 features, by formula."""
    i, j = torch.arange(60, dtype=torch.float64)[:, None] + 1, torch.arange(8, dtype=torch.float64) + 1
    return torch.sin(i * i * j.sqrt() * phase) + torch.cos(i * j) / 2 * phase


REAL, SAMPLES = cloud(0.7), cloud(0.9) + 0.2


def figures() -> dict[str, float]:
    mean, spread = kid(REAL, SAMPLES, num_subsets=3, subset_size=60)
    return {
        "frechet": frechet_distance(Moments(REAL), Moments(SAMPLES)),
        "kid": mean,
        "kid_spread": spread,
        "score": label_score((2 * SAMPLES).softmax(-1)),
        **{name: value for name, value in manifold_figures(REAL, SAMPLES).items() if name.endswith("_k")},
    }


def test_its_numbers() -> None:
    told = {
        "frechet": 0.9211006274961342,
        "kid": 0.19995584059753657,
        "kid_spread": 0.0,
        "score": 1.7746113639814338,
        "precision_k": 0.8666666746139526,  # a float32
        "recall_k": 0.8833333253860474,
    }
    assert figures() == pytest.approx(told, rel=1e-7, abs=1e-12)


def test_itself() -> None:
    fid: Any = pytest.importorskip("torch_fidelity.metric_fid")
    kernel: Any = pytest.importorskip("torch_fidelity.metric_kid")
    score: Any = pytest.importorskip("torch_fidelity.metric_isc")
    regions: Any = pytest.importorskip("torch_fidelity.metric_prc")
    quiet: dict[str, Any] = {"verbose": False}
    shape = {"kid_subset_size": 60, "kid_subsets": 3, "kid_degree": 3, "kid_gamma": None, "kid_coef0": 1}
    found = kernel.kid_features_to_metric(REAL, SAMPLES, **shape, kid_kernel="poly", rng_seed=0, **quiet)
    moments = [fid.fid_features_to_statistics(x) for x in (REAL, SAMPLES)]
    of_regions = regions.prc_features_to_metric(SAMPLES, REAL, prc_neighborhood=3, prc_batch_size=100, **quiet)
    told = {
        "frechet": fid.fid_statistics_to_metric(*moments, False)["frechet_inception_distance"],
        "kid": found["kernel_inception_distance_mean"],
        "kid_spread": found["kernel_inception_distance_std"],
        "score": score.isc_features_to_metric(2 * SAMPLES, splits=1, shuffle=False)["inception_score_mean"],
        "precision_k": of_regions["precision"],
        "recall_k": of_regions["recall"],
    }
    assert figures() == pytest.approx(told, rel=1e-6, abs=1e-9)
