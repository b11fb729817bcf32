"""The monitoring callbacks where FSDP2 shards the parameters.

Files under test: callbacks/layer_norms.py, callbacks/layer_statistics.py.
"""

from typing import Any

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_curvature import CurvatureMonitor, FAdam
from tests.helpers.elementwise import ShardedModule, small_network
from tests.helpers.layer_watching import watch
from tests.helpers.modules import vectors
from tests.helpers.monitoring import RecordingLogger
from tests.helpers.probing import make_trainer
from tests.helpers.ranks import RankPool, world
from tests.helpers.two_ranks import shared_loader


def fit_sharded() -> tuple[dict[str, float], dict[str, Any]]:
    """Fit on this rank under FSDP2, or unsharded in one process; return what was logged last."""
    ranks = world()[1]
    strategy = ModelParallelStrategy(ranks, 1, process_group_backend="gloo") if ranks > 1 else None
    logger, statistics = RecordingLogger(), watch()
    trainer = make_trainer(
        "auto",
        callbacks=[CurvatureMonitor(plot=False, per_layer=True), statistics],
        logger=[logger],
        strategy=strategy or "auto",
        devices=ranks,
        use_distributed_sampler=False,
    )
    trainer.fit(ShardedModule(small_network(), FAdam), shared_loader(vectors(24), 8))
    return logger.rows[-1][1], statistics.history


@pytest.mark.ddp
def test_two_shards_say_what_one_process_says(ranks: RankPool) -> None:
    (first, history), (second, _) = ranks.run(fit_sharded)
    single, expected = fit_sharded()
    assert first == second
    assert "curvature/exp_avg_sq_norm/network.2" in single
    assert "curvature/exp_avg_sq_sparsity/network.0" in single
    assert first == pytest.approx(single, rel=1e-9, abs=1e-13)
    assert history.keys() == expected.keys()
    for name, values in expected.items():
        assert history[name] == pytest.approx(values, rel=1e-9, abs=1e-13), name
