"""Optimizers; ordinary `torch.optim.Optimizer` classes."""

from lightning_curvature.optim.adamqlr import AdamQLR
from lightning_curvature.optim.base import CurvatureOptimizer
from lightning_curvature.optim.sgdqlr import SGDQLR

__all__ = ["SGDQLR", "AdamQLR", "CurvatureOptimizer"]
