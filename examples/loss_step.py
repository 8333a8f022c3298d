"""The loss step of the demo beside the same loss in plain PyTorch: time, memory, and how far the two are apart."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from feedback_data import IGNORE
from torch import Tensor

from kto_kernels import kto_loss


def naive_kto_loss(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    desirable: Tensor,  # (B,)
    ref_logps: Tensor,  # (B,)
    kl_logps: Tensor,  # (K,)
    ref_kl_logps: Tensor,  # (K,)
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """The same loss in plain PyTorch, as trainers write it."""
    targets = labels.roll(-1, dims=1)
    targets[:, -1] = IGNORE
    scored = targets != IGNORE
    index = targets.masked_fill(~scored, 0).unsqueeze(-1)
    logps = logits.float().log_softmax(-1).gather(-1, index).squeeze(-1)
    r = (logps * scored).sum(-1) - ref_logps.float()
    kl = (kl_logps - ref_kl_logps).float().mean().clamp(min=0)
    chosen = desirable_weight * (1 - torch.sigmoid(beta * (r - kl)))
    rejected = undesirable_weight * (1 - torch.sigmoid(beta * (kl - r)))
    return torch.where(desirable, chosen, rejected).mean()


def seconds_and_result(
    step: Callable[[], tuple[Tensor, Tensor]], device: torch.device
) -> tuple[float, tuple[Tensor, Tensor]]:
    """Runs `step` once."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = step()
    wait()
    return time.perf_counter() - start, result


def resident_bytes(key: str) -> int:
    """A figure of this process out of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak_extra_bytes(step: Callable[[], tuple[Tensor, Tensor]], device: torch.device) -> int | None:
    """Runs `step` once: how far memory rose above what was in use before, at its highest.

    On a GPU as PyTorch's allocator counts it. On a CPU it is the peak of the process's resident memory (exact to some
    0.1 MB), which Linux keeps and lets the process itself reset; None on other systems.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return None
    # Free heap goes back to the system first: a step that took it up again would seem to need no memory.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = resident_bytes("VmRSS")
    step()
    return max(0, resident_bytes("VmHWM") - before)


def compare_loss_step(
    logits: Tensor,  # (B, T, V)
    labels: Tensor,  # (B, T)
    desirable: Tensor,  # (B,)
    sources: dict[str, Tensor],  # ref_logps, kl_logps and ref_kl_logps, as kto_loss takes them
    options: dict[str, float],
    runs: int = 9,
) -> dict:
    """Loss and gradient from one batch's logits, by `kto_loss` in place and by plain PyTorch: time and memory (medians
    of interleaved runs), the errors of both against fp64, and the difference between them."""

    def fused(logits: Tensor, **how) -> tuple[Tensor, Tensor]:
        out = kto_loss(logits, labels, desirable, shift=True, **sources, **options, **how)
        return out.loss, *torch.autograd.grad(out.loss, logits)

    def naive(logits: Tensor) -> tuple[Tensor, Tensor]:
        loss = naive_kto_loss(logits, labels, desirable, **sources, **options)
        return loss, *torch.autograd.grad(loss, logits)

    # `logits + zero` is like a model's output: not a leaf, and free to be overwritten.
    zero = torch.zeros((), device=logits.device, requires_grad=True)
    steps = {"kto_kernels": partial(fused, inplace_backward=True), "naive": naive}
    results, seconds, memory = {}, {name: [] for name in steps}, {name: [] for name in steps}
    for _ in range(runs):
        for name, step in steps.items():
            duration, results[name] = seconds_and_result(partial(step, logits + zero), logits.device)
            seconds[name].append(duration)
    for _ in range(3):
        for name, step in steps.items():
            memory[name].append(peak_extra_bytes(partial(step, logits + zero), logits.device))

    exact_loss, exact_grad = fused(logits.double() + zero, backend="torch")
    largest = exact_grad.abs().max().item()
    report = {"logits_shape": list(logits.shape), "logits_bytes": logits.nbytes}
    for name, (loss, grad) in results.items():
        report[name] = {
            "seconds": median(seconds[name]),
            "extra_bytes": None if None in memory[name] else median(memory[name]),
            "loss": loss.item(),
            "loss_error": abs(loss.item() - exact_loss.item()),
            "grad_error": (grad - exact_grad).abs().max().item() / largest,
        }
    (loss, grad), (naive_loss, naive_grad) = results["kto_kernels"], results["naive"]
    difference = (grad - naive_grad).abs().max().item()
    return {
        **report,
        "loss_difference": abs(loss.item() - naive_loss.item()),
        "grad_max_abs_difference": difference,
        "grad_max_relative_difference": difference / largest,  # to the largest entry
    }
