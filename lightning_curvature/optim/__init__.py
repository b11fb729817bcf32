"""Optimizers; ordinary `torch.optim.Optimizer` classes."""

from lightning_curvature.optim.adafisher import AdaFisher
from lightning_curvature.optim.adafisherw import AdaFisherW
from lightning_curvature.optim.adahessian import AdaHessian
from lightning_curvature.optim.adamqlr import AdamQLR
from lightning_curvature.optim.base import CurvatureOptimizer
from lightning_curvature.optim.betaftrl import BetaFTRL
from lightning_curvature.optim.ekfac import EKFAC
from lightning_curvature.optim.fadam import FAdam
from lightning_curvature.optim.forward_gradient import ForwardGradient
from lightning_curvature.optim.hizoo import HiZOO
from lightning_curvature.optim.hizool import HiZOOL
from lightning_curvature.optim.kfac import KFAC
from lightning_curvature.optim.mezo import MeZO
from lightning_curvature.optim.mfac import MFAC
from lightning_curvature.optim.sgdqlr import SGDQLR
from lightning_curvature.optim.sophiag import SophiaG
from lightning_curvature.optim.sophiah import SophiaH
from lightning_curvature.optim.zo_adam import ZOAdam
from lightning_curvature.optim.zo_conservative import ZOConservative
from lightning_curvature.optim.zo_momentum import ZOMomentum
from lightning_curvature.optim.zo_sign_sgd import ZOSignSGD

__all__ = [
    "EKFAC",
    "KFAC",
    "MFAC",
    "SGDQLR",
    "AdaFisher",
    "AdaFisherW",
    "AdaHessian",
    "AdamQLR",
    "BetaFTRL",
    "CurvatureOptimizer",
    "FAdam",
    "ForwardGradient",
    "HiZOO",
    "HiZOOL",
    "MeZO",
    "SophiaG",
    "SophiaH",
    "ZOAdam",
    "ZOConservative",
    "ZOMomentum",
    "ZOSignSGD",
]
