"""Tests of lightning_curvature/demos/digits.py."""

import sys

import pytest
import torch

from lightning_curvature.demos import DigitsClassifier, DigitsDataModule


def test_split_is_fixed_and_disjoint() -> None:
    first, second = DigitsDataModule(batch_size=2000), DigitsDataModule(batch_size=2000)
    first.setup("fit")
    torch.manual_seed(7)
    second.setup("test")
    sizes = []
    for loader in ("val_dataloader", "test_dataloader"):
        (ours,), (theirs,) = list(getattr(first, loader)()), list(getattr(second, loader)())
        assert torch.equal(ours[0], theirs[0])
        sizes.append(len(ours[0]))
    assert sizes == [180, 359]
    assert len(first.train_dataloader().dataset) == 1797 - 180 - 359  # type: ignore[arg-type]
    images, labels = next(iter(first.test_dataloader()))
    assert images.shape[1:] == (1, 8, 8)
    assert 0 <= images.min() < images.max() <= 1
    assert set(labels.tolist()) == set(range(10))


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-curvature\[demo\]"'):
        DigitsDataModule().setup("fit")


def test_errors() -> None:
    with pytest.raises(RuntimeError, match=r"has no data yet: call setup\(stage\) first"):
        DigitsDataModule().train_dataloader()
    with pytest.raises(ValueError, match="Invalid batch_size=0"):
        DigitsDataModule(batch_size=0)
    with pytest.raises(ValueError, match="Invalid channels=0"):
        DigitsClassifier(channels=0)
    with pytest.raises(ValueError, match=r"Invalid dropout=1\.0: must be in \[0, 1\)"):
        DigitsClassifier(dropout=1.0)
