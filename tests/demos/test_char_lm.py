"""Tests of lightning_curvature/demos/char_lm.py."""

import itertools
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_curvature.demos import CharData, CharLM
from lightning_curvature.demos.char_lm import WindowLoader

CHARACTERS = "abcdefgh .\n"
CONTEXT = 8


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with a text in which a character leaves two choices for the next one."""
    generator = random.Random(0)
    places = itertools.accumulate(generator.choice((1, 2)) for _ in range(1000))
    text = "".join(CHARACTERS[place % len(CHARACTERS)] for place in places)
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    return tmp_path


def make_data(root: Path, **options: Any) -> CharData:
    data = CharData(str(root), **{"context": CONTEXT, "batch_size": 4, **options})
    data.setup("fit")
    return data


def make_model(**options: Any) -> CharLM:
    sizes = {"vocab_size": 11, "context": CONTEXT, "width": 16, "layers": 2, "heads": 2}
    return CharLM(**{**sizes, **options})


# The model


def test_a_character_is_predicted_from_those_before_it() -> None:
    model = make_model()
    tokens = torch.randint(11, (2, CONTEXT))
    for position in range(CONTEXT):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 11
        moved = (model(changed) - model(tokens)).abs().amax(dim=(0, 2))
        assert (moved[:position] == 0).all()
        assert (moved[position:] > 0).all()


def test_the_order_of_earlier_characters_matters() -> None:
    model = make_model(layers=1)
    tokens = torch.arange(CONTEXT)[None]
    swapped = tokens[:, [1, 0, *range(2, CONTEXT)]]
    assert (model(tokens) - model(swapped))[:, -1].abs().max() > 1e-4


@pytest.mark.parametrize("tie_head", [True, False])
def test_training_begins_at_the_uniform_guess(tie_head: bool) -> None:
    torch.manual_seed(0)
    model = CharLM(tie_head=tie_head)
    tokens = torch.randint(65, (8, 65))
    loss = model._loss((tokens[:, :-1], tokens[:, 1:]))
    assert abs(loss.item() - math.log(65)) < 0.1
    assert (model.head.weight is model.embedding.weight) == tie_head
    count = sum(p.numel() for p in model.parameters())
    assert count == 455_616 + (0 if tie_head else 65 * 96)


def test_branches_start_smaller_where_they_add_up() -> None:
    model = CharLM(width=128, layers=8)
    weights = dict(model.blocks[3].named_parameters())
    for name, expected in (("qkv", 0.02), ("project", 0.005), ("contract", 0.005)):
        deviation = weights[f"{name}.weight"].std().item()
        torch.testing.assert_close(deviation, expected, rtol=0.05, atol=0)


def test_dropout_is_off_unless_asked_for() -> None:
    tokens = torch.randint(11, (1, CONTEXT))
    for dropout, same in ((0.0, True), (0.5, False)):
        model = make_model(dropout=dropout)
        assert torch.equal(model(tokens), model(tokens)) == same


def make_trainer(**options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(
        **{"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, **quiet, **options}
    )


class TrainedCharLM(CharLM):
    """The model with an optimizer that is good enough for it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def make_trained() -> TrainedCharLM:
    torch.manual_seed(0)
    return TrainedCharLM(vocab_size=11, context=CONTEXT, width=16, layers=1, heads=2)


