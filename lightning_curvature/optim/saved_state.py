"""Looks at a saved optimizer state before anything of it is used.

A checkpoint may be cut off, belong to another optimizer or model, or come from another release.
Whatever is wrong is named here, while the present state of the optimizer is still untouched.
"""

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "COPY_KEY",
    "STATE_KEY",
    "STATE_VERSION",
    "check_saved_state",
    "is_count",
    "without_copies",
]

STATE_KEY = "curvature"
# Of its copy in the first group; "curvature" is a hyper-parameter there.
COPY_KEY = "curvature_state"
# A schedule may end that far below a learning rate of zero.
_ROUNDING = 1e-6
STATE_VERSION = 2


def is_count(name: str) -> bool:
    """Tell whether a state of a parameter is a number; all others have the parameter's shape."""
    return name == "step" or name.startswith("num_")


def without_copies(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a state whose own key stands at the top, where it may be missing, and only there.

    Args:
        saved: The state; it is not changed.
    """
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return saved
    copies = [group[COPY_KEY] for group in groups if isinstance(group.get(COPY_KEY), dict)]
    if not copies:
        return saved
    # Distributed checkpoints drop empty dictionaries.
    own = {"scalars": {}, "oracle": {}, "schedules": {}, **copies[0]}
    rest = [{key: value for key, value in g.items() if key != COPY_KEY} for g in groups]
    return {STATE_KEY: own, **saved, "param_groups": rest}


def check_saved_state(
    saved: Any,
    *,
    name: str,
    params: Sequence[Tensor],
    state_names: Sequence[str],
    hyper_parameters: Sequence[str],
    check_group: Callable[[dict[str, Any]], None],
) -> None:
    """Check what `torch.optim.Optimizer.load_state_dict` is about to load.

    Other numbers of groups and parameters are torch's to refuse, which it does in time.

    Args:
        saved: The state.
        name: Name of the optimizer class.
        params: Its parameters.
        state_names: What it keeps per parameter; see `is_count`.
        hyper_parameters: What every group holds.
        check_group: Checks the hyper-parameters of a group.

    Raises:
        ValueError: If the state is not a whole and sound state of this optimizer.
    """
    where = f"Cannot load the state into {name}"
    if not isinstance(saved, dict):
        raise ValueError(f"{where}: it is no dictionary, but {_short(saved)}.")
    if STATE_KEY not in saved:
        raise ValueError(f"Cannot load the state of a plain torch optimizer into {name}.")
    own = saved[STATE_KEY]
    if isinstance(own, dict) and own.get("optimizer", name) != name:
        raise ValueError(f"Cannot load the state of {_short(own['optimizer'])} into {name}.")
    for key, kind in (("state", dict), ("param_groups", list), (STATE_KEY, dict)):
        if not isinstance(saved.get(key), kind):
            raise ValueError(
                f"{where}: '{key}' must be a {kind.__name__}, got {_short(saved.get(key))}."
            )
    _check_own(own, name)
    groups = saved["param_groups"]
    for number, group in enumerate(groups):
        _check_one_group(f"{where}: parameter group {number}", group, hyper_parameters, check_group)
    ids = [index for group in groups for index in group["params"]]
    numbered = len(set(ids)) == len(ids) and set(saved["state"]) <= set(ids)
    if len(ids) == len(params) and not numbered:
        raise ValueError(
            f"{where}: 'state' and 'param_groups' do not number the parameters alike. The state is "
            "damaged, or was put together by hand."
        )
    if state_names and own["steps_done"] > 0 and ids and not saved["state"]:
        raise ValueError(
            f"{where}: it has taken {own['steps_done']} steps, but 'state' is empty. The state is "
            "cut off."
        )
    for index, p in zip(ids, params, strict=False):
        if index in saved["state"]:
            _check_parameter_state(where, index, saved["state"][index], p, state_names)


def _check_own(own: dict[str, Any], name: str) -> None:
    missing = [key for key in ("version", "optimizer", "steps_done", "scalars") if key not in own]
    if missing:
        raise ValueError(f"Cannot load a truncated state into {name}: no {missing}.")
    where = f"Cannot load the state into {name}"
    version, steps, scalars = own["version"], own["steps_done"], own["scalars"]
    if not _is_count(version) or version < 1:
        raise ValueError(f"{where}: its version must be an integer >= 1, got {_short(version)}.")
    if version > STATE_VERSION:
        raise ValueError(
            f"Cannot load version {version} of the state of {name}: this release knows versions up "
            f"to {STATE_VERSION}. Update lightning-curvature."
        )
    if not _is_count(steps) or steps < 0:
        raise ValueError(f"{where}: steps_done must be an integer >= 0, got {_short(steps)}.")
    if not isinstance(scalars, dict):
        raise ValueError(f"{where}: 'scalars' must be a dict, got {_short(scalars)}.")
    for key, value in scalars.items():
        _check_tensor(f"{where}: scalar '{key}'", value, ())
    if version > 1 and "oracle" not in own:  # version 1 had none
        raise ValueError(f"Cannot load a truncated state into {name}: no ['oracle'].")
    _check_oracle(where, own.get("oracle", {}))
    _check_schedules(where, own.get("schedules", {}))


def _check_oracle(where: str, state: Any) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"{where}: 'oracle' must be a dict, got {_short(state)}.")
    if not state:
        return
    kinds = {
        "choice": str,
        "method": (str, NoneType),
        "tried": list,
        "gradient_differs": bool,
        "asks": int,
        "sums": (Tensor, NoneType),
    }
    for key, kind in kinds.items():
        if key not in state or not isinstance(state[key], kind):  # type: ignore[arg-type]
            raise ValueError(f"{where}: '{key}' of 'oracle' is {_short(state.get(key))}.")
    for method in (state["method"], *state["tried"]):
        if method not in (None, "fd", "jvp"):
            raise ValueError(f"{where}: 'oracle' names the method {_short(method)}.")
    if state["sums"] is not None:
        _check_tensor(f"{where}: 'sums' of 'oracle'", state["sums"], (3,))


def _check_schedules(where: str, states: Any) -> None:
    known = isinstance(states, dict) and all(isinstance(state, dict) for state in states.values())
    if not known:
        raise ValueError(f"{where}: 'schedules' must be a dict of dicts, got {_short(states)}.")
    for name, state in states.items():
        for key, value in state.items():
            if not isinstance(value, (int, float, str, NoneType)):
                raise ValueError(f"{where}: '{key}' of schedule '{name}' is {_short(value)}.")


def _check_one_group(
    where: str,
    group: Any,
    hyper_parameters: Sequence[str],
    check_group: Callable[[dict[str, Any]], None],
) -> None:
    ids = group.get("params") if isinstance(group, dict) else None
    if not isinstance(ids, list) or not all(isinstance(index, (int, str)) for index in ids):
        raise ValueError(f"{where} must be a dict with a list 'params', got {_short(group)}.")
    missing = [key for key in hyper_parameters if key not in group]
    if missing:
        raise ValueError(f"{where} has no {', '.join(missing)}.")
    for key in hyper_parameters:
        if isinstance(group[key], Tensor):
            _check_tensor(f"{where}: {key}", group[key], ())
    numbers = {
        key: group[key].item() if isinstance(group[key], Tensor) else group[key]
        for key in hyper_parameters
    }
    lr = numbers["lr"]
    if isinstance(lr, (int, float)) and -_ROUNDING < lr < 0:
        numbers["lr"] = 0.0  # where a schedule ended
    try:
        check_group(numbers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _check_parameter_state(
    where: str, index: int, state: Any, p: Tensor, names: Sequence[str]
) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"{where}: the state of parameter {index} is {_short(state)}.")
    mask = state.get("mask")
    whole = (len(mask),) if isinstance(mask, Tensor) and mask.ndim == 1 else tuple(p.shape)
    for key in names if set(state) != {"mask"} else ():
        shape = () if is_count(key) else whole
        if key not in state:
            raise ValueError(f"{where}: parameter {index} has no '{key}'.")
        _check_tensor(f"{where}: '{key}' of parameter {index}", state[key], shape)


def _check_tensor(where: str, value: Any, shape: tuple[int, ...]) -> None:
    sound = (
        isinstance(value, Tensor)
        and value.dtype.is_floating_point
        and value.layout == torch.strided
        and value.device.type != "meta"
        and tuple(value.shape) == shape
    )
    if not sound:
        raise ValueError(
            f"{where} must be a tensor of real numbers of shape {list(shape)}, got {_short(value)}."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    """Describe a value in a few words."""
    if isinstance(value, Tensor):
        if value.numel() == 1 and value.device.type != "meta" and value.ndim == 0:
            return f"{value.item()} ({str(value.dtype).removeprefix('torch.')})"
        kind = str(value.dtype).removeprefix("torch.")
        return f"a {kind} tensor of shape {list(value.shape)} on {value.device}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"  # noqa: PLR2004
