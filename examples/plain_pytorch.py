"""AdamQLR in an ordinary PyTorch loop: attached to the model, or given nothing but a closure."""

import argparse
import warnings

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature import AdamQLR


def digits(batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Load 1797 handwritten digits of 8 x 8 pixels, which ship inside scikit-learn."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(pixels).float() / 16.0
    data = TensorDataset(x, torch.from_numpy(labels))
    generator = torch.Generator().manual_seed(0)
    return DataLoader(data, batch_size, shuffle=True, generator=generator)


def build() -> nn.Module:
    """Build a small network."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train_attached(loader: DataLoader[tuple[Tensor, ...]], epochs: int) -> None:
    """Let the optimizer see the model and the loss function; the loop stays as it was."""
    model = build()
    optimizer = AdamQLR(model.parameters())
    # Returns a function to call in place of the loss function, and just like it.
    criterion = optimizer.attach_model(model, nn.functional.cross_entropy)
    for epoch in range(epochs):
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
        stats = optimizer.stats  # tensors: reading one waits for the device
        print(
            f"attached epoch {epoch} loss {total / len(loader):.4f} "
            f"lr {stats['lr']:.3g} damping {stats['damping']:.3g}"
        )


def train_with_closure(loader: DataLoader[tuple[Tensor, ...]], epochs: int) -> None:
    """Pass a closure; enough where the computation is more than ``loss_fn(model(x), y)``.

    Its backward runs once. For the extra passes it is called again with the backward left out;
    buffers and metrics see those calls, and curvature comes from finite differences only.
    """
    model = build()
    optimizer = AdamQLR(model.parameters())
    for epoch in range(epochs):
        total = 0.0
        for x, y in loader:

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            total += optimizer.step(closure).item()
        print(f"closure epoch {epoch} loss {total / len(loader):.4f}")


def main() -> None:
    """Train twice and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=256)
    arguments = parser.parse_args()
    loader = digits(arguments.batch_size)
    train_attached(loader, arguments.epochs)
    # The optimizer says once what a bare closure lacks; this model has no buffers to protect.
    warnings.filterwarnings("ignore", message=".*has only a closure to ask.*")
    train_with_closure(loader, arguments.epochs)


if __name__ == "__main__":
    main()
