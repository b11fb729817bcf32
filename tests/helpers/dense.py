"""Dense curvature matrices in float64, built with torch.func: what the oracle is compared with.

Nothing here uses the package under test. A model becomes a function of one flat parameter vector;
its Hessian, its generalized Gauss-Newton matrix for any losses on any logits, and its softmax
Fisher are then formed entry by entry.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn.modules.batchnorm import _BatchNorm


class Head(NamedTuple):
    """One term of the objective: which logits, and the (already weighted) loss of those logits."""

    select: Callable[[Any], Tensor]
    loss: Callable[[Tensor], Tensor]


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors into one detached vector."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _without_running_statistics(model: nn.Module) -> nn.Module:
    """Copy a model without its hooks; its batch norm changes no buffer, as torch.func needs."""
    hooks = (model._forward_pre_hooks, model._forward_hooks)
    model._forward_pre_hooks, model._forward_hooks = OrderedDict(), OrderedDict()
    try:
        clone = copy.deepcopy(model)
    finally:
        model._forward_pre_hooks, model._forward_hooks = hooks
    for module in clone.modules():
        if isinstance(module, _BatchNorm) and module.training:
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return clone


class DenseModel:
    """A model as a function of one flat vector of parameters.

    Args:
        model: the model; it is copied, so later changes of it are not seen.
        params: the parameters that make up the vector, in this order; by default all that require
            grad.
        seed: seed of torch's generator before each forward, which fixes dropout masks.
    """

    def __init__(
        self, model: nn.Module, params: Sequence[Tensor] | None = None, seed: int = 0
    ) -> None:
        if params is None:
            params = [param for param in model.parameters() if param.requires_grad]
        name_of = {id(param): name for name, param in model.named_parameters()}
        self.names = [name_of[id(param)] for param in params]
        self.shapes = [param.shape for param in params]
        self.theta = flatten(params)
        self.seed = seed
        self.model = _without_running_statistics(model)

    def outputs(self, theta: Tensor, *inputs: Any) -> Any:
        """Return the model output at ``theta``."""
        pieces = theta.split([shape.numel() for shape in self.shapes])
        swapped = {
            name: piece.view(shape)
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)
        }
        torch.manual_seed(self.seed)
        return functional_call(self.model, swapped, inputs)

    def loss(self, theta: Tensor, inputs: Sequence[Any], loss: Callable[[Any], Tensor]) -> Tensor:
        """Return the objective at ``theta``."""
        return loss(self.outputs(theta, *inputs))

    def gradient(self, inputs: Sequence[Any], loss: Callable[[Any], Tensor]) -> Tensor:
        """Return the gradient, shape ``[n]``."""
        with torch.random.fork_rng():
            return grad(lambda theta: self.loss(theta, inputs, loss))(self.theta)

    def hessian(self, inputs: Sequence[Any], loss: Callable[[Any], Tensor]) -> Tensor:
        """Return the Hessian, shape ``[n, n]``."""
        with torch.random.fork_rng():
            return jacrev(grad(lambda theta: self.loss(theta, inputs, loss)))(self.theta)

    def jacobian(self, inputs: Sequence[Any], select: Callable[[Any], Tensor]) -> Tensor:
        """Return the Jacobian of the selected logits, shape ``[logits, n]``."""

        def logits(theta: Tensor) -> Tensor:
            return select(self.outputs(theta, *inputs)).reshape(-1)

        with torch.random.fork_rng():
            return jacrev(logits)(self.theta)

    def ggn(self, inputs: Sequence[Any], heads: Sequence[Head]) -> Tensor:
        """Return the sum over heads of J^T H_L J, shape ``[n, n]``."""
        total = self.theta.new_zeros(self.theta.numel(), self.theta.numel())
        for head in heads:
            jacobian = self.jacobian(inputs, head.select)
            with torch.no_grad(), torch.random.fork_rng():
                logits = head.select(self.outputs(self.theta, *inputs))
            hessian = output_hessian(head.loss, logits)
            total = total + jacobian.T @ hessian @ jacobian
        return total

    def softmax_fisher(self, inputs: Sequence[Any]) -> Tensor:
        """Return the Fisher of the mean cross-entropy, the expectation over the model's labels."""

        def log_probabilities(theta: Tensor) -> Tensor:
            return self.outputs(theta, *inputs).log_softmax(dim=1)

        with torch.random.fork_rng():
            scores = jacrev(log_probabilities)(self.theta)
            probabilities = log_probabilities(self.theta).exp()
        count = probabilities.shape[0]
        return torch.einsum("nk,nki,nkj->ij", probabilities, scores, scores) / count


