"""One row per optimizer: it drives the contract tests, the documentation and the command line."""

from dataclasses import dataclass

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

__all__ = ["OptimizerInfo", "get_optimizer_info", "list_optimizers"]


@dataclass(frozen=True)
class OptimizerInfo:
    """What there is to know about an optimizer before using it.

    Attributes:
        name: Lower-case name.
        cls: The class.
        asks: What it asks its oracle; empty for optimizers that need no extra passes.
        passes: Passes per step, in words.
        copies: Copies of the parameters it keeps as state, with default arguments.
        paper: arXiv identifier of the method.
        summary: One sentence.
    """

    name: str
    cls: type[CurvatureOptimizer]
    asks: frozenset[str]
    passes: str
    copies: int
    paper: str
    summary: str


_ROWS = (
    OptimizerInfo(
        name="adamqlr",
        cls=AdamQLR,
        asks=AdamQLR.asks,
        passes="1 forward+backward, 2 forwards",
        copies=2,
        paper="2310.14963",
        summary="Adam with a learning rate and damping derived from curvature.",
    ),
    OptimizerInfo(
        name="sgdqlr",
        cls=SGDQLR,
        asks=SGDQLR.asks,
        passes="1 forward+backward, 2 forwards",
        copies=0,
        paper="2310.14963",
        summary="Gradient descent with a learning rate and damping derived from curvature.",
    ),
    OptimizerInfo(
        name="sophiag",
        cls=SophiaG,
        asks=SophiaG.asks,
        passes="1 forward+backward; every 10th step 1 backward",
        copies=2,
        paper="2305.14342",
        summary="Clipped steps scaled by the Gauss-Newton diagonal under sampled labels.",
    ),
    OptimizerInfo(
        name="sophiah",
        cls=SophiaH,
        asks=SophiaH.asks,
        passes="1 forward+backward; every 10th step 4 backwards",
        copies=2,
        paper="2305.14342",
        summary="Clipped steps scaled by the Hessian diagonal from random products.",
    ),
    OptimizerInfo(
        name="adahessian",
        cls=AdaHessian,
        asks=AdaHessian.asks,
        passes="1 forward+backward, 4 backwards",
        copies=2,
        paper="2006.00719",
        summary="Adam with the Hessian diagonal in the place of the squared gradient.",
    ),
    OptimizerInfo(
        name="adafisher",
        cls=AdaFisher,
        asks=AdaFisher.asks,
        passes="1 forward+backward",
        copies=1,
        paper="2405.16397",
        summary="Momentum scaled by a Fisher diagonal made of activations and output gradients.",
    ),
    OptimizerInfo(
        name="adafisherw",
        cls=AdaFisherW,
        asks=AdaFisherW.asks,
        passes="1 forward+backward",
        copies=1,
        paper="2405.16397",
        summary="AdaFisher with decoupled weight decay.",
    ),
    OptimizerInfo(
        name="fadam",
        cls=FAdam,
        asks=FAdam.asks,
        passes="1 forward+backward",
        copies=2,
        paper="2405.12807",
        summary="Adam as natural gradient descent with a diagonal empirical Fisher matrix.",
    ),
    OptimizerInfo(
        name="betaftrl",
        cls=BetaFTRL,
        asks=BetaFTRL.asks,
        passes="1 forward+backward",
        copies=2,
        paper="2402.01567",
        summary="Adam seen as a learner of updates that follows the regularized leader.",
    ),
    OptimizerInfo(
        name="kfac",
        cls=KFAC,
        asks=KFAC.asks,
        passes="1 forward+backward, 1 backward, 2 forwards; every 5th step 1 forward",
        copies=1,
        paper="1503.05671",
        summary="Kronecker-factored curvature with adaptive rate, momentum and damping.",
    ),
    OptimizerInfo(
        name="ekfac",
        cls=EKFAC,
        asks=EKFAC.asks,
        passes="1 forward+backward, 1 backward, 2 forwards; every 5th step 1 forward",
        copies=1,
        paper="1806.03884",
        summary="K-FAC with the eigenvalues of its factors corrected.",
    ),
    OptimizerInfo(
        name="mfac",
        cls=MFAC,
        asks=MFAC.asks,
        passes="1 forward+backward",
        copies=64,
        paper="2107.03356",
        summary="The exact inverse of the Fisher matrix of the last gradients.",
    ),
    OptimizerInfo(
        name="mezo",
        cls=MeZO,
        asks=MeZO.asks,
        passes="2 forwards",
        copies=0,
        paper="2305.17333",
        summary="Gradient descent with slopes along random directions; no backward.",
    ),
    OptimizerInfo(
        name="hizoo",
        cls=HiZOO,
        asks=HiZOO.asks,
        passes="3 forwards",
        copies=1,
        paper="2402.15173",
        summary="MeZO in a metric learnt from second differences of the loss; no backward.",
    ),
    OptimizerInfo(
        name="hizool",
        cls=HiZOOL,
        asks=HiZOOL.asks,
        passes="3 forwards",
        copies=0,
        paper="2402.15173",
        summary="HiZOO whose metric is a row and a column per matrix; no backward.",
    ),
    OptimizerInfo(
        name="zomomentum",
        cls=ZOMomentum,
        asks=ZOMomentum.asks,
        passes="2 forwards",
        copies=1,
        paper="2402.11592",
        summary="Momentum over slopes along random directions; no backward.",
    ),
    OptimizerInfo(
        name="zosignsgd",
        cls=ZOSignSGD,
        asks=ZOSignSGD.asks,
        passes="2 forwards",
        copies=0,
        paper="2402.11592",
        summary="The sign of slopes along random directions; no backward.",
    ),
    OptimizerInfo(
        name="zoadam",
        cls=ZOAdam,
        asks=ZOAdam.asks,
        passes="2 forwards",
        copies=2,
        paper="2305.17333",
        summary="Adam on slopes along random directions; no backward.",
    ),
    OptimizerInfo(
        name="zoconservative",
        cls=ZOConservative,
        asks=ZOConservative.asks,
        passes="5 forwards",
        copies=0,
        paper="2402.11592",
        summary="Of both ways along a random direction, or none, the best; no backward.",
    ),
    OptimizerInfo(
        name="forwardgradient",
        cls=ForwardGradient,
        asks=ForwardGradient.asks,
        passes="2 forwards, one of them with tangents",
        copies=1,
        paper="2202.08587",
        summary="Exact slopes along random directions, by forward mode; no backward.",
    ),
)


def list_optimizers() -> list[OptimizerInfo]:
    """Return all optimizers, in alphabetical order of their names."""
    return sorted(_ROWS, key=lambda info: info.name)


def get_optimizer_info(name: str) -> OptimizerInfo:
    """Return the row of an optimizer.

    Args:
        name: Name of the optimizer or of its class, in any case.

    Raises:
        KeyError: If there is no such optimizer.

    Examples:
        >>> get_optimizer_info("AdamQLR").copies
        2
    """
    for info in _ROWS:
        if info.name == name.lower():
            return info
    known = ", ".join(info.name for info in list_optimizers())
    raise KeyError(f"Unknown optimizer {name!r}: known are {known}.")
