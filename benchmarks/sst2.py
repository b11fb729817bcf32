"""SST-2, a small masked word model, and its pretraining: what is fine-tuned without gradients.

The label is asked for by a prompt: a sentence becomes "like it ? <mask> <sentence>", and the logits
of "no" and "yes" at the mask are the answer. So the classifier is the word model itself, and there
is no new head. It is pretrained by masked words and by the same question in other words, "this film
<mask> , <sentence>" with the answers "terrible" and "great". So it knows what is to be known, but
not what it is asked: the case of a large language model in small.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

__all__ = [
    "FINE_TUNING",
    "PRETRAINING",
    "Prompt",
    "PromptModel",
    "Sentences",
    "Sst2",
    "evaluate",
    "load",
    "pretrain",
]

_PAD, _UNKNOWN, _MASK = range(3)
_SPECIAL = ("<pad>", "<unknown>", "<mask>")
_PROMPT_LENGTH = 4
_MIN_COUNT = 10
_MAX_WORDS = 36
_MASKED_SHARE = 0.15
# Batches are cut from that many of them sorted by length, so that little is padding.
_SORTED_BATCHES = 32


class Prompt(NamedTuple):
    """Words put before every sentence, and the answers by label."""

    words: tuple[str, str, str, str]
    answers: tuple[str, str]


PRETRAINING = Prompt(("this", "film", "<mask>", ","), ("terrible", "great"))
FINE_TUNING = Prompt(("like", "it", "?", "<mask>"), ("no", "yes"))


class Sentences(NamedTuple):
    """Word numbers with the prompt before them ``[N, words]``, lengths ``[N]``, labels ``[N]``."""

    words: Tensor
    lengths: Tensor
    labels: Tensor

    def part(self, rows: Tensor) -> "Sentences":
        """Return some of them, without columns that are padding only.

        Args:
            rows: Their positions.
        """
        lengths = self.lengths[rows]
        return Sentences(self.words[rows, : int(lengths.max())], lengths, self.labels[rows])

    def epochs(self, batch: int, seed: int) -> Iterator["Sentences"]:
        """Yield shuffled batches of sentences of about equal length, for ever.

        Args:
            batch: Sentences per batch.
            seed: Seed of the order.
        """
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.labels), generator=generator)
            for chunk in order.split(batch * _SORTED_BATCHES):
                batches = chunk[self.lengths[chunk].argsort()].split(batch)
                for i in torch.randperm(len(batches), generator=generator).tolist():
                    if len(batches[i]) == batch:
                        yield self.part(batches[i])


class Sst2(NamedTuple):
    """The parts of the data, and the words known."""

    train: Sentences
    dev: Sentences
    test: Sentences
    vocabulary: tuple[str, ...]

    def asked(self, prompt: Prompt) -> "Sst2":
        """Return the same sentences with a prompt before them.

        Args:
            prompt: The prompt.
        """
        numbers = torch.tensor([self.vocabulary.index(word) for word in prompt.words])
        parts = []
        for part in (self.train, self.dev, self.test):
            words = part.words.clone()
            words[:, :_PROMPT_LENGTH] = numbers
            parts.append(part._replace(words=words))
        return Sst2(*parts, self.vocabulary)


class PromptModel(nn.Module):
    """Transformer encoder whose output weights are its word embeddings.

    Args:
        vocabulary: All words.
        width: Numbers per word.
        depth: Number of blocks.
        heads: Attention heads.
    """

    def __init__(
        self, vocabulary: tuple[str, ...], width: int = 64, depth: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.words = nn.Embedding(len(vocabulary), width)
        self.positions = nn.Embedding(_PROMPT_LENGTH + _MAX_WORDS, width)
        for embedding in (self.words, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.answers = torch.tensor([_UNKNOWN, _UNKNOWN])

    def expect(self, prompt: Prompt) -> None:
        """Take the answers of a prompt for the labels.

        Args:
            prompt: The prompt.
        """
        self.answers = torch.tensor([self.vocabulary.index(word) for word in prompt.answers])

    def hidden(self, words: Tensor) -> Tensor:
        """Return the last hidden states ``[N, words, width]`` of word numbers ``[N, words]``."""
        states = self.words(words) + self.positions.weight[: words.shape[1]]
        visible = (words != _PAD)[:, None, None, :]
        for block in self.blocks:
            states = block(states, visible)
        return self.norm(states)

    @override
    def forward(self, words: Tensor) -> Tensor:
        """Return the logits ``[N, 2]`` of the two answers, in float32 whatever the weights.

        Args:
            words: Word numbers ``[N, words]`` with one mask per sentence.
        """
        return (self.hidden(words)[words == _MASK] @ self.words(self.answers).T).float()

    def word_logits(self, words: Tensor, masked: Tensor) -> Tensor:
        """Return the logits of all words at some places.

        Args:
            words: Word numbers ``[N, words]``.
            masked: True at those places ``[N, words]``.
        """
        return self.hidden(words)[masked] @ self.words.weight.T


class _Block(nn.Module):
    """Attention and two linear layers, normalized before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    @override
    def forward(self, states: Tensor, visible: Tensor) -> Tensor:
        """Return the next states ``[N, words, width]``.

        Args:
            states: The states.
            visible: What is no padding, ``[N, 1, 1, words]``.
        """
        split = self.query_key_value(self.attention_norm(states)).unflatten(2, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        states = states + self.out(mixed.transpose(1, 2).flatten(2))
        return states + self.feed(self.feed_norm(states))


def load(folder: Path) -> Sst2:
    """Read the sentences; the vocabulary is that of the training part.

    Args:
        folder: Folder that holds ``SST-2/{train,dev,test}.tsv``.

    Raises:
        FileNotFoundError: If the files are not there.
    """
    parts = [_read(folder / "SST-2" / f"{name}.tsv") for name in ("train", "dev", "test")]
    counts = Counter(word for _, sentence in parts[0] for word in sentence)
    known = sorted(word for word, count in counts.items() if count >= _MIN_COUNT)
    vocabulary = (*_SPECIAL, *known)
    numbers = {word: i for i, word in enumerate(vocabulary)}
    return Sst2(*(_encode(part, numbers) for part in parts), vocabulary)


def _read(path: Path) -> list[tuple[int, list[str]]]:
    try:
        text = path.open(newline="", encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"No {path}: --data must name the folder that holds SST-2/train.tsv, dev.tsv and "
            "test.tsv, with the columns label and sentence."
        ) from error
    with text:
        rows = csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(rows)
        return [(int(label), sentence.split()) for label, sentence in rows]


def _encode(part: list[tuple[int, list[str]]], numbers: dict[str, int]) -> Sentences:
    room = (_SPECIAL[_UNKNOWN],) * _PROMPT_LENGTH
    rows = [(*room, *sentence[:_MAX_WORDS]) for _, sentence in part]
    lengths = torch.tensor([len(row) for row in rows])
    words = torch.full((len(rows), int(lengths.max())), _PAD)
    for i, row in enumerate(rows):
        words[i, : len(row)] = torch.tensor([numbers.get(word, _UNKNOWN) for word in row])
    return Sentences(words, lengths, torch.tensor([label for label, _ in part]))


def pretrain(
    model: PromptModel,
    train: Sentences,
    labeled: Sentences,
    *,
    steps: int,
    lr: float,
    batch: int,
    seed: int,
) -> None:
    """Train by backward passes: masked words of all sentences, and the labels of some.

    Args:
        model: The model, changed in place.
        train: Sentences for masked words.
        labeled: Sentences whose labels may be used.
        steps: Number of steps.
        lr: Largest learning rate of AdamW.
        batch: Sentences per batch, of each kind.
        seed: Seed of order and masks.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for masked_batch, labeled_batch, _ in zip(
        train.epochs(batch, seed), labeled.epochs(batch, seed), range(steps), strict=False
    ):
        words = masked_batch.words
        masked = torch.rand(words.shape, generator=generator) < _MASKED_SHARE
        masked &= (words != _PAD) & (words != _MASK)
        logits = model.word_logits(words.masked_fill(masked, _MASK), masked)
        loss = functional.cross_entropy(logits, words[masked])
        loss = loss + functional.cross_entropy(model(labeled_batch.words), labeled_batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def evaluate(model: PromptModel, part: Sentences, batch: int = 128) -> tuple[float, float]:
    """Return mean loss and the share of sentences whose label the model tells.

    Args:
        model: The model.
        part: The sentences.
        batch: Sentences per batch.
    """
    loss, right = 0.0, 0
    for rows in part.lengths.argsort().split(batch):
        some = part.part(rows)
        logits = model(some.words)
        loss += functional.cross_entropy(logits, some.labels, reduction="sum").item()
        right += int((logits.argmax(1) == some.labels).sum())
    return loss / len(part.labels), right / len(part.labels)
