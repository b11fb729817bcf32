"""AdaFisher: momentum over a Fisher diagonal made of layer factors, with coupled weight decay.

Gomes et al., ICLR 2025, arXiv:2405.16397; see `adafisher_base.py` for the rule, and for where it
differs from the authors' code.
"""

from typing import Any, ClassVar

from lightning_curvature.curvature.layer_diagonals import Normalization
from lightning_curvature.optim.adafisher_base import AdaFisherOptimizer, Mode

__all__ = ["AdaFisher"]


class AdaFisher(AdaFisherOptimizer):
    r"""Momentum divided by a diagonal Fisher matrix made of activations and output gradients.

    .. math::
        F = S H^\top, \quad m \leftarrow \beta m + (1-\beta) (g + \lambda\theta), \quad
        \theta \leftarrow \theta - \eta\,\frac{1+\Lambda}{F+\Lambda}\,\frac{m}{1-\beta^t}

    H is the mean square of the inputs of a layer and S that of the gradients of its outputs, both
    from the ordinary forward and backward of every ``factor_update_interval``-th step; F is divided
    by its mean over the layer. A coordinate of average curvature takes the step of gradient descent
    with momentum, flat ones up to :math:`(1+\Lambda)/\Lambda` times as much, steep ones less. The
    momentum is an average, so ``lr`` is ten times that of ``SGD(momentum=0.9)``: the default
    corresponds to 0.03 there.

    Layers are Linear, Conv1d, Conv2d, Embedding, BatchNorm, LayerNorm and GroupNorm. A layer called
    several times in a step sums over its calls; a parameter of several layers has the sum of their
    diagonals. Parameters without a layer (`fallback_parameters`) take the running average of their
    squared gradient as F, divided by its mean likewise. A layer that is never called keeps the
    step of gradient descent.

    ``mode="reference"`` computes what the authors' code does, with its defaults for ``lr`` and
    ``damping``. There F vanishes beside the damping within a few refreshes, so that it descends
    with momentum and the learning rate ``lr / damping``; and parameters are paired with layers by
    their order, so that a model with parameters outside of Linear, Conv2d, BatchNorm2d and
    LayerNorm is paired wrongly, and its last layers are not trained at all.

    Cost per step: forward and backward, and a look at the layers' inputs and output gradients on
    every ``factor_update_interval``-th step; an extra forward and backward then if the model is
    compiled. Memory: one copy of the parameters, two for parameters without a layer.

    Note:
        It has to know the model: attach it by a strategy, the callback or ``attach_model``. On the
        steps that look at them, the inputs of all layers stay alive until the backward, also those
        in checkpointed blocks.

    Args:
        params: Parameters to optimize, or parameter groups.
        lr: Learning rate, >= 0; None for 0.3, in reference mode for 0.001. Groups may differ in it,
            and in ``beta``, ``damping``, ``weight_decay`` and ``maximize``.
        beta: Decay of the average of the gradient, in [0, 1).
        damping: Added to F, > 0; None for 0.3, in reference mode for 0.001. It is a multiple of the
            mean of F, and does not change the step of a coordinate of average curvature; in
            reference mode it is absolute, and changing it changes the learning rate, ``lr /
            damping``.
        factor_update_interval: Optimizer steps between two updates of the factors.
        factor_decay: Weight of the old value in the averages of the factors, in [0, 1). In
            reference mode gamma: old and new are weighted by 0.1 gamma and 0.01 gamma.
        weight_decay: L2 penalty, >= 0: times the parameters it is added to the gradient, before all
            else.
        mode: "corrected", or "reference" for what the authors' code does.
        normalization: "mean" divides F by its mean. "min-max", as in the paper, maps H and S to
            [0, 1] first, so that the flattest coordinates of every layer have no curvature at all
            and need a larger damping. Of no effect in reference mode, which has its own.
        max_failures: Steps without a finite gradient in a row after which training stops.
        foreach: False works on one tensor at a time, which needs the least temporary memory.
        maximize: Whether to climb.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> layer = torch.nn.Linear(3, 2)
        >>> optimizer = AdaFisher(layer.parameters())
        >>> criterion = optimizer.attach_model(layer, torch.nn.CrossEntropyLoss())
        >>> criterion(layer(torch.ones(4, 3)), torch.tensor([0, 1, 1, 0])).backward()
        >>> optimizer.step()
        >>> optimizer.fallback_parameters
        []

    References:
        Gomes, Zhang, Belilovsky, Wolf and Hosseini, 2025, arXiv:2405.16397.
    """

    decoupled: ClassVar[bool] = False

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        beta: float = 0.9,
        damping: float | None = None,
        factor_update_interval: int = 100,
        factor_decay: float = 0.8,
        weight_decay: float = 0.0,
        mode: Mode = "corrected",
        normalization: Normalization = "mean",
        max_failures: int = 20,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "damping": damping,
            "factor_update_interval": factor_update_interval,
            "factor_decay": factor_decay,
            "weight_decay": weight_decay,
            "mode": mode,
            "normalization": normalization,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
