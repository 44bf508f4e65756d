"""Delta gradient descent: each linear layer forgets along its inputs before it learns from them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from everlearn.errors import InvalidArgument
from everlearn.ops.updates import dgd_step
from everlearn.optim.base import ADAMW, ADAMW_LR, MATRIX, MatrixOptimizer
from everlearn.optim.groups import param_groups


class _Inputs:
    """The sum of ``x x^T`` and the number of the inputs whose outputs got a gradient, since the last step."""

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed
        self.gram: Tensor | None = None
        self.count = 0
        self.used = False

    def clear(self) -> None:
        self.gram, self.count, self.used = None, 0, False

    def add(self, inputs: Tensor, errors: Tensor) -> None:
        if self.used:
            self.clear()
        x = inputs.reshape(-1, inputs.shape[-1])[errors.reshape(-1, errors.shape[-1]).ne(0).any(-1)]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        gram = x.mT @ x
        self.gram = gram if self.gram is None else self.gram + gram
        self.count += len(x)


class DGD(MatrixOptimizer):
    """Delta gradient descent (Eq. 56-57, App. C) of all linear layers of a module; AdamW for the rest.

    See :func:`everlearn.ops.updates.dgd_step`. Linear layers are ``nn.Linear`` and GPT-2's ``Conv1D``, whose weight is
    the transposed matrix. Hooks on them see, in each backward pass, the inputs whose outputs got a gradient, and keep
    only the sum of ``x x^T``; like gradients these sums are not part of the state dict, add up over several backward
    passes, and are cleared by ``zero_grad`` or by the first backward pass after a step. Under data parallelism each
    process sees its own inputs only. A layer whose weight is used without calling it cannot be watched: the module that
    owns it names it in ``fused_linears``, as HOPE's memories do, and it gets AdamW.

    Args:
        module: the module to train; which of its weights are matrices: :func:`everlearn.optim.param_groups`.
        lr: rate eta of the proximal problem; no rate diverges, a large one forgets along its inputs.
        reduction: ``"mean"`` where the loss is a mean over tokens, ``"sum"`` where it is a sum.
        weight_decay: decoupled.
        adamw_lr: rate of vectors, embeddings, heads and matrices that are not weights of linear layers.

    Raises:
        InvalidArgument: not a module, a number out of range, or an unknown reduction.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 0.1,
        *,
        reduction: str = "mean",
        weight_decay: float = 0.0,
        adamw_lr: float = ADAMW_LR,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise InvalidArgument(f"module: got {type(module).__name__}, expected an nn.Module (DGD sees its inputs)")
        if reduction not in ("mean", "sum"):
            raise InvalidArgument(f"reduction: got {reduction!r}, expected 'mean' or 'sum'")
        fused = {getattr(owner, name) for owner in module.modules() for name in getattr(owner, "fused_linears", ())}
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear) or _is_conv1d(layer)]
        layers = [layer for layer in layers if layer not in fused]
        linear = {cast(Tensor, layer.weight): _is_conv1d(layer) for layer in layers}
        groups = []
        for group in param_groups(module):
            watched = [p for p in group["params"] if group["rule"] == ADAMW or p in linear]
            groups.append({**group, "params": watched})
            others = [p for p in group["params"] if group["rule"] == MATRIX and p not in linear]
            groups.append({"params": others, "rule": ADAMW})
        self._inputs: dict[Tensor, _Inputs] = {}
        options = {"lr": lr, "reduction": reduction, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], options, adamw_lr)
        matrices = [p for group in self.param_groups if group["rule"] == MATRIX for p in group["params"]]
        self._inputs = {p: _Inputs(linear[p]) for p in matrices}
        self._hooks = [layer.register_forward_hook(self._watch) for layer in layers if layer.weight in self._inputs]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and the inputs that belong to them."""
        super().zero_grad(set_to_none)
        for inputs in self._inputs.values():
            inputs.clear()

    def remove_hooks(self) -> None:
        """Stop watching the module; the optimiser cannot step its linear layers any more."""
        for hook in self._hooks:
            hook.remove()

    def _watch(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            x, seen = args[0].detach(), self._inputs[cast(Tensor, layer.weight)]
            output.register_hook(lambda errors: seen.add(x, errors))

    def _step_matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            seen = self._inputs[p]
            if seen.gram is None:
                raise InvalidArgument(
                    "module: a linear layer's weight has a gradient but its inputs were not seen, expected the backward"
                    " pass to follow a call of the layer (or its owner to name it in fused_linears)"
                )
            gram = seen.gram / max(1, seen.count) if group["reduction"] == "mean" else seen.gram
            if group["weight_decay"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            weight, gradient = p, cast(Tensor, p.grad)
            if seen.transposed:
                weight, gradient = weight.mT, gradient.mT
            weight.copy_(dgd_step(weight, gradient, gram, eta=group["lr"]))
            seen.used = True


def _is_conv1d(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
