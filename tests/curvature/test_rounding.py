"""Tests of lightning_curvature/curvature/rounding.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_curvature.curvature.rounding import stochastic_round

HALF = [torch.bfloat16, torch.float16]
NUM_DRAWS = 40_000


def draws(value: float, dtype: torch.dtype, count: int = NUM_DRAWS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return stochastic_round(torch.full((count,), value), dtype, generator)


def neighbors(value: float, dtype: torch.dtype) -> tuple[float, float]:
    """Return the numbers of a format on both sides of one between them."""
    nearest = torch.tensor(value).to(dtype)
    up = torch.nextafter(nearest, torch.tensor(math.inf, dtype=dtype))
    down = torch.nextafter(nearest, torch.tensor(-math.inf, dtype=dtype))
    return (float(nearest), float(up)) if float(nearest) < value else (float(down), float(nearest))


VALUES = {
    "small share": 1.0001,
    "large share": 0.99999,
    "negative": -0.02003,
    "across a power of two": 1.9999,
    "large": 12345.6,
    "small": 3.3e-4,
    "least normal": 2.0**-14 * 1.00013,
    "below the least normal": 2.0**-14 * 0.99987,
    "subnormal": 3.3e-6,
    "negative subnormal": -3.3e-6,
    "least": 1.3e-8,
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", VALUES)
def test_unbiased(name: str, dtype: torch.dtype) -> None:
    """To one of the two neighbors, in proportion."""
    value = float(torch.tensor(VALUES[name]))
    rounded = draws(value, dtype)
    assert rounded.dtype == dtype
    low, high = neighbors(value, dtype)
    assert low < value < high
    assert set(rounded.unique().tolist()) <= {low, high}
    share = (value - low) / (high - low)
    found = float((rounded == high).double().mean())
    error = 5 * math.sqrt(share * (1 - share) / NUM_DRAWS) + 2e-4
    assert found == pytest.approx(share, abs=error)


@pytest.mark.parametrize("dtype", HALF)
def test_representable_numbers_stay(dtype: torch.dtype) -> None:
    """All finite numbers of the format, subnormal ones included."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = patterns.view(dtype)
    numbers = numbers[numbers.isfinite()]
    for seed in range(5):
        rounded = stochastic_round(numbers.float(), dtype, torch.Generator().manual_seed(seed))
        assert torch.equal(rounded, numbers)


@pytest.mark.parametrize("dtype", HALF)
def test_not_finite(dtype: torch.dtype) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan] * 50)
    rounded = stochastic_round(x, dtype).float()
    torch.testing.assert_close(rounded, x, rtol=0, atol=0, equal_nan=True)


def test_nan_of_all_patterns_stays_nan() -> None:
    """Among them those whose bits that bfloat16 has are those of infinity."""
    x = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    for dtype in HALF:
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            assert stochastic_round(x, dtype, generator).isnan().all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("value", [65504.1, 65519.0, 65536.0, 1e30, 3.4028234e38])
def test_too_large_for_float16(value: float, sign: float) -> None:
    """Finite numbers stay finite."""
    assert set(draws(sign * value, torch.float16, 1000).tolist()) == {sign * 65504.0}


@pytest.mark.parametrize("dtype", HALF)
def test_updates_that_nearest_loses_are_kept(dtype: torch.dtype) -> None:
    """A thousand steps of a hundredth of the distance of numbers."""
    generator = torch.Generator().manual_seed(1)
    step = torch.finfo(dtype).eps / 100
    x = torch.ones(2000, dtype=dtype)
    nearest = x.clone()
    for _ in range(1000):
        x = stochastic_round(x.float() + step, dtype, generator)
        nearest = (nearest.float() + step).to(dtype)
    assert torch.equal(nearest, torch.ones_like(nearest))
    assert float(x.double().mean() - 1) == pytest.approx(1000 * step, rel=0.05)


@pytest.mark.parametrize(
    "shape",
    [(), (0,), (3, 4), (2, 3, 5, 4)],
    ids=lambda shape: "x".join(map(str, shape)) or "0-dim",
)
def test_shapes_and_layouts(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for value in (x, x.T.contiguous().T if x.ndim == 2 else x.transpose(0, -1) if x.ndim else x):
        for dtype in HALF:
            before = value.clone()
            rounded = stochastic_round(value, dtype)
            assert rounded.shape == value.shape
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(rounded.float(), value, rtol=eps, atol=1e-7)
            assert torch.equal(value, before)


@pytest.mark.parametrize("dtype", HALF)
def test_generator(dtype: torch.dtype) -> None:
    """The given one decides, and no other is touched."""
    x, state = torch.randn(500), torch.get_rng_state()
    found = [stochastic_round(x, dtype, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_other_formats_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"Invalid dtype={dtype}: must be"):
        stochastic_round(torch.ones(2), dtype)
