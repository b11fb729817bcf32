"""Base of optimizers that move parameters along random directions: groups, masks, updates, state.

What a step measures is the business of `ZerothOrderOptimizer`; what is done with it, in one sweep
over the parameters that also brings them back, is here.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_curvature.curvature.perturbation import Directions, NoiseSource, Piece
from lightning_curvature.curvature.rounding import stochastic_round
from lightning_curvature.optim.base import CurvatureOptimizer
from lightning_curvature.optim.displacement import Displacement
from lightning_curvature.optim.zeroth_arguments import check_zeroth_order
from lightning_curvature.optim.zeroth_storage import Storage, is_half
from lightning_curvature.oracle.streams import stream
from lightning_curvature.vectors import scalar_dtype

__all__ = ["DisplacedOptimizer"]


class DisplacedOptimizer(CurvatureOptimizer):
    """Base of optimizers that move parameters along random directions.

    Groups with ``first_order=True`` are not moved: they have gradients.

    Args:
        params: Parameters or parameter groups.
        defaults: Hyper-parameters.

    Attributes:
        noise_source: Gives the random directions instead of the keyed generators, None for those.
    """

    # Hyper-parameters that groups may differ in.
    own_per_group: ClassVar[tuple[str, ...]] = ("lr", "weight_decay", "first_order")

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        defaults = {**defaults, "first_order": False}
        self._check_group(defaults)
        self.noise_source: NoiseSource | None = None
        # Numbers of the parameters in the keys of their streams, by id; those of a checkpoint.
        self._indices: dict[int, int] = {}
        self._reset()
        super().__init__(params, defaults)

    def _reset(self) -> None:
        """Forget what lives within a step."""
        self._displacement: Displacement | None = None
        self._built_for: Any = None

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the hyper-parameters that are one value for all groups."""
        # torch adds "differentiable" to the defaults, but not to all groups.
        own = (*self.own_per_group, "differentiable")
        return tuple(name for name in self.defaults if name not in own)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_zeroth_order(group)
        if not isinstance(group["first_order"], bool):
            raise TypeError(f"Invalid first_order={group['first_order']!r}: must be a bool.")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group: As for every torch optimizer.

        Raises:
            ValueError: If an argument is out of range, or differs from the other groups though it
                is one value for all.
        """
        self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    # Parameters

    def _trained(self, *, first_order: bool = False) -> list[Tensor]:
        return [
            p
            for group in self.param_groups
            if group["first_order"] == first_order
            for p in group["params"]
            if p.requires_grad
        ]

    @property
    def has_gradients(self) -> bool:
        """Whether some parameters are trained by a backward."""
        return bool(self._trained(first_order=True))

    @contextmanager
    def only_gradients(self) -> Iterator[None]:
        """Let only those parameters require a gradient that are trained by a backward."""
        with _without_grad(self._trained()):
            yield

    @property
    def directions(self) -> Directions:
        """The random directions of the parameters that are trained at present."""
        return self._moving().directions

    def _present(self) -> Displacement:
        """Return what displaces the parameters in the present step, without looking again."""
        assert self._displacement is not None
        return self._displacement

    def _moving(self) -> Displacement:
        """Return what displaces the parameters that are trained at present."""
        params = [p for p in self._trained() if not self._is_left_out(p)]
        group = self.param_groups[0]
        masks = {
            position: self.state[p]["mask"]
            for position, p in enumerate(params)
            if "mask" in self.state.get(p, {})
        }
        settings = [group.get(key) for key in ("seed", "distribution", "restore", "half_precision")]
        built_for = (
            [(id(p), p.data_ptr(), p.dtype) for p in params],
            {position: id(mask) for position, mask in masks.items()},
            self.noise_source,
            settings,
        )
        if self._displacement is None or built_for != self._built_for:
            if not params:
                raise RuntimeError(
                    f"{type(self).__name__} has nothing to train: every parameter is frozen, has "
                    "an empty mask, or is in a group with first_order=True. Unfreeze some, or call "
                    "set_mask(p, None)."
                )
            devices = sorted({str(p.device) for p in params})
            if len(devices) > 1:
                raise RuntimeError(
                    f"{type(self).__name__} needs all its parameters on one device, got "
                    f"{', '.join(devices)}."
                )
            directions = Directions(
                params,
                [self._index(p) for p in params],
                seed=int(group["seed"]),
                distribution=group["distribution"],
                foreach=group["foreach"],
                source=self.noise_source,
                masks=masks,
            )
            storage = Storage(directions, group["restore"], group["half_precision"], self.state)
            self._displacement = Displacement(directions, storage, self._displacing)
            self._built_for = built_for
        return self._displacement

    def _index(self, p: Tensor) -> int:
        if id(p) not in self._indices:
            self._indices[id(p)] = 1 + max(self._indices.values(), default=-1)
        return self._indices[id(p)]

    def set_mask(self, p: Tensor, mask: Tensor | None) -> None:
        """Train only some entries of a parameter.

        State of the parameter is forgotten, except where one mask takes the place of another: then
        entries in both keep theirs, and new ones begin with the mean of it.

        Args:
            p: A parameter of this optimizer.
            mask: Positions in the flattened parameter, int64, shape ``[k]``, without repetition;
                none of them to leave the parameter alone; None for all entries.

        Raises:
            ValueError: If the positions are not such, or the parameter is of another optimizer.
        """
        real = self._unwrapped()
        if real is not self:
            assert isinstance(real, DisplacedOptimizer)
            real.set_mask(p, mask)
            return
        if all(p is not own for own in self._all_params()):
            raise ValueError("The parameter to mask is not one of this optimizer.")
        if mask is None:
            self.state.pop(p, None)
            return
        if not _is_mask(mask, p):
            raise ValueError(
                f"Invalid mask of shape {list(mask.shape)} and dtype {mask.dtype}: must be int64 "
                f"positions of shape [k] in [0, {p.numel()}), none of them twice."
            )
        before = self.state.pop(p, {})
        new = mask.to(p.device).sort().values
        self.state[p] = {**_carried(before, p, new), "mask": new}

    def _is_left_out(self, p: Tensor) -> bool:
        """Tell whether a mask leaves no entry of a parameter to train."""
        mask = self.state.get(p, {}).get("mask")
        return mask is not None and mask.numel() == 0

    def _check_state(self, saved: Any) -> None:
        super()._check_state(saved)
        ids = [index for group in saved["param_groups"] for index in group["params"]]
        for index, p in zip(ids, self._all_params(), strict=False):
            state = saved["state"].get(index, {})
            mask = state.get("mask")
            where = f"Cannot load the state into {type(self).__name__}:"
            if mask is not None and not _is_mask(mask, p):
                raise ValueError(
                    f"{where} 'mask' of parameter {index} must be positions in {p.numel()} entries."
                )
            for name, shape in self._occasional_state(p, mask).items():
                value = state.get(name)
                found = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                if name in state and found != list(shape):
                    raise ValueError(
                        f"{where} '{name}' of parameter {index} must be of shape {list(shape)}, "
                        f"got {found}."
                    )

    def _occasional_state(self, p: Tensor, mask: Tensor | None) -> dict[str, torch.Size]:
        """Return the shapes of the state that a parameter has under some settings.

        Args:
            p: The parameter.
            mask: Its mask, if it has one.
        """
        whole = p.shape if mask is None else mask.shape
        return {"master": whole, "layer_scale": torch.Size()}

    # Displacement

    def _begin(self) -> Displacement:
        """Return what displaces the parameters, ready for the coming step."""
        moving = self._moving()
        position = {id(p): i for i, p in enumerate(moving.directions.params)}
        blocks = [
            [position[id(p)] for p in group["params"] if id(p) in position]
            for group in self.param_groups
        ]
        blocks = [block for block in blocks if block]
        if self.param_groups[0]["blockwise"] == "none":
            blocks = [[i for block in blocks for i in block]]
        moving.begin(self._steps_done, blocks)
        return moving

    def _displacing(self, piece: Piece) -> list[Tensor]:
        """Return what parameters are displaced along, of a piece with its noise.

        Args:
            piece: The piece; its noise must not be changed.
        """
        return piece.noise

    def _update_block(
        self, moving: Displacement, block: int, answer: Tensor, on: float | Tensor
    ) -> None:
        position = {id(moving.directions.params[i]): i for i in moving.blocks[block]}
        for group in self.param_groups:
            members = [position[id(p)] for p in group["params"] if id(p) in position]
            if not members:
                continue
            generator = stream(
                moving.directions.params[members[0]].device,
                *("rounding", int(self.param_groups[0]["seed"]), self._steps_done),
                moving.directions.indices[members[0]],
            )
            self._advance([moving.directions.params[i] for i in members], on)
            with closing(moving.returning(len(answer), members, block)) as visited:
                for pieces in visited:
                    values = moving.storage.opened(pieces[0])
                    self._update_piece(group, pieces, values, answer, on)
                    moving.storage.commit(pieces[0], values, generator)

    def _update_piece(
        self,
        group: dict[str, Any],
        pieces: Sequence[Piece],
        values: list[Tensor],
        answer: Tensor,
        on: float | Tensor,
    ) -> None:
        """Update parts of parameters.

        Args:
            group: Their group.
            pieces: The same parts with the noise of every direction.
            values: The values there, to change in place, in the precision of the arithmetic.
            answer: See `_read`.
            on: See `_judge`.
        """
        estimate = self._estimate(pieces, answer)
        if self.param_groups[0]["maximize"]:
            torch._foreach_neg_(estimate)
        self._rule(group, pieces[0], values, estimate, on)

    def _estimate(self, pieces: Sequence[Piece], answer: Tensor) -> list[Tensor]:
        """Return the estimate of the gradient: the mean of slope times direction."""
        slopes = self._numbers(answer[:, 0] / len(answer))
        estimate = pieces[0].noise
        torch._foreach_mul_(estimate, slopes[0])
        for piece, slope in zip(pieces[1:], slopes[1:], strict=True):
            torch._foreach_add_(estimate, torch._foreach_mul(piece.noise, slope))
        return estimate

    def _advance(self, params: list[Tensor], on: float | Tensor) -> None:
        """Count an update of parameters, before it.

        Args:
            params: The parameters.
            on: See `_judge`.
        """

    def _limited(self, slopes: Tensor) -> Tensor:
        """Limit slopes to ``max_projected_grad``; those that are not finite stay so."""
        limit = self.param_groups[0]["max_projected_grad"]
        if limit is None:
            return slopes
        return torch.where(slopes.isfinite(), slopes.clamp(-limit, limit), slopes)

    def _can_look(self, values: Tensor) -> bool:
        """Tell whether reading numbers costs nothing.

        Args:
            values: The numbers.
        """
        return values.device.type == "cpu"

    def _numbers(self, values: Tensor) -> list[Any]:
        """Return numbers where reading them costs nothing, 0-dim tensors elsewhere."""
        if self._can_look(values):
            return list(values.tolist())
        return list(values.to(scalar_dtype(self._present().directions.params)).unbind())

    @abstractmethod
    def _rule(
        self,
        group: dict[str, Any],
        piece: Piece,
        values: list[Tensor],
        estimate: list[Tensor],
        on: float | Tensor,
    ) -> None:
        """Update values with an estimate of their gradient.

        Args:
            group: Their group.
            piece: Where they are, for state: see `_state`.
            values: Parts of parameters, changed in place.
            estimate: The estimate there; may be changed.
            on: 1, or a tensor that is 0 where nothing may change.
        """

    def _update_by_gradient(self, group: dict[str, Any], on: float | Tensor) -> None:
        """Update a group that has gradients."""
        for p in group["params"]:
            if p.grad is None:
                continue
            half = is_half(p)
            mode = self.param_groups[0]["half_precision"]
            value = p.detach().float() if half else p.detach()
            if half and mode == "master":
                master = self.state[p].setdefault("master", value.clone())
                # Somebody else has changed some since: loaded weights, say.
                value = master.copy_(torch.where(master.to(p.dtype) == p, master, value))
            grad = p.grad.float() if half else p.grad.clone()
            finite = torch.isfinite(grad).all()
            grad.masked_fill_(~finite, 0.0)
            usable = on * finite.to(torch.float32)
            self._advance([p], usable)
            grad = -grad if self.param_groups[0]["maximize"] else grad
            self._rule(group, _Whole(p), [value], [grad], usable)
            if half and mode == "stochastic":
                key = ("rounding", int(self.param_groups[0]["seed"]), self._steps_done)
                value = stochastic_round(value, p.dtype, stream(p.device, *key, self._index(p)))
            if half:
                p.copy_(value)

    # State per parameter

    def _state(self, piece: Piece, *names: str) -> list[list[Tensor]]:
        """Return the parts of state tensors that belong to a piece; new ones are zero."""
        found = []
        for name in names:
            tensors = [self._state_of(p, name) for p in self._params_of(piece)]
            found.append(piece.of(tensors))
        return found

    def _params_of(self, piece: Piece) -> list[Tensor]:
        if isinstance(piece, _Whole):
            return [piece.param]
        params = self._present().directions.params
        return [params[position] for position in piece.positions]

    def _state_of(self, p: Tensor, name: str, start: float = 0.0) -> Tensor:
        state: dict[str, Tensor] = self.state[p]
        if name not in state:
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            mask = state.get("mask")
            if mask is None:
                state[name] = torch.full_like(p, start, dtype=dtype).detach()
            else:
                state[name] = torch.full((len(mask),), start, dtype=dtype, device=p.device)
        return state[name]


class _Whole(Piece):
    """A parameter with its own gradient in the place of noise."""

    def __init__(self, param: Tensor) -> None:
        super().__init__([], [param.detach()], [])
        self.param = param

    @property
    def is_gradient(self) -> bool:
        """True."""
        return True


def _carried(state: dict[str, Any], p: Tensor, new: Tensor) -> dict[str, Any]:
    """Return the state of a parameter with a mask, for the entries of another mask."""
    old = state.get("mask")
    if old is None or not bool((stays := torch.isin(new, old)).any()):
        return {}
    source = torch.searchsorted(old, new[stays])
    carried = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            carried[name] = value
        elif name != "mask" and value.shape == old.shape:
            kept = value[source]
            # The average is no worse a start for a metric or a moment than the one it had.
            fresh = p.detach().take(new) if name == "master" else kept.mean().expand(len(new))
            carried[name] = fresh.to(kept.dtype).clone()
            carried[name][stays] = kept
    return carried


def _is_mask(mask: Any, p: Tensor) -> bool:
    """Tell whether something holds positions in a flattened parameter."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.int64 or mask.is_meta:
        return False
    if mask.ndim != 1 or bool(((mask < 0) | (mask >= p.numel())).any()):
        return False
    return len(torch.unique(mask)) == len(mask)


@contextmanager
def _without_grad(params: Sequence[Tensor]) -> Iterator[None]:
    """Leave parameters out of the graph that is built."""
    try:
        for p in params:
            p.requires_grad_(False)
        yield
    finally:
        for p in params:
            p.requires_grad_(True)
