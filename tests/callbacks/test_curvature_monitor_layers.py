"""Tests of lightning_curvature/callbacks/layer_norms.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_curvature import AdamQLR, CurvatureMonitor
from lightning_curvature.callbacks.layer_norms import curvature_of_layers, layer_of_parameters
from tests.helpers.modules import StockModule, loader, mlp_module, vectors
from tests.helpers.monitoring import RecordingLogger, StatsSGD, TwoOptimizers, fit
from tests.helpers.probing import make_trainer, the_optimizer


class WithState(StatsSGD):
    """Keeps a diagonal of the size of every parameter."""

    state_names = ("step", "exp_avg", "hess_diag", "num_estimates")

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                diagonal = torch.arange(p.numel(), dtype=p.dtype).view(p.shape)
                self.state[p] = {"step": torch.ones(()), "hess_diag": diagonal, "exp_avg": diagonal}
                self.state[p]["num_estimates"] = torch.ones(())
        return loss


def test_values_of_a_real_optimizer() -> None:
    logger = RecordingLogger()
    monitor = CurvatureMonitor(plot=False, per_layer=True)
    network = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        network[0].bias[:3] = -50.0  # dead: no gradient reaches their weights
    module = StockModule(network, AdamQLR)
    trainer = make_trainer("strategy", callbacks=[monitor], logger=[logger], max_steps=3)
    trainer.fit(module, loader(vectors()))
    optimizer = the_optimizer(module)
    (_, last) = logger.rows[-1]
    for index in (0, 2):
        layer = network[index]
        squares = [optimizer.state[p]["exp_avg_sq"].double() for p in layer.parameters()]
        norm = torch.cat([x.flatten() for x in squares]).norm().item()
        zeros = sum(int((x == 0).sum()) for x in squares) / sum(x.numel() for x in squares)
        name = f"network.{index}"
        assert last[f"curvature/exp_avg_sq_norm/{name}"] == pytest.approx(norm, rel=1e-5)
        assert last[f"curvature/exp_avg_sq_sparsity/{name}"] == pytest.approx(zeros)
    assert last["curvature/exp_avg_sq_sparsity/network.0"] == pytest.approx(3 / 8)
    assert not any("/network" in name for name in monitor.history)
    assert not any(key.startswith(("curvature/step_norm", "curvature/exp_avg_n")) for key in last)


def test_only_on_request(tmp_path: Path) -> None:
    logger = RecordingLogger()
    module = mlp_module(AdamQLR)
    monitor = CurvatureMonitor(plot=False)
    trainer = make_trainer("strategy", callbacks=[monitor], logger=[logger], max_steps=2)
    trainer.fit(module, loader(vectors()))
    assert not any("/network" in key for key in logger.rows[-1][1])


def test_several_optimizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = RecordingLogger()
    module = TwoOptimizers()
    module.configure_optimizers = lambda: (  # type: ignore[method-assign]
        [WithState([module.layer.weight]), WithState([module.layer.bias])],
        [],
    )
    fit(tmp_path, CurvatureMonitor(plot=False, per_layer=True), module, logger=logger)
    _, last = logger.rows[-1]
    assert last["curvature/hess_diag_norm/layer/opt1"] == 1.0
    assert last["curvature/hess_diag_sparsity/layer/opt0"] == 1 / 64
    assert last["curvature/loss/opt0"] == 8.0


def test_one_transfer_per_logged_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transfers: list[int] = []
    original = Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        transfers.append(tensor.numel())
        return original(tensor)

    logger = RecordingLogger()
    module = mlp_module(WithState)
    trainer = make_trainer(
        "strategy", callbacks=[CurvatureMonitor(3, plot=False, per_layer=True)], logger=[logger]
    )
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", tolist)
        trainer.fit(module, loader(vectors(24)))
    of_layers = 2 * 2
    assert [numel for numel in transfers if numel > of_layers] == [5 + of_layers] * 2
    assert logger.steps == [3, 6]


def test_names_are_those_without_compile() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(torch.compile(nn.Sequential(nn.Linear(2, 3))), shared, shared)
    names = layer_of_parameters(model)
    assert [names[id(p)] for p in model.parameters()] == ["0.0", "0.0", "1", "1"]
    whole = torch.compile(nn.Linear(2, 2))
    assert set(layer_of_parameters(whole).values()) == {"OptimizedModule"}


def test_parameters_outside_of_the_model() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = WithState([parameter])
    optimizer.step()
    assert set(curvature_of_layers(optimizer, {})) == {
        "hess_diag_norm/other",
        "hess_diag_sparsity/other",
    }
    plain = torch.optim.AdamW([parameter])
    assert curvature_of_layers(plain, {}) == {}


def test_what_is_kept_per_layer() -> None:
    optimizer = WithState([nn.Parameter(torch.ones(2))])
    optimizer.layer_curvature = lambda: {  # type: ignore[attr-defined]
        "a_factor": {"network._orig_mod.0": [torch.tensor([3.0, 0.0]), torch.tensor(4.0)]}
    }
    values = curvature_of_layers(optimizer, {})
    assert {name: float(value) for name, value in values.items()} == {
        "a_factor_norm/network.0": 5.0,
        "a_factor_sparsity/network.0": pytest.approx(1 / 3),
    }
