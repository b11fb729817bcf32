"""Two processes with half the batch each take the same steps as one process with all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = '''
import json, sys, warnings
import lightning as L
import torch
from torch.utils.data import DataLoader, Sampler
import lightning_curvature as lc

strategy, ranks, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)


class Shard(Sampler):
    """Rows of this rank, so that both ranks together see the batches of one process."""

    def __iter__(self):
        rank = torch.distributed.get_rank() if ranks > 1 else 0
        rows = torch.arange(96).view(6, ranks, 16 // ranks)[:, rank]
        return iter(rows.flatten().tolist())

    def __len__(self):
        return 96 // ranks


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3)
        )

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        return lc.AdamQLR(self.parameters(), damping=0.1)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(96, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (96,), generator=generator)
        data = torch.utils.data.TensorDataset(x, y)
        return DataLoader(data, batch_size=16 // ranks, sampler=Shard())


named = {"callback": "ddp", "auto": "ddp"}.get(strategy, strategy)
callbacks = [lc.CurvatureCallback(directional="jvp")] if strategy == "callback" else []
if named == "ddp_curvature":
    named = lc.DDPCurvatureStrategy(directional="jvp")
elif named == "single_device_curvature":
    named = lc.SingleDeviceCurvatureStrategy(directional="jvp")
trainer = L.Trainer(
    accelerator="cpu", devices=ranks, strategy=named, precision="64-true", max_epochs=2,
    callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False, use_distributed_sampler=False,
)
module = Net()
trainer.fit(module)
optimizer = trainer.optimizers[0]
weights = torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()
result = {"weights": weights, "damping": optimizer.damping, "steps": trainer.global_step}
with open(f"{out}/rank{trainer.global_rank}.json", "w") as file:
    json.dump(result, file)
'''


def run(folder: Path, strategy: str, ranks: int) -> list[dict[str, object]]:
    """Train in a process of its own (the launcher starts the second rank)."""
    out = folder / f"{strategy}-{ranks}"
    out.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), strategy, str(ranks), str(out)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return run(tmp_path_factory.mktemp("single"), "single_device_curvature", 1)[0]


@pytest.mark.parametrize("strategy", ["ddp_curvature", "callback"])
def test_two_ranks_equal_one_process(
    strategy: str, single: dict[str, object], tmp_path: Path
) -> None:
    first, second = run(tmp_path, strategy, 2)
    assert first == second
    assert first["steps"] == single["steps"] == 12
    assert first["weights"] == pytest.approx(single["weights"], rel=1e-10, abs=1e-11)
    assert first["damping"] == pytest.approx(single["damping"], rel=1e-12)


PLAIN = """
import json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_curvature import AdamQLR


def train(rank, ranks, out):
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{out}/store")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    model = DistributedDataParallel(net) if ranks > 1 else net
    optimizer = AdamQLR(net.parameters(), max_lr=None, damping=0.1)
    criterion = optimizer.attach_model(net, nn.CrossEntropyLoss(), directional="jvp")
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (16,), generator=generator)
        part = slice(rank * 16 // ranks, (rank + 1) * 16 // ranks)
        optimizer.zero_grad()
        criterion(model(x[part]), y[part]).backward()
        optimizer.step()
    with open(f"{out}/rank{rank}.json", "w") as file:
        json.dump(torch.cat([p.detach().flatten() for p in net.parameters()]).tolist(), file)


if __name__ == "__main__":
    ranks, out = int(sys.argv[1]), sys.argv[2]
    torch.multiprocessing.spawn(train, (ranks, out), nprocs=ranks)
"""


def test_plain_loop_on_two_ranks(tmp_path: Path) -> None:
    """``attach_model`` under ``DistributedDataParallel``: one step length for all ranks."""
    script = tmp_path / "plain.py"
    script.write_text(PLAIN, encoding="utf-8")
    weights = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        out.mkdir()
        subprocess.run(
            [sys.executable, "-W", "ignore", str(script), str(ranks), str(out)],
            check=True,
            timeout=240,
        )
        weights += [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    single, first, second = weights
    assert first == second
    assert first == pytest.approx(single, rel=1e-10, abs=1e-11)
