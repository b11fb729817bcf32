"""Tests of lightning_curvature/curvature/gram.py."""

import pytest
import torch

from lightning_curvature.curvature import gram as module
from lightning_curvature.curvature.gram import gram


@pytest.mark.parametrize("width", [2, 3, 256])
@pytest.mark.parametrize(
    "shape", [(1, 4, 1), (1, 5, 7), (3, 6, 8), (2, 1, 9), (1, 0, 5), (1, 9, 30), (2, 3, 0)]
)
def test_products(shape: tuple[int, int, int], width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRIP_WIDTH", width)
    x = torch.randn(shape, dtype=torch.float64)
    products = gram(x)
    torch.testing.assert_close(products, x.mT @ x, rtol=1e-13, atol=1e-13)
    assert torch.equal(products, products.mT)
    assert products.is_contiguous()


@pytest.mark.parametrize("n", [1025, 520])
def test_large_matrices_go_by_strips(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 16, n)
    widths: list[int] = []
    fill = module._fill

    def spy(product: torch.Tensor, rows: torch.Tensor, width: int) -> None:
        widths.append(width)
        fill(product, rows, width)

    monkeypatch.setattr(module, "_fill", spy)
    products = gram(x)
    assert widths == [{1025: 257, 520: 260}[n]]
    torch.testing.assert_close(products, x.mT @ x, rtol=1e-5, atol=1e-4)
    assert torch.equal(products, products.mT)


@pytest.mark.parametrize("width", [2, 256])
def test_layouts_and_graphs(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRIP_WIDTH", width)
    x = torch.randn(2, 7, 5, dtype=torch.float64).requires_grad_()
    assert not gram(x).requires_grad
    transposed = x.detach().mT.contiguous().mT
    torch.testing.assert_close(gram(transposed), gram(x))
    torch.testing.assert_close(gram(x[:1].expand(3, 7, 5))[2], gram(x)[0])
