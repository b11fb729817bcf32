"""Tests of lightning_curvature/optim/per_tensor.py."""

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature.optim import per_tensor
from lightning_curvature.optim.per_tensor import (
    advance_,
    can_split,
    discounted_count,
    split,
    whole_norms,
)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-14), (torch.float32, 5e-7)])
def test_discounted_count(beta: float, dtype: torch.dtype, rtol: float) -> None:
    """All digits, where ``1 - beta**t`` in float32 has three."""
    for t in (1, 2, 3, 10, 1000, 100_000):
        found = float(discounted_count(torch.tensor(float(t), dtype=dtype), beta))
        expected = sum(beta**s for s in range(min(t, 40_000))) if beta < 1 else t
        assert found == pytest.approx(expected, rel=max(rtol, 1e-12 if beta < 1 else 0)), t


def test_discounted_count_of_no_step_is_that_of_one() -> None:
    steps = torch.tensor([0.0, 1.0, 2.0])
    torch.testing.assert_close(discounted_count(steps, 0.5), torch.tensor([1.0, 1.0, 1.5]))
    assert discounted_count(steps, 1.0).tolist() == [1.0, 1.0, 2.0]
    assert steps.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("usable", "added"), [(None, 1.0), (torch.tensor(True), 1.0), (torch.tensor(False), 0.0)]
)
def test_advance(usable: Tensor | None, added: float) -> None:
    steps = [torch.tensor(2.0), torch.tensor(5.0, dtype=torch.float64)]
    advance_(steps, usable)
    assert [float(step) for step in steps] == [2.0 + added, 5.0 + added]
    assert [step.dtype for step in steps] == [torch.float32, torch.float64]


LAYOUTS = {
    "contiguous": lambda: torch.arange(24.0).view(2, 3, 2, 2).clone(),
    "channels last": lambda: (
        torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=torch.channels_last)
    ),
    "0-dim": lambda: torch.tensor(3.0),
    "empty": lambda: torch.zeros(0, 3),
    "transposed": lambda: torch.arange(24.0).view(4, 6).T,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_share_the_memory(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry once, in the same place of all tensors."""
    monkeypatch.setattr(per_tensor, "_PART", 5)
    size = 5 * torch.get_num_threads()
    x = LAYOUTS[layout]()
    y = 2 * x
    for part_x, part_y in split([x, y]):
        assert torch.equal(2 * part_x, part_y)
        part_x.add_(100.0)
        if layout != "transposed":
            assert part_x.numel() <= size
    assert torch.equal(2 * (x - 100.0), y)


def test_mixed_layouts_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_tensor, "_PART", 1)
    x = torch.zeros(4, 6)
    ((one, other),) = split([x, x.T.contiguous().T])
    assert one is x
    assert other.shape == x.shape


def test_can_split() -> None:
    class Own(Tensor):
        """What users make."""

    plain = [torch.ones(2), nn.Parameter(torch.ones(2))]
    assert can_split(plain)
    assert not can_split([*plain, torch.ones(2, device="meta")])
    assert not can_split([*plain, torch.ones(2).as_subclass(Own)])


def test_norms_of_plain_tensors_are_themselves() -> None:
    """Sharded ones are tested with the strategies that shard."""
    norms = [torch.tensor(1.0), torch.tensor(2.0)]
    assert all(one is other for one, other in zip(whole_norms(norms), norms, strict=True))
