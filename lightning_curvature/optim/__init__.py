"""Optimizers; ordinary `torch.optim.Optimizer` classes."""

from lightning_curvature.optim.adafisher import AdaFisher
from lightning_curvature.optim.adafisherw import AdaFisherW
from lightning_curvature.optim.adahessian import AdaHessian
from lightning_curvature.optim.adamqlr import AdamQLR
from lightning_curvature.optim.base import CurvatureOptimizer
from lightning_curvature.optim.betaftrl import BetaFTRL
from lightning_curvature.optim.ekfac import EKFAC
from lightning_curvature.optim.fadam import FAdam
from lightning_curvature.optim.kfac import KFAC
from lightning_curvature.optim.sgdqlr import SGDQLR
from lightning_curvature.optim.sophiag import SophiaG
from lightning_curvature.optim.sophiah import SophiaH

__all__ = [
    "EKFAC",
    "KFAC",
    "SGDQLR",
    "AdaFisher",
    "AdaFisherW",
    "AdaHessian",
    "AdamQLR",
    "BetaFTRL",
    "CurvatureOptimizer",
    "FAdam",
    "SophiaG",
    "SophiaH",
]