def test_training_lowers_the_loss(root: Path) -> None:
    trainer = make_trainer(max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(make_trained(), datamodule=CharData(str(root), 4, CONTEXT, batches_per_epoch=40))
    metrics = trainer.callback_metrics
    assert metrics["val_loss"] < 0.7 * math.log(11)
    assert metrics["train_loss"] < 0.7 * math.log(11)


def test_val_loss_is_the_mean_over_characters(root: Path) -> None:
    # 12 windows in batches of 8 and 4: the mean of the batches would be another number.
    model, data = make_trained(), make_data(root, batch_size=2)
    with torch.no_grad():
        model.head.weight.mul_(20)
    (found,) = make_trainer().validate(model, datamodule=data, verbose=False)
    sums = [len(batch[0]) * model._loss(batch).item() for batch in data.val_dataloader()]
    assert len(sums) == 2
    assert found["val_loss"] == pytest.approx(sum(sums) / 12, rel=1e-5)


# The data


def test_the_last_tenth_validates(root: Path) -> None:
    data = make_data(root, batches_per_epoch=200)
    text = data.encode((root / "input.txt").read_text(encoding="utf-8"))
    assert data.vocab_size == len(CHARACTERS)
    assert data.decode(text) == (root / "input.txt").read_text(encoding="utf-8")
    windows = torch.cat([inputs for inputs, _ in data.val_dataloader()])
    assert torch.equal(windows.flatten(), text[900 : 900 + 12 * CONTEXT])
    targets = torch.cat([targets for _, targets in data.val_dataloader()])
    assert torch.equal(targets.flatten(), text[901 : 901 + 12 * CONTEXT])


def test_training_never_sees_the_last_tenth() -> None:
    # Tokens that are their own places.
    loader = WindowLoader(torch.arange(30), 4, batch_size=50, batches=4, seed=0)
    seen = []
    for inputs, targets in loader:
        assert inputs.shape == targets.shape == (50, 4)
        assert torch.equal(targets, inputs + 1)
        seen.append(targets)
    assert len(seen) == len(loader) == 4
    # Every window is drawn, the last one included.
    assert set(torch.cat(seen)[:, 0].tolist()) == set(range(1, 27))


def test_training_part_ends_where_validation_begins(root: Path) -> None:
    data = make_data(root)
    text = data.encode((root / "input.txt").read_text(encoding="utf-8"))
    assert torch.equal(data.train_dataloader().text, text[:900])


def windows(seed: int = 0, rank: int = 0, world_size: int = 1) -> WindowLoader:
    return WindowLoader(torch.arange(10_000), 4, 2, 3, seed, rank=rank, world_size=world_size)


def draws(loader: WindowLoader, epochs: int = 1) -> list[list[int]]:
    return [inputs[:, 0].tolist() for _ in range(epochs) for inputs, _ in loader]


def test_windows_depend_on_seed_and_place_alone() -> None:
    torch.manual_seed(1)
    first = draws(windows(), epochs=2)
    torch.manual_seed(2)
    assert draws(windows(), epochs=2) == first
    ranks = [windows(seed=2, rank=rank, world_size=2) for rank in (0, 1)]
    everything = [*first, *draws(windows(seed=1)), *draws(ranks[0]), *draws(ranks[1])]
    assert len({tuple(batch) for batch in everything}) == len(everything)


def test_windows_leave_the_global_random_stream_alone() -> None:
    before = torch.get_rng_state()
    draws(windows())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_loader_goes_on_from_its_state(cut: int) -> None:
    expected = draws(windows(), epochs=3)
    loader, resumed = windows(), windows()
    for i, _ in enumerate(batch for _ in range(3) for batch in loader):
        if i + 1 == cut:
            break
    resumed.load_state_dict(loader.state_dict())
    assert draws(resumed) == expected[cut : cut + 3]


class Watch(Callback):
    """Notes the windows and saves once.

    Args:
        path: File to save to.
        step: Save after this step.
    """

    def __init__(self, path: Path | None = None, step: int = 0) -> None:
        self.path, self.step = path, step
        self.seen: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Note, and save."""
        self.seen.append(batch[0])
        if self.path is not None and trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)


@pytest.mark.parametrize("step", [2, 3], ids=["within an epoch", "end of an epoch"])
def test_run_resumes_with_the_windows_it_would_have_seen(root: Path, step: int) -> None:
    def run(watch: Watch, **options: Any) -> dict[str, Tensor]:
        model = make_trained()
        data = CharData(str(root), 4, CONTEXT, batches_per_epoch=3)
        trainer = make_trainer(max_epochs=2, callbacks=[watch])
        trainer.fit(model, datamodule=data, **options)
        return model.state_dict()

    whole, rest = Watch(root / "saved.ckpt", step), Watch()
    expected = run(whole)
    found = run(rest, ckpt_path=root / "saved.ckpt", weights_only=True)
    assert [w.tolist() for w in rest.seen] == [w.tolist() for w in whole.seen[step:]]
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


# Errors


def test_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        CharData(str(tmp_path)).setup("fit")
    assert str(error.value) == (
        f"No file input.txt or tinyshakespeare/input.txt in {tmp_path}. Download "
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt "
        "and name the folder it is in with --data.root (CharData(root=...))."
    )


def test_text_in_its_own_folder(root: Path) -> None:
    (root / "sets" / "tinyshakespeare").mkdir(parents=True)
    (root / "input.txt").rename(root / "sets" / "tinyshakespeare" / "input.txt")
    assert make_data(root / "sets").vocab_size == len(CHARACTERS)


def test_more_characters_than_the_model_has(root: Path) -> None:
    message = (
        "Invalid vocab_size=10: the text has 11 distinct characters. Give the model as many: "
        "--model.vocab_size 11."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer().validate(make_model(vocab_size=10), datamodule=make_data(root))


def test_short_text(root: Path) -> None:
    make_data(root, context=99)
    with pytest.raises(ValueError, match="Invalid context=100: the last tenth of the text has 100"):
        make_data(root, context=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "Invalid heads=3: must divide width=16"),
        ({"layers": 0}, "Invalid layers=0"),
        ({"dropout": 1.0}, r"Invalid dropout=1\.0: must be in \[0, 1\)"),
    ],
)
def test_arguments_of_the_model(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**options)


def test_arguments_of_the_data(root: Path) -> None:
    with pytest.raises(ValueError, match="Invalid batches_per_epoch=0"):
        make_data(root, batches_per_epoch=0)
    with pytest.raises(RuntimeError, match=r"has no text yet: call setup\(stage\) first"):
        CharData(str(root)).train_dataloader()
