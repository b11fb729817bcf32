"""What goes wrong easily without a backward: old scales, silent heads, old casts."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature import HiZOO, HiZOOL, MeZO, ZOConservative
from lightning_curvature.oracle import MissingCapabilityError
from tests.helpers.plain_loop import classification, network


def attached(model: nn.Module, optimizer: Any) -> Any:
    criterion = optimizer.attach_model(model, F.cross_entropy)

    def step(x: Tensor, y: Tensor) -> Any:
        return optimizer.step(lambda: criterion(model(x), y))

    return step


def scales(optimizer: MeZO) -> Tensor:
    params = optimizer.param_groups[0]["params"]
    return torch.stack([optimizer.state[p]["layer_scale"] for p in params])


def test_scales_of_layers_are_measured_without_the_old_ones() -> None:
    """At a learning rate of 0 the gradient stays, so they differ by their directions only."""
    (x, y), *_ = classification(1, batch=64)
    model = network()
    # Directions of one entry: only its sign is random, and the norm is exact.
    masked = MeZO(
        model.parameters(),
        lr=0.0,
        layer_scale="gradient_norm",
        layer_scale_update_interval=1,
        distribution="rademacher",
        perturbation_scale=1e-6,
    )
    for p in model.parameters():
        masked.set_mask(p, torch.tensor([0]))
    step = attached(model, masked)
    step(x, y)
    first = scales(masked).clone()
    for _ in range(3):
        step(x, y)
        torch.testing.assert_close(scales(masked), first, rtol=1e-4, atol=1e-6)
    # The mean square over the entries that are trained is that of the directions.
    assert float(first.square().mean()) == pytest.approx(1.0, rel=1e-6)


def hybrid(model: nn.Sequential, **options: Any) -> MeZO:
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[2].parameters()), "first_order": True, "lr": options.pop("head_lr")},
    ]
    return MeZO(groups, **options)


def test_a_closure_without_a_backward_is_an_error_where_gradients_are_needed() -> None:
    (x, y), *_ = classification(1)
    model = network()
    step = attached(model, hybrid(model, head_lr=0.1))
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"ran no backward. Call optimizer.zero_grad\(\) and"):
        step(x, y)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("half_precision", ["stochastic", "master", "nearest"])
def test_small_updates_of_half_precision_groups_with_gradients(half_precision: Any) -> None:
    batches = classification(4, batch=32, dtype=torch.bfloat16)
    model = network(dtype=torch.bfloat16)
    optimizer = hybrid(model, head_lr=1e-5, lr=0.0, half_precision=half_precision)
    criterion = optimizer.attach_model(model, F.cross_entropy)
    before = model[2].weight.detach().clone()

    def closure(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    for x, y in batches * 10:
        optimizer.step(lambda x=x, y=y: closure(x, y))
    moved = not torch.equal(model[2].weight, before)
    if half_precision == "master":
        master = optimizer.state[model[2].weight]["master"]
        assert not torch.equal(master, before.float())
    else:
        assert moved == (half_precision == "stochastic")


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("restore", ["fused", "snapshot"])
def test_masks_under_deterministic_algorithms(restore: Any) -> None:
    (x, y), *_ = classification(1)
    model = network()
    model[0].weight.data = model[0].weight.data.t().contiguous().t()
    optimizer = MeZO(model.parameters(), lr=0.1, restore=restore)
    for p in model.parameters():
        optimizer.set_mask(p, torch.tensor([0, p.numel() - 1]))
    before = [p.detach().clone() for p in model.parameters()]
    attached(model, optimizer)(x, y)
    for p, b in zip(model.parameters(), before, strict=True):
        changed = (p != b).flatten().nonzero().flatten().tolist()
        assert changed == [0, p.numel() - 1]


def test_a_mask_names_no_entry_twice() -> None:
    model = network()
    with pytest.raises(ValueError, match="none of them twice"):
        MeZO(model.parameters()).set_mask(model[0].weight, torch.tensor([1, 1]))


def test_one_autocast_region_around_several_steps() -> None:
    batches = classification(4, batch=32, dtype=torch.float32)

    def slopes(*, together: bool) -> list[float]:
        model = network(dtype=torch.float32)
        optimizer = MeZO(model.parameters(), lr=0.1, perturbation_scale=0.05)
        step = attached(model, optimizer)
        found = []
        # Casts are forgotten at the end of the outermost region, also of one that is disabled.
        with torch.autocast("cpu", torch.bfloat16) if together else nullcontext():
            for x, y in batches:
                with torch.autocast("cpu", torch.bfloat16):
                    step(x, y)
                found.append(optimizer.stats["projected_grad"].item())
        return found

    assert slopes(together=True) == slopes(together=False)


def test_weight_decay_of_a_group_is_refused_where_there_is_none() -> None:
    groups = [{"params": network().parameters(), "weight_decay": 0.1}]
    with pytest.raises(ValueError, match=r"Invalid weight_decay=0\.1: ZOConservative has none"):
        ZOConservative(groups)


def test_a_gradient_scaler_is_refused() -> None:
    model = network()
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(MissingCapabilityError, match="no gradients for a GradScaler to scale"):
        MeZO(model.parameters()).attach_model(model, F.cross_entropy, grad_scaler=scaler)


def test_losses_that_are_only_looked_at_are_not_kept() -> None:
    model = network()
    optimizer = HiZOO(model.parameters())
    criterion = optimizer.attach_model(model, F.cross_entropy)
    for x, y in classification(5):
        criterion(model(x), y)
    assert isinstance(optimizer.oracle._unfinished, tuple)


def test_limits_of_a_factored_metric() -> None:
    batches = classification(4, batch=32)
    model = network()
    optimizer = HiZOOL(
        model.parameters(), lr=0.01, hessian_smoothing=0.5, hess_clip=(0.5, 2.0), num_samples=2
    )
    step = attached(model, optimizer)
    for x, y in batches * 5:
        step(x, y)
    moving = optimizer._begin()
    for piece in moving.sweep(0, moving.blocks[0]):
        for hess in optimizer._hess(piece):
            assert float(hess.min()) >= 0.5
            assert float(hess.max()) <= 2.0
