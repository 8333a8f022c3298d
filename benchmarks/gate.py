"""The gate in front of every benchmark: loss and gradients against fp64. Ours are held to naive PyTorch's errors, or
nothing is timed; a peer that fails or computes something else is left out, with the reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .measure import reason
from .objective import KTO, OBJECTIVES, Objective
from .peers import NAIVE

DIFFERS = 1e-2  # of the truth, on top of naive PyTorch's own error: a peer beyond that computes something else
LOGPS = "token log-probs"
ALIKE = 1.1  # theirs: the same roundings, by GEMMs of other shapes, which may split their sums (1.0001 on a CPU)
CHANCE = 2.0  # standard deviations
Errors = dict[str, float]


@torch.enable_grad()
def true_loss_and_slopes(
    log_ratios: Tensor, desirable: Tensor, objective: Objective = OBJECTIVES[KTO]
) -> tuple[Tensor, Tensor]:
    """The mean loss, and its derivative with respect to each sequence's log-ratio (B,), in fp64."""
    leaf = log_ratios.detach().requires_grad_()
    loss = objective.loss(leaf, desirable)
    (slopes,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), slopes


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def admit(
    variants: dict[str, Callable],  # with naive PyTorch among them
    mine: Iterable[str],
    run: Callable[[Callable], object],
    errors_of: Callable[[object], Errors],
    scale: Errors,  # of the truth
    slack: float = 1.001,
    cap: float | None = None,
    spread: float = 0.0,  # of the loss, for errors of 1 of either sign in the token log-probabilities
) -> tuple[dict[str, Errors], dict[str, str]]:
    """Runs every variant once. Returns the errors of those that did, and why which peers are not to be timed: they
    failed, differ, or take more than `cap` seconds even at the second call."""
    mine, errors, absent = list(mine), {}, {}
    for name, variant in variants.items():
        try:
            start = time.perf_counter()
            result = run(variant)
            first = time.perf_counter() - start
            errors[name] = errors_of(result)
            del result
            if cap is not None and name not in mine and first > cap:  # it may have been compiled
                start = time.perf_counter()
                run(variant)
                again = time.perf_counter() - start
                if again > cap:
                    absent[name] = f"not run: {again:.0f} s a call, over the cap of {cap:.0f} s"
        except Exception as error:  # whatever a peer raises
            if name in mine:
                raise
            absent[name] = f"fails: {reason(error)}"
        if name in absent and torch.cuda.is_available():
            torch.cuda.empty_cache()
    naive = next((errors[name] for name in errors if name.startswith(NAIVE)), None)
    if naive is None:
        raise SystemExit(f"gate: naive PyTorch fails ({absent[NAIVE]}): there is nothing to hold ours to")
    hold(errors, naive, mine, slack, spread)
    for name in errors.keys() - {*mine, *absent, NAIVE}:
        for what, error in errors[name].items():
            if not error <= DIFFERS * scale[what] + 2 * naive[what]:
                absent[name] = f"differs from fp64: {what} by {error:.1e} of {scale[what]:.1e}"
    return errors, absent


def hold(errors: dict[str, Errors], naive: Errors, mine: Iterable[str], slack: float, spread: float = 0.0) -> None:
    """Stops the run where an error of one of `mine` is larger than naive PyTorch's times `slack`.

    The loss is one number, which naive PyTorch may hit by luck: what chance makes of errors like those of its token
    log-probabilities is allowed besides. The log-probabilities are many, and the sharper test."""
    chance = CHANCE * spread * naive.get(LOGPS, 0.0) + torch.finfo(torch.float32).eps
    for name in mine:
        for what, error in errors[name].items():
            allowed = (ALIKE if what == LOGPS else slack) * naive[what] + (chance if what == "loss" else 0.0)
            if not error <= allowed:
                raise SystemExit(f"gate: {name}, {what}: error {error:.3e} > {allowed:.3e}; nothing was timed")
