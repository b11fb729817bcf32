"""CurvatureOptimizer: a `torch.optim.Optimizer` that may ask its loss more than a gradient."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_curvature.curvature.schedule import RefreshSchedule
from lightning_curvature.optim.saved_state import (
    COPY_KEY,
    STATE_KEY,
    STATE_VERSION,
    check_saved_state,
    without_copies,
)
from lightning_curvature.oracle.closure import ClosureOracle, warn_bare_closure
from lightning_curvature.oracle.plain import ModelOracle
from lightning_curvature.oracle.plans import Plan
from lightning_curvature.oracle.protocol import MissingCapabilityError, Oracle
from lightning_curvature.oracle.ranks import mean_over_ranks
from lightning_curvature.oracle.window import DirectionalMethod

__all__ = ["CurvatureOptimizer"]


class CurvatureOptimizer(Optimizer, ABC):
    """Base of all optimizers that use an `Oracle`.

    A subclass implements `_update`, says in ``asks`` what it asks, and says in `wants_record` on
    which steps. Whoever attaches an oracle checks before the first batch that it can answer.

    Args:
        params: Parameters or parameter groups, as for every torch optimizer.
        defaults: Hyper-parameters. Those named by `shared` are one value for all groups.

    Attributes:
        oracle: The attached oracle, None before `attach`.
        stats: What the last step measured: 0-dim tensors on the parameters' device. Reading one
            waits for the device.
    """

    asks: ClassVar[frozenset[str]] = frozenset()
    # Whether every rank must hold whole parameters, though nothing is asked.
    needs_whole_params: ClassVar[bool] = False
    # Arguments that the groups keep under another name: name in the groups -> argument.
    argument_names: ClassVar[dict[str, str]] = {}
    # Tensors kept per parameter, of the shape of the parameter; "step" is a scalar.
    state_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        # Instance attributes on purpose: Lightning's wrapper is a subclass whose class attributes
        # would shadow them.
        self.oracle: Oracle | None = None
        self.stats: dict[str, Tensor] = {}
        self._steps_done = 0
        self._scalars: dict[str, Tensor] = {}
        # Of the oracle, while none is attached.
        self._oracle_state: dict[str, Any] = {}
        # Owners of intervals, and the states of those that have not come (yet).
        self._schedules: dict[str, RefreshSchedule] = {}
        self._schedule_states: dict[str, dict[str, Any]] = {}
        super().__init__(params, defaults)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the hyper-parameters that are one value for all groups."""
        return ()

    # Attaching

    def attach(self, oracle: Oracle) -> None:
        """Give the optimizer the oracle it will ask.

        Args:
            oracle: Oracle over the parameters of this optimizer.

        Raises:
            MissingCapabilityError: If the oracle cannot answer what this optimizer asks.
        """
        real = self._unwrapped()
        if real is not self:
            real.attach(oracle)
            return
        if oracle.module is None and not self.asks.isdisjoint({"layers", "slope"}):
            raise MissingCapabilityError(
                f"{type(self).__name__} looks at the layers of the model, which a bare closure "
                "does not tell. Call optimizer.attach_model(model, loss_fn), or use "
                "strategy='ddp_curvature' / 'single_device_curvature' or CurvatureCallback() with "
                "a Trainer."
            )
        missing = self.asks - oracle.capabilities
        if missing:
            raise MissingCapabilityError(
                f"{type(self).__name__} asks for {sorted(missing)}, which "
                f"{type(oracle).__name__} cannot answer; it offers {sorted(oracle.capabilities)}."
            )
        self.detach()
        oracle.load_state(self._oracle_state)
        oracle.plan = self.plan
        self.oracle = oracle
        try:
            self._watch(oracle)
        except BaseException:
            self.detach()
            raise

    def _watch(self, oracle: Oracle) -> None:
        """Install what else the optimizer needs; called when its oracle is there.

        Args:
            oracle: The oracle.
        """

    def detach(self) -> None:
        """Remove the oracle and what it installed."""
        real = self._unwrapped()
        if real is not self:
            real.detach()
            return
        if self.oracle is not None:
            self._oracle_state = self.oracle.state()
            self.oracle.close()
            self.oracle = None

    def attach_model(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        *,
        directional: DirectionalMethod = "auto",
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> Callable[..., Tensor]:
        """Prepare an ordinary PyTorch loop; use the returned function in place of ``loss_fn``.

        The whole loss belongs into ``loss_fn``, also penalties. Where `torch.distributed` is
        initialized, loss and curvature are averaged over all ranks. Call ``detach`` before
        compiling or scripting the model.

        Args:
            model: Model that holds all parameters of this optimizer.
            loss_fn: Called as ``loss_fn(model_output, *targets)``, returns a scalar.
            directional: How directional curvature is computed: "fd", "jvp" or "auto".
            grad_scaler: The scaler, if the loop uses one.

        Returns:
            A function with the arguments and the result of ``loss_fn`` that also records the batch.

        Raises:
            ValueError: If some parameters of this optimizer are not in ``model``.

        Examples:
            >>> import torch
            >>> from lightning_curvature import AdamQLR
            >>> model = torch.nn.Linear(3, 2)
            >>> optimizer = AdamQLR(model.parameters())
            >>> criterion = optimizer.attach_model(model, torch.nn.CrossEntropyLoss())
            >>> loss = criterion(model(torch.randn(8, 3)), torch.randint(2, (8,)))
            >>> loss.backward()
            >>> optimizer.step()
        """
        oracle = ModelOracle(
            self._all_params(),
            model,
            loss_fn,
            wanted=self.wants_record,
            directional=directional,
            grad_scaler=grad_scaler,
            mean=mean_over_ranks,
        )
        self.attach(oracle)
        return oracle.criterion

    def wants_record(self) -> bool:
        """Tell whether the coming step will ask its oracle anything; costs nothing."""
        return bool(self.asks)

    def plan(self) -> Plan | None:
        """Tell what to compute on the graphs of the main passes of the coming step, if anything."""
        return None

    # Intervals

    @property
    def intervals(self) -> tuple[str, ...]:
        """Names of the hyper-parameters that say how often something is refreshed."""
        return tuple(name for name in self.defaults if name.endswith("_update_interval"))

    def own_interval(self, name: str, schedule: RefreshSchedule) -> None:
        """Let a schedule decide instead of an interval, and give it its part of a loaded state.

        Args:
            name: One of `intervals`.
            schedule: Decides from now on.

        Raises:
            ValueError: If there is no such interval.
            RuntimeError: If another schedule decides already.
        """
        real = self._unwrapped()
        if name not in real.intervals:
            known = ", ".join(repr(interval) for interval in real.intervals) or "none"
            raise ValueError(f"Invalid interval={name!r}: {type(real).__name__} has {known}.")
        if name in real._schedules:
            raise RuntimeError(
                f"{name} of {type(real).__name__} has an owner already, a "
                f"{type(real._schedules[name]).__name__}. Use one schedule per interval."
            )
        if name in real._schedule_states:
            schedule.load_state(real._schedule_states[name])
        real._schedules[name] = schedule

    def release_interval(self, name: str) -> None:
        """Let the interval decide again.

        Args:
            name: One of `intervals`.
        """
        real = self._unwrapped()
        schedule = real._schedules.pop(name, None)
        if schedule is not None:
            real._schedule_states[name] = schedule.state()

    def _due(self, name: str, *, ahead: int = 0) -> bool:
        """Tell whether a step refreshes what an interval is about.

        Args:
            name: The interval.
            ahead: Steps between the coming one and the one in question.
        """
        schedule, step = self._schedules.get(name), self._steps_done + ahead
        if schedule is not None:
            return schedule.due(step)
        return step % int(self.param_groups[0][name]) == 0

    def _refreshed(self, name: str, drift: Tensor | None = None, *, ahead: int = 0) -> None:
        """Tell the owner of an interval that a step has refreshed.

        Args:
            name: The interval.
            drift: Relative change since the last time, a 0-dim tensor.
            ahead: See `_due`.
        """
        if name in self._schedules:
            self._schedules[name].refreshed(self._steps_done + ahead, drift)

    def _unwrapped(self) -> "CurvatureOptimizer":
        """Return this optimizer, without the wrapper that ``self.optimizers()`` gives in Lightning.

        The wrapper is a subclass: it forwards attributes it does not have, but methods run on the
        wrapper, and what they assign would stay there.
        """
        inner = self.__dict__.get("_optimizer")
        return inner if isinstance(inner, CurvatureOptimizer) else self

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _oracle_for(self, closure: Callable[[], Any] | None) -> Oracle:
        """Return the attached oracle, or make one from a bare closure."""
        name = type(self).__name__
        if self.oracle is None:
            if closure is None or _is_from_trainer(closure):
                raise MissingCapabilityError(
                    f"{name} has no curvature oracle. Use strategy='ddp_curvature' / "
                    "'single_device_curvature', or add CurvatureCallback() to "
                    "Trainer(callbacks=...), or call optimizer.attach_model(model, loss_fn) in a "
                    "plain loop. (Learning-rate finder runs drop callbacks: use the strategy.)"
                )
            self.attach(ClosureOracle(self._all_params(), mean=mean_over_ranks))
            warn_bare_closure(name, is_forward_only="forward" in self.asks)
        assert self.oracle is not None
        return self.oracle

    # Stepping

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients.

        Args:
            set_to_none: Whether to remove them instead of filling them with zeros.
        """
        if self.oracle is not None:
            self.oracle.zeroed()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimization step.

        Args:
            closure: Computes the loss and its gradient, and is called exactly once. None if that
                has happened already.

        Returns:
            What the closure returned.

        Raises:
            MissingCapabilityError: If nothing can answer what this optimizer asks.
        """
        if not self.asks:
            return self._step(None, closure)
        oracle = self._oracle_for(closure)
        try:
            return self._step(oracle, closure)
        finally:
            oracle.clear()

    def _step(self, oracle: Oracle | None, closure: Callable[[], Any] | None) -> Any:
        asked = oracle is not None and self.wants_record()
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = oracle.evaluate(closure) if asked and oracle is not None else closure()
        params = [p for p in self._all_params() if p.grad is not None]
        if oracle is not None and oracle.without_backward:
            return result
        # Without gradients, or without the loss they belong to, there is nothing to step on:
        # training_step returned None, or a callback skipped the backward.
        if params and asked and oracle is not None and not oracle.ready:
            needed = oracle.missing()
            if needed is not None:
                raise MissingCapabilityError(f"{type(self).__name__} {needed}")
        elif params:
            if any(p.grad is not None and p.grad.is_sparse for p in params):
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients.")
            if oracle is not None:
                oracle.select(params)
            self._update(params, oracle)
            self._steps_done += 1
        return result

    @abstractmethod
    def _update(self, params: list[Tensor], oracle: Oracle | None) -> None:
        """Change the parameters that have a gradient.

        Args:
            params: All parameters with a gradient, in the order of the groups.
            oracle: The oracle, None if this optimizer asks nothing.
        """

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group.

        Args:
            param_group: As for every torch optimizer.

        Raises:
            ValueError: If the group differs from the others in a hyper-parameter that all share.
            TypeError: If a parameter is complex.
        """
        given = dict(param_group)
        super().add_param_group(param_group)
        new, first = self.param_groups[-1], self.param_groups[0]
        complex_ones = [p for p in new["params"] if p.is_complex()]
        if complex_ones:
            self.param_groups.pop()
            raise TypeError(f"{type(self).__name__} does not support complex parameters.")
        for name in self.shared if new is not first else ():
            if name in given and given[name] != first[name]:
                self.param_groups.pop()
                argument, common = self.argument_names.get(name, name), first[name]
                common = common.item() if isinstance(common, Tensor) else common
                raise ValueError(
                    f"Invalid {argument}={given[name]!r} in a parameter group: it is one value "
                    f"for all groups, here {common!r}. Leave it out of the group."
                )
            new[name] = first[name]

    # State

    def _curvature_state(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "optimizer": type(self).__name__,
            "steps_done": self._steps_done,
            "scalars": dict(self._scalars),
            "oracle": self._oracle_state if self.oracle is None else self.oracle.state(),
            "schedules": {
                **self._schedule_states,
                **{name: schedule.state() for name, schedule in self._schedules.items()},
            },
        }

    def _load_curvature_state(self, state: dict[str, Any]) -> None:
        device = self._all_params()[0].device
        self._steps_done = int(state["steps_done"])
        self._scalars = {name: value.to(device) for name, value in state["scalars"].items()}
        self._oracle_state = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in state.get("oracle", {}).items()
        }
        self._schedule_states = dict(state.get("schedules", {}))
        for name, schedule in self._schedules.items():
            schedule.load_state(self._schedule_states.get(name, {}))

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state: torch's layout and one more key with the curvature's state.

        Most optimizers that ask nothing work where parameters are sharded, too. Distributed
        checkpoints keep torch's layout only, so there the first group carries a copy of that key.
        """
        real = self._unwrapped()
        if real is not self:
            return real.state_dict()
        state = super().state_dict()
        state[STATE_KEY] = self._curvature_state()
        if not (self.asks or self.needs_whole_params):
            state["param_groups"][0][COPY_KEY] = self._curvature_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; dtypes are kept and tensors move to the parameters' device.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: If the state is damaged, or belongs to another optimizer, another model or
                a newer version; the present state is then left as it was.
        """
        real = self._unwrapped()
        if real is not self:
            real.load_state_dict(state_dict)
            return
        found: object = state_dict
        if not isinstance(found, dict):
            self._check_state(found)
        before = dict(self.__dict__)
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, found: dict[str, Any]) -> dict[str, Any]:
            found = without_copies(found)
            self._check_state(found)
            loaded.update(found)
            return found

        # After the hooks that change a state before, and before those that use it afterwards.
        hooks = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(
                lambda _: self._finish_loading(loaded), prepend=True
            ),
        )
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            # Loading makes new containers, so the old ones are whole.
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        finally:
            for hook in hooks:
                hook.remove()
        if self.oracle is not None:
            self.oracle.load_state(self._oracle_state)

    def _finish_loading(self, saved: dict[str, Any]) -> None:
        # torch casts state to the dtype of its parameter; statistics keep their own.
        saved_ids = [i for group in saved["param_groups"] for i in group["params"]]
        params = self._all_params()
        for index, p in zip(saved_ids, params, strict=True):
            for key, value in saved["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.to(device=p.device)
        for group in self.param_groups:
            for key, value in group.items():
                if isinstance(value, Tensor):
                    group[key] = value.to(params[0].device)
        for key in self.shared:
            for group in self.param_groups[1:]:
                group[key] = self.param_groups[0][key]
        self._load_curvature_state(copy.deepcopy(saved[STATE_KEY]))
        self.stats = {}

    def _check_state(self, saved: Any) -> None:
        """Refuse an unsound state before anything is changed.

        Args:
            saved: What is to be loaded.

        Raises:
            ValueError: If it is not a whole and sound state of this optimizer.
        """
        check_saved_state(
            saved,
            name=type(self).__name__,
            params=self._all_params(),
            state_names=self.state_names,
            # torch adds "differentiable" to the defaults of optimizers that do not have it.
            hyper_parameters=[key for key in self.defaults if key != "differentiable"],
            check_group=self._check_group,
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        """Check the hyper-parameters of a group.

        Args:
            group: A whole group.

        Raises:
            ValueError: If one is out of range.
            TypeError: If one has the wrong type.
        """

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or deep copy holds: everything but the oracle."""
        return {**super().__getstate__(), STATE_KEY: self._curvature_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle or deep copy; it has to be attached anew."""
        state = dict(state)
        extra = state.pop(STATE_KEY, None)
        super().__setstate__(state)
        self.__dict__.setdefault("oracle", None)
        self.__dict__.setdefault("stats", {})
        self.__dict__.setdefault("_steps_done", 0)
        self.__dict__.setdefault("_scalars", {})
        self.__dict__.setdefault("_oracle_state", {})
        self.__dict__.setdefault("_schedules", {})
        self.__dict__.setdefault("_schedule_states", {})
        if extra is not None:
            self._load_curvature_state(extra)


def _is_from_trainer(closure: Callable[[], Any]) -> bool:
    """Tell whether a closure is that of Lightning's automatic optimization (not its manual one)."""
    inner = getattr(closure, "args", (closure,))[-1:]
    return any(
        type(part).__module__.split(".")[0] in ("lightning", "pytorch_lightning")
        and type(part).__name__ == "Closure"
        for part in inner
    )