def output_hessian(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """Return the Hessian of a scalar loss in its logits, shape ``[logits, logits]``."""
    shape = logits.shape

    def of_vector(vector: Tensor) -> Tensor:
        return loss(vector.view(shape))

    return jacrev(grad(of_vector))(logits.detach().reshape(-1))


def quadratic(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return v^T M v."""
    return vector @ matrix @ vector


class DeadBranch(nn.Module):
    """MLP whose second branch never fires: its ReLU sees negative numbers only."""

    def __init__(self, features: int = 5, classes: int = 4) -> None:
        super().__init__()
        self.live = nn.Linear(features, 6)
        self.dead = nn.Linear(features, 3)
        self.out = nn.Linear(9, classes)
        with torch.no_grad():
            self.dead.bias.fill_(-50.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape ``[batch, classes]``."""
        return self.out(torch.cat([self.live(x).relu(), self.dead(x).relu()], dim=1))


class TiedWeights(nn.Module):
    """Two applications of one layer and a transposed use of it: three uses of the same weight."""

    def __init__(self, features: int = 5, classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(features, features)
        self.again = nn.Linear(features, features, bias=False)
        self.again.weight = self.first.weight
        self.out = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape ``[batch, classes]``."""
        hidden = torch.tanh(self.again(torch.tanh(self.first(x))))
        return self.out(hidden @ self.first.weight.T)


class SmallConv(nn.Module):
    """Convolution, optional batch norm and dropout, linear read-out; reads rows as 1x5 images."""

    def __init__(self, classes: int = 4, batch_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, kernel_size=(1, 3), padding=(0, 1))
        self.norm = nn.BatchNorm2d(3) if batch_norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(15, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape ``[batch, classes]``."""
        hidden = torch.tanh(self.norm(self.conv(x.view(-1, 1, 1, 5))))
        return self.out(self.drop(hidden.flatten(1)))


class Aliased(nn.Module):
    """One submodule under two names, as in ``self.first = self.layers[0]``, used twice."""

    def __init__(self, features: int = 5, classes: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(features, features), nn.Linear(features, classes)])
        self.first = self.layers[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape ``[batch, classes]``."""
        return self.layers[1](torch.tanh(self.layers[0](torch.tanh(self.first(x)))))


class UnusedParameter(nn.Module):
    """A linear map beside a parameter that no forward reads, so that it never gets a gradient."""

    def __init__(self, features: int = 5, classes: int = 4) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.out = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape ``[batch, classes]``."""
        return self.out(x)


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    model[2].requires_grad_(False)
    return model


def mlp(features: int = 5, hidden: int = 7, classes: int = 4) -> nn.Sequential:
    """Build a smooth two-layer network."""
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, classes))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 4, bias=False),
    "linear-bias": lambda: nn.Linear(5, 4),
    "dead-branch": DeadBranch,
    "conv": SmallConv,
    "batch-norm": lambda: SmallConv(batch_norm=True),
    "dropout": lambda: SmallConv(dropout=0.4),
    "batch-norm-dropout": lambda: SmallConv(batch_norm=True, dropout=0.4),
    "tied": TiedWeights,
    "aliased": Aliased,
    "frozen-layer": _frozen,
    "unused-parameter": UnusedParameter,
}


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 1) -> nn.Module:
    """Build one of ``MODELS`` with reproducible weights, in train mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name]().to(dtype).train()
