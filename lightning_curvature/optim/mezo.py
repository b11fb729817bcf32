"""MeZO: gradient descent with slopes along random directions, in the memory of inference.

Malladi, Gao, Nichani, Damian, Lee, Chen and Arora, "Fine-tuning language models with just forward
passes", NeurIPS 2023, arXiv:2305.17333; official code princeton-nlp/MeZO. What differs is said in
zeroth_order.py. Weight decay holds for all parameters of a group (the code leaves out what has
"bias" or "layernorm" in its name: use a group with ``weight_decay=0``).
"""

from typing import Any

from torch import Tensor

from lightning_curvature.curvature.perturbation import Distribution, Piece
from lightning_curvature.optim.zeroth_arguments import Blockwise, Estimator, LayerScale, ModelMode
from lightning_curvature.optim.zeroth_gradient import ZerothGradientOptimizer, decay_, step_
from lightning_curvature.optim.zeroth_storage import HalfPrecision, Restore

__all__ = ["MeZO"]


class MeZO(ZerothGradientOptimizer):
    r"""Gradient descent with the slope along random directions; forward passes only.

    .. math::
        g = \frac{L(\theta + \epsilon z) - L(\theta - \epsilon z)}{2 \epsilon}, \qquad
        \theta \leftarrow \theta - \eta\,(g z + \lambda \theta)

    Nothing is differentiated: no graph, no gradients, no state. Directions z are drawn again
    instead of being kept, so training needs the memory of evaluation.

    Use it to fine-tune models that do not fit into memory with a backward pass, on a task that the
    pretrained model almost knows already, and expect many steps: thousands, each as long as two
    forward passes. It does not train networks from scratch.

    Cost per step: two forward passes, and three draws of a direction.
    Memory: one batch of noise that stays in the cache; nothing per parameter.

    Args:
        params: Parameters to optimize, or parameter groups. Groups with ``first_order=True`` get
            true gradients by a backward through the layers after the first of them, for one more
            forward pass.
        lr: Learning rate, >= 0. About that of gradient descent divided by the number of directions
            that matter to the loss: 1e-6 for whole models, 1e-4 for adapters. Groups may differ in
            it and in ``weight_decay``.
        perturbation_scale: Length epsilon of a displacement, per coordinate; > 0.
        estimator: Where the loss is looked at. "two_sided" on both sides (2 passes per direction);
            "one_sided" on one side and at the parameters themselves (1, and 1 per step);
            "residual" on one side, compared with the step before (1, a poor estimate).
        num_samples: Directions per step, >= 1, whose estimates are averaged. `SampleSchedule` can
            change it on the way.
        weight_decay: Weight decay, >= 0.
        distribution: Of the directions: "normal"; "rademacher", random signs; "sphere", normal
            numbers scaled to the norm that they have on average.
        restore: How parameters come back. "fused" returns in the sweep that updates them; between
            training step and update hooks see them displaced. "inplace" draws once more before the
            update, with the same result. "snapshot" keeps a copy, for one draw less and exact
            values.
        half_precision: How updates of bfloat16 and float16 parameters are kept, which are mostly
            too small for them. "stochastic" rounds up or down at random; "master" keeps float32
            copies; "nearest" loses most of them, as the official code does.
        model_mode: "train" leaves dropout on, with the same masks in all passes of a step, and
            batch normalization in the mode the model has; "eval" evaluates in eval mode.
        blockwise: Whether blocks of parameters, which are the parameter groups, are perturbed one
            after the other: "none"; "coordinate" updates a block before it goes to the next;
            "joint" measures all before it updates any. Passes per step grow with the blocks.
        layer_scale: Whether tensors are displaced in inverse proportion to a size of their own:
            "none"; "parameter_norm"; "gradient_norm", measured by 2 passes per tensor.
        layer_scale_update_interval: Steps between two measurements of these sizes, >= 1.
        max_projected_grad: Largest absolute value of a slope, > 0; None for no limit.
        seed: Seed of the directions, >= 0. All ranks must have the same.
        max_failures: Losses in a row that are not finite after which training stops with an error.
        foreach: False to work on one tensor at a time; otherwise small ones are worked on together.
        maximize: Whether to climb.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument has the wrong type.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = MeZO(model.parameters(), lr=1e-2)
        >>> loss_fn = optimizer.attach_model(model, torch.nn.functional.cross_entropy)
        >>> x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
        >>> loss = optimizer.step(lambda: loss_fn(model(x), y))
        >>> all(p.grad is None for p in model.parameters())
        True

    References:
        Malladi et al., 2023, arXiv:2305.17333, Algorithms 1 and 2.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-6,
        perturbation_scale: float = 1e-3,
        estimator: Estimator = "two_sided",
        num_samples: int = 1,
        weight_decay: float = 0.0,
        distribution: Distribution = "normal",
        restore: Restore = "fused",
        half_precision: HalfPrecision = "stochastic",
        model_mode: ModelMode = "train",
        blockwise: Blockwise = "none",
        layer_scale: LayerScale = "none",
        layer_scale_update_interval: int = 100,
        max_projected_grad: float | None = None,
        seed: int = 0,
        max_failures: int = 10,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "perturbation_scale": perturbation_scale,
            "estimator": estimator,
            "num_samples": num_samples,
            "weight_decay": weight_decay,
            "distribution": distribution,
            "restore": restore,
            "half_precision": half_precision,
            "model_mode": model_mode,
            "blockwise": blockwise,
            "layer_scale": layer_scale,
            "layer_scale_update_interval": layer_scale_update_interval,
            "max_projected_grad": max_projected_grad,
            "seed": seed,
            "max_failures": max_failures,
            "foreach": foreach,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _rule(
        self,
        group: dict[str, Any],
        piece: Piece,
        values: list[Tensor],
        estimate: list[Tensor],
        on: float | Tensor,
    ) -> None:
        decay_(estimate, values, group)
        step_(values, estimate, float(group["lr"]), on)
