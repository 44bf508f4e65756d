"""One optimiser a level, each on its own token clock: the streaming form of a continuum memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from everlearn.errors import InvalidArgument
from everlearn.levels import Clock, Level, OptimizerFactory, adamw
from everlearn.optim.base import Params, check_range


class MultiFrequency(Optimizer):
    """Steps each level with its own optimiser at the end of its period, on the gradients accumulated since (Eq. 71).

    A group names its level by ``level: Level`` or by ``every: int`` (a period in tokens), and may set its own ``lr``
    and any other option of its optimiser (the ``rule`` of :func:`everlearn.optim.param_groups` among them).
    ``step(tokens=n)`` says that the gradients at hand came from ``n`` further tokens: they are added to each level's
    sum and set to None, and the levels whose period ended within these tokens are updated, once each. A level with
    ``every=None`` only accumulates. ``param_groups`` are those of the levels' optimisers, so schedulers reach them.

    Args:
        params: parameters or groups; those that name no level are updated at each step.
        lr: rate of groups that set none; by default that of their optimiser.
        optimizer: ``params -> Optimizer`` for groups given by ``every``: any torch optimiser.
        tokens_per_step: tokens that a plain ``step()`` counts.
        reduction: ``"sum"`` hands a level the sum of its gradients, ``"mean"`` their mean over the steps.

    Raises:
        InvalidArgument: a group that names a level badly, a number out of range, or an unknown reduction.
    """

    def __init__(
        self,
        params: Params,
        lr: float | None = None,
        *,
        optimizer: OptimizerFactory = adamw,
        tokens_per_step: int = 1,
        reduction: str = "sum",
    ) -> None:
        check_range("tokens_per_step", tokens_per_step, 1)
        check_range("lr", 0.0 if lr is None else lr, 0.0)
        if reduction not in ("sum", "mean"):
            raise InvalidArgument(f"reduction: got {reduction!r}, expected 'sum' or 'mean'")
        self.tokens_per_step, self.reduction = tokens_per_step, reduction
        self.optimizers: list[Optimizer] = []
        self._factory, self._lr, self._levels = optimizer, lr, []
        super().__init__(cast(Any, params), {})
        self.clock = Clock(self._levels)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a level; only at construction, since the clock counts a fixed set of levels."""
        if hasattr(self, "clock"):
            raise InvalidArgument("param_group: got a new group, expected all levels to be given at construction")
        group = dict(param_group)
        params, level, every = group.pop("params"), group.pop("level", None), group.pop("every", 1)
        if level is None:
            level = Level(f"level{len(self._levels)}", every, optimizer=self._factory)
        if not isinstance(level, Level):
            raise InvalidArgument(f"level: got {level!r}, expected a Level")
        rate = group.pop("lr", self._lr)
        params = [params] if isinstance(params, Tensor) else list(params)
        inner = level.optimizer(cast(Any, [{"params": params, **group}] if group else params))
        for inner_group in inner.param_groups:
            inner_group.update({} if rate is None else {"lr": rate}, level=level.name, every=level.every)
            self._adopt(inner_group)
        self._levels.append(level)
        self.optimizers.append(inner)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, tokens: int | None = None) -> Any:
        """Count ``tokens``, take in their gradients, and update the levels that are due; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        met = self.clock.advance(self.tokens_per_step if tokens is None else tokens)
        due = {level.name for boundary in met for level in boundary.due}
        for level, inner in zip(self._levels, self.optimizers):
            params = [p for group in inner.param_groups for p in group["params"]]
            for p in params:
                self._accumulate(p)
            if level.name in due:
                for p in params:
                    p.grad = self._release(p)
                inner.step()
                for p in params:
                    p.grad = None
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of gradients, the clock and the state of each level's optimiser."""
        return {
            **super().state_dict(),
            "clock": self.clock.state_dict(),
            "optimizers": [inner.state_dict() for inner in self.optimizers],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken, in the middle of a period too.

        Raises:
            InvalidArgument: the state is that of another optimiser, or of other levels.
        """
        inners = state_dict.get("optimizers", ())
        if "clock" not in state_dict or len(inners) != len(self.optimizers):
            raise InvalidArgument(f"state_dict: got {len(inners)} levels, expected {len(self.optimizers)}")
        self.clock.load_state_dict(state_dict["clock"])
        super().load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        for inner, state in zip(self.optimizers, inners):
            inner.load_state_dict(state)
        self.param_groups = [group for inner in self.optimizers for group in inner.param_groups]

    def _adopt(self, group: dict[str, Any]) -> None:
        seen = {p for other in self.param_groups for p in other["params"]}
        if not seen.isdisjoint(group["params"]):
            raise InvalidArgument("params: got a parameter in two levels, expected each in one")
        self.param_groups.append(group)

    def _accumulate(self, p: Tensor) -> None:
        if p.grad is None:
            return
        state = self.state[p]
        if state.get("steps"):
            state["gradient"] += p.grad
        else:
            state["gradient"], state["steps"] = p.grad.clone(), 0
        state["steps"] += 1
        p.grad = None

    def _release(self, p: Tensor) -> Tensor | None:
        if not self.state.get(p):
            return None
        state = self.state.pop(p)
        return state["gradient"] / state["steps"] if self.reduction == "mean" else state["gradient"]
