"""A small GPT that predicts the next character of a text, and the text as a data module."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_curvature.checks import check_in_range, check_interval

__all__ = ["CharData", "CharLM", "DecoderBlock", "WindowLoader"]

_FILES = ("input.txt", "tinyshakespeare/input.txt")
_ADDRESS = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
_SHAKESPEARE_VOCABULARY = 65
_VALIDATION_SHARE = 0.1
_INIT_STD = 0.02

Batch = tuple[Tensor, Tensor]


class DecoderBlock(nn.Module):
    """Pre-norm transformer block: causal attention, then a perceptron; no biases.

    Args:
        width: Width of the residual stream.
        heads: Attention heads; they divide the width.
        dropout: Fraction dropped on both residual branches, in [0, 1).
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """Return the next hidden states, both ``[N, positions, width]``."""
        qkv = self.qkv(self.attention_norm(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.dropout(self.project(mixed.transpose(1, 2).flatten(-2)))
        inner = functional.gelu(self.expand(self.mlp_norm(hidden)))
        output: Tensor = hidden + self.dropout(self.contract(inner))
        return output


class CharLM(LightningModule):
    """Decoder-only transformer that predicts the next character.

    A stock LightningModule that knows nothing of curvature. It has no ``configure_optimizers``:
    the command line gives it an optimizer. ``train_loss`` and ``val_loss`` are logged in nats per
    character; the uniform guess costs ``log(vocab_size)``, which is where training begins.

    Args:
        vocab_size: Distinct characters; tiny Shakespeare has 65.
        context: Most characters that the model looks at.
        width: Width of the residual stream.
        layers: Number of transformer blocks.
        heads: Attention heads; they divide ``width``.
        dropout: Fraction dropped, in [0, 1).
        tie_head: Whether the last layer shares the weight of the embedding.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        vocab_size: int = _SHAKESPEARE_VOCABULARY,
        context: int = 64,
        width: int = 96,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        *,
        tie_head: bool = True,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "context": context, "width": width, "layers": layers}
        for name, size in {**sizes, "heads": heads}.items():
            check_interval(name, size)
        check_in_range("dropout", dropout, 0, 1)
        if width % heads:
            raise ValueError(f"Invalid heads={heads}: must divide width={width}.")
        self.save_hyperparameters()
        self.vocab_size = vocab_size
        self.context = context
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab_size, bias=False)
        if tie_head:
            self.head.weight = self.embedding.weight
        self._init_weights()

    def _init_weights(self) -> None:
        """Draw all matrices alike; those that add to the residual stream are smaller."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                adds = name.endswith(("project.weight", "contract.weight"))
                shrink = math.sqrt(2 * len(self.blocks)) if adds else 1.0
                nn.init.normal_(parameter, std=_INIT_STD / shrink)

    @override
    def setup(self, stage: str) -> None:
        """Check that the characters of the data have a place in the embedding.

        Raises:
            ValueError: If the data has more distinct characters than the model.
        """
        present = getattr(getattr(self.trainer, "datamodule", None), "vocab_size", 0)
        if present > self.vocab_size:
            raise ValueError(
                f"Invalid vocab_size={self.vocab_size}: the text has {present} distinct "
                f"characters. Give the model as many: --model.vocab_size {present}."
            )

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits ``[N, positions, vocab_size]`` of tokens ``[N, positions]``."""
        order = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.dropout(self.embedding(tokens) + self.positions(order))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy over all positions."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the mean cross-entropy."""
        self.log(
            "val_loss", self._loss(batch), prog_bar=True, sync_dist=True, batch_size=len(batch[0])
        )

    def _loss(self, batch: Batch) -> Tensor:
        tokens, targets = batch
        return functional.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


class WindowLoader:
    """Yields batches of windows at random places of a text, for ever new ones.

    The places of a batch depend on the seed and on how many batches went before, on nothing else.
    So a run that goes on from a checkpoint, in the middle of an epoch too, draws what it would
    have drawn; the Trainer saves and restores `state_dict`.

    Args:
        text: Tokens ``[characters]``.
        context: Characters per window.
        batch_size: Windows per batch and process.
        batches: Batches per epoch.
        seed: Seed of the places.
        rank: Number of this process; processes draw different windows.
        world_size: Number of processes.
    """

    def __init__(
        self,
        text: Tensor,
        context: int,
        batch_size: int,
        batches: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.text = text
        self.context = context
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drawn = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield the next batches, as many as an epoch has."""
        for _ in range(self.batches):
            self.drawn += 1
            yield self.draw(self.drawn - 1)

    def draw(self, index: int) -> Batch:
        """Return a batch: windows and what follows each of their characters.

        Args:
            index: Number of batches before it.
        """
        # Far apart, so that the batches of one seed are not those of the next one a step later.
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + index)
        # Every process draws for all of them and takes its part.
        shape = (self.world_size, self.batch_size)
        starts = torch.randint(len(self.text) - self.context, shape, generator=generator)[self.rank]
        windows = self.text[starts[:, None] + torch.arange(self.context + 1)]
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches drawn."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a saved loader was.

        Args:
            state_dict: From `state_dict`.
        """
        self.drawn = int(state_dict["drawn"])


class _Parts(NamedTuple):
    """The text, cut in two: tokens ``[characters]`` each."""

    train: Tensor
    validation: Tensor


class CharData(LightningDataModule):
    """A text as windows of characters: its last tenth validates, the rest trains.

    Training windows lie at random places; an "epoch" is a number of batches. Validation windows
    lie one after another without overlap and cover the whole of the last tenth, the rest of less
    than a window excepted.

    Nothing is downloaded. ``root`` holds ``input.txt`` or ``tinyshakespeare/input.txt``: tiny
    Shakespeare is the file at
    https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    (1.1 MB), and any other text in UTF-8 will do.

    Args:
        root: Folder that holds the text.
        batch_size: Windows per batch and process.
        context: Characters per window.
        batches_per_epoch: Training batches per epoch.
        seed: Seed of the training windows, independent of the training seed.

    Raises:
        FileNotFoundError: If the text is missing (in ``setup``).
        ValueError: If an argument is below 1, or the text is too short (in ``setup``).
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 16,
        context: int = 64,
        batches_per_epoch: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, size in {
            "batch_size": batch_size,
            "context": context,
            "batches_per_epoch": batches_per_epoch,
        }.items():
            check_interval(name, size)
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.context = context
        self.batches_per_epoch = batches_per_epoch
        self.seed = seed
        self.characters = ""
        self._parts: _Parts | None = None

    @property
    def vocab_size(self) -> int:
        """Distinct characters of the text, 0 before `setup`."""
        return len(self.characters)

    @override
    def setup(self, stage: str) -> None:
        """Read and cut the text once."""
        if self._parts is not None:
            return
        text = self._find().read_text(encoding="utf-8")
        self.characters = "".join(sorted(set(text)))
        tokens = self.encode(text)
        validation = int(_VALIDATION_SHARE * len(tokens))
        if validation <= self.context:
            raise ValueError(
                f"Invalid context={self.context}: the last tenth of the text has {validation} "
                "characters and must have more than one window. Use a longer text or a shorter "
                "context."
            )
        self._parts = _Parts(tokens[:-validation], tokens[-validation:])

    def _find(self) -> Path:
        for name in _FILES:
            if (self.root / name).is_file():
                return self.root / name
        raise FileNotFoundError(
            f"No file {' or '.join(_FILES)} in {self.root}. Download {_ADDRESS} and name the "
            "folder it is in with --data.root (CharData(root=...))."
        )

    def encode(self, text: str) -> Tensor:
        """Return the tokens ``[characters]`` of a text made of the same characters.

        Args:
            text: Any text.

        Raises:
            KeyError: If a character is not in the data.
        """
        numbers = {character: i for i, character in enumerate(self.characters)}
        return torch.tensor([numbers[character] for character in text], dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """Return the text of tokens.

        Args:
            tokens: Tokens ``[characters]``.
        """
        return "".join(self.characters[token] for token in tokens.tolist())

    @override
    def train_dataloader(self) -> WindowLoader:
        """Return training batches at random places."""
        return WindowLoader(
            self._cut().train,
            self.context,
            self.batch_size,
            self.batches_per_epoch,
            self.seed,
            rank=self.trainer.global_rank if self.trainer else 0,
            world_size=self.trainer.world_size if self.trainer else 1,
        )

    @override
    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return all validation windows, in batches."""
        text = self._cut().validation
        count = (len(text) - 1) // self.context * self.context
        columns = [part.view(-1, self.context) for part in (text[:count], text[1 : count + 1])]
        # Without gradients more windows fit at once.
        return DataLoader(TensorDataset(*columns), batch_size=4 * self.batch_size)

    def _cut(self) -> _Parts:
        if self._parts is None:
            raise RuntimeError("CharData has no text yet: call setup(stage) first.")
        return self._parts
