"""Small modules and data modules used by recipes, examples and tests."""

from lightning_curvature.demos.black_box import BlackBoxClassifier, TurnedDigitsDataModule
from lightning_curvature.demos.char_lm import CharData, CharLM
from lightning_curvature.demos.digits import DigitsClassifier, DigitsDataModule

__all__ = [
    "BlackBoxClassifier",
    "CharData",
    "CharLM",
    "DigitsClassifier",
    "DigitsDataModule",
    "TurnedDigitsDataModule",
]
