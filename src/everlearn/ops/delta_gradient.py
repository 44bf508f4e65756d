r"""A chunk of delta gradient descent into a matrix (Eq. 56-57), backward by hand; tokens run along the last axis.

For each token, with its input ``x``, output-gradient ``g``, rate ``eta`` and ``beta = eta / (1 + eta |x|^2)``:

    W_t = W_{t-1} (alpha_t I - beta_t x_t x_t^T) - beta_t g_t x_t^T  =  alpha_t W_{t-1} + beta_t p_t x_t^T

It is the recurrence of :mod:`everlearn.ops.delta_rule_chunk` with ``u_t = beta_t p_t``, transposed, ``F`` as there:

    P (I + A)^T = -(G + H diag(c_prev))        A = (D . X^T X) diag(beta),  H = W_0 X
    W_C = c_C W_0 + P diag(beta f) X^T

What a token writes is asked for by itself, because reads within the chunk need it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["clip_length", "delta_gradient_write"]


def delta_gradient_write(
    weight: Tensor, x: Tensor, grad: Tensor, held: Tensor, rate: Tensor, ratios: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write one chunk.

    Args:
        weight: ``W_0`` ``[N, ..., out, in]``.
        x: inputs ``[N, ..., in, C]``.
        grad: gradients by the outputs ``[N, ..., out, C]``; not kept for the backward.
        held: ``W_0 x`` ``[N, ..., out, C]``; the backward computes it again.
        rate: ``eta`` ``[N, C]``, shared by the axes between.
        ratios: ``decay_ratios`` of the chunk ``[N, C + 1, C + 1]``, shared likewise.

    Returns:
        ``P`` ``[N, ..., out, C]``, ``beta`` ``[N, ..., C]`` and ``W_C`` ``[N, ..., out, in]``.
    """
    between = (1,) * (weight.dim() - 3)
    rate = rate.view(rate.shape[0], *between, rate.shape[-1])
    ratios = ratios.view(ratios.shape[0], *between, *ratios.shape[-2:])
    run = _Write.apply if torch.is_grad_enabled() else _Write.forward
    return run(weight, x, grad, held, rate, ratios)  # type: ignore[return-value]


def clip_length(x: Tensor, limit: float) -> Tensor:
    """``x min(1, limit / |x|)`` along the features ``[..., d, C]``; it is what Huber's loss has for a gradient."""
    return (_Clip.apply if torch.is_grad_enabled() else _Clip.forward)(x, limit)[0]  # type: ignore[index]


class _Clip(torch.autograd.Function):
    """Keeps the result and the scale, which is an output too, so that the backward can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> tuple[Tensor, Tensor]:
        scale = torch.rsqrt(((x * x).sum(-2, keepdim=True) / limit**2).clamp(min=1.0))
        return x * scale, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.limit = inputs[1]
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        d_y, d_scale = grads
        # where it was cut, |y| = limit and d scale / d x = -scale^2 y / limit^2
        along = scale * ((y * d_y).sum(-2, keepdim=True) + scale * d_scale)
        return torch.addcmul(scale * d_y, y, torch.where(scale < 1, -along / ctx.limit**2, 0.0)), None


def _system(x: Tensor, rate: Tensor, ratios: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``1 / (1 + eta |x|^2)`` and ``beta`` ``[..., C]``, and ``D . X^T X`` ``[..., C, C]``."""
    damping = 1 / (1 + rate * (x * x).sum(-2))
    return damping, rate * damping, ratios[..., :-1, 1:] * (x.mT @ x)


class _Write(torch.autograd.Function):
    """Keeps ``W_0``, ``X`` and ``P``; the backward is made of differentiable operations, as in ``delta_rule_chunk``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, x: Tensor, grad: Tensor, held: Tensor, rate: Tensor, ratios: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, beta, decayed = _system(x, rate, ratios)
        p = torch.addcmul(grad, held, ratios[..., :-1, 0].unsqueeze(-2)).neg()
        if x.shape[-1] > 1:
            system = (decayed * beta.unsqueeze(-2)).mT
            p = torch.linalg.solve_triangular(system, p, upper=True, left=False, unitriangular=True)
        written = p @ ((beta * ratios[..., -1, 1:]).unsqueeze(-2) * x).mT
        return p, beta, torch.addcmul(written, weight, ratios[..., -1:, :1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        weight, x, _, _, rate, ratios = inputs
        ctx.save_for_backward(weight, x, rate, ratios, output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        weight, x, rate, ratios, p = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return _write_backward(weight, x, rate, ratios, p, *grads)


def _write_backward(
    weight: Tensor,
    x: Tensor,
    rate: Tensor,
    ratios: Tensor,
    p: Tensor,
    d_p: Tensor,
    d_beta: Tensor,
    d_after: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients by the inputs of :class:`_Write`; ``d_x`` is the gradient of the loss by ``x``, shapes as there."""
    damping, beta, decayed = _system(x, rate, ratios)
    keep_prev, to_end = ratios[..., :-1, 0], ratios[..., -1, 1:]
    # W_C = c_C W_0 + P diag(beta f) X^T
    by_x, strength = d_after @ x, (beta * to_end).unsqueeze(-2)
    d_strength = (p * by_x).sum(-2)
    d_x = (d_after.mT @ p) * strength
    d_kept = (d_after * weight).sum((-1, -2)).unsqueeze(-1)
    # P (I + A)^T = -(G + H diag(c_prev))
    d_held_back = torch.linalg.solve_triangular(
        decayed * beta.unsqueeze(-2), torch.addcmul(d_p, by_x, strength), upper=False, left=False, unitriangular=True
    )
    d_grad = -d_held_back
    d_system = d_grad.mT @ p
    d_beta = d_beta + to_end * d_strength + (d_system * decayed).sum(-2)
    d_decayed = d_system * beta.unsqueeze(-2)
    d_gram = d_decayed * ratios[..., :-1, 1:]
    d_prev = (d_grad * (weight @ x)).sum(-2).unsqueeze(-1)
    # beta = eta / (1 + eta |x|^2)
    d_x = torch.addcmul(d_x, x, (-2 * beta * beta * d_beta).unsqueeze(-2)) + x @ (d_gram + d_gram.mT)
    above = torch.cat((d_prev, d_decayed * (x.mT @ x)), dim=-1).sum_to_size(ratios[..., :-1, :].shape)
    last = torch.cat((d_kept, beta * d_strength), dim=-1).unsqueeze(-2).sum_to_size(ratios[..., -1:, :].shape)
    return (
        ratios[..., -1:, :1] * d_after,
        d_x,
        d_grad,
        d_grad * keep_prev.unsqueeze(-2),
        (d_beta * damping * damping).sum_to_size(rate.shape),
        torch.cat((above, last), dim=-2),
    )
