"""The problems of `harness`, one GEMM earlier: hidden states and a head, with the definition through materialised
logits as the oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from kto_kernels import KTOOutput, linear_kto_loss
from tests.support.harness import Problem, assert_as_accurate, plain, upstream

VOCAB, WIDTH = 67, 24
HEAD = ("hidden", "weight", "bias")  # what may require grad


@dataclass
class LinearProblem:
    """Arguments of `linear_kto_loss`."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    desirable: Tensor
    tensors: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> LinearProblem:
        def move(tensor: Tensor, name: str = "hidden") -> Tensor:
            # Sequence log-probabilities and numbers keep their dtype.
            return tensor.to(device, dtype) if name.endswith(HEAD) else tensor.to(device)

        return replace(
            self,
            hidden=move(self.hidden),
            weight=move(self.weight),
            labels=self.labels.to(device),
            desirable=self.desirable.to(device),
            tensors={name: move(tensor, name) for name, tensor in self.tensors.items()},
        )


def linear_problem(
    lengths: tuple[int, ...] = (6, 3, 9, 0, 1),
    *,
    packed: bool = False,
    bias: bool = True,
    ref: str | None = "hidden",
    kl: str | None = "hidden",
    prompt: int = 2,
    vocab: int = VOCAB,
    width: int = WIDTH,
    ref_width: int = WIDTH + 8,  # at least `width`
    offset_dtype: torch.dtype = torch.int32,
    ignore_index: int = -100,
    **options,
) -> LinearProblem:
    """Sequences of `lengths` scored tokens behind a prompt that is not, the padded ones of equal length."""

    def side(lengths):
        rows = max(lengths, default=0) + prompt
        labels = torch.full((len(lengths), rows), ignore_index)
        for i, length in enumerate(lengths):
            labels[i, prompt : prompt + length] = torch.randint(vocab, (length,))
        hidden = torch.randn(len(lengths), rows, width)
        if not packed:
            return hidden, labels, None
        kept = torch.arange(rows) < torch.tensor(lengths).unsqueeze(-1) + prompt
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), kept.sum(-1).cumsum(0)])
        return hidden[kept], labels[kept], offsets.to(offset_dtype)

    tensors: dict[str, Tensor] = {}
    hidden, labels, offsets = side(lengths)
    if offsets is not None:
        tensors["cu_seqlens"] = offsets
    weight = torch.randn(vocab, width) * 0.5
    if bias:
        tensors["bias"] = torch.randn(vocab)
    count = len(lengths)
    if ref == "hidden":
        # Another width, so that the heads cannot be mixed up; near the policy, so that nothing saturates.
        extra = ref_width - width
        tensors["ref_hidden"] = torch.cat([hidden, 0.3 * torch.randn(*hidden.shape[:-1], extra)], -1)
        tensors["ref_weight"] = torch.cat([weight, 0.3 * torch.randn(vocab, extra)], -1)
        if bias:
            tensors["ref_bias"] = tensors["bias"] + 0.1 * torch.randn(vocab)
    elif ref == "logps":
        tensors["ref_logps"] = -3.0 * torch.tensor(lengths, dtype=torch.float32) - torch.rand(count)
    if kl == "hidden":
        tensors["kl_hidden"], tensors["kl_labels"], kl_offsets = side((4, 2, 5))
        if kl_offsets is not None:
            tensors["kl_cu_seqlens"] = kl_offsets
        if ref == "hidden":
            extra = ref_width - width
            rows = tensors["kl_hidden"].shape[:-1]
            tensors["ref_kl_hidden"] = torch.cat([tensors["kl_hidden"], 0.3 * torch.randn(*rows, extra)], -1)
        elif ref == "logps":
            tensors["ref_kl_logps"] = torch.full((3,), -30.0)  # far below: a positive estimate
    elif kl == "logps":
        tensors["kl_logps"] = -10 * torch.rand(3, dtype=torch.float64)
        if ref is not None:
            tensors["ref_kl_logps"] = tensors["kl_logps"] - 2
    elif kl == "number":
        options["kl"] = 0.4
    elif kl == "tensor":
        tensors["kl"] = torch.tensor(0.4)
    if ignore_index != -100:
        options["ignore_index"] = ignore_index
    return LinearProblem(hidden, weight, labels, torch.arange(count) % 3 != 1, tensors, options)


def linear_in_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: int | None) -> Tensor:
    """PyTorch's product with a single row is one or two digits less accurate than with several."""
    chunks = hidden.flatten(0, -2).split(rows or max(1, hidden.shape[:-1].numel()))
    return torch.cat([linear(chunk, weight, bias) for chunk in chunks]).view(*hidden.shape[:-1], len(weight))


def plain_linear(
    p: LinearProblem, trained: tuple[str, ...] = HEAD, chunk_rows: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Values and gradients by way of the logits, each step in the problem's own dtype, and the logits' gradient."""
    given, options = dict(p.tensors), dict(p.options)
    scale = {name: options.pop(name) for name in ("logit_scale", "softcap") if name in options}
    for name in ("max_logits_bytes", "long_sequences", "outputs"):
        options.pop(name, None)
    leaves = {"hidden": p.hidden, "weight": p.weight, "bias": given.pop("bias", None)}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    head, ref_head = (
        (leaves["weight"], leaves.get("bias")),
        (given.pop("ref_weight", None), given.pop("ref_bias", None)),
    )
    logits = linear_in_chunks(leaves["hidden"], *head, chunk_rows)
    for name, its_head in (("kl_", head), ("ref_", ref_head), ("ref_kl_", ref_head)):
        if f"{name}hidden" in given:
            given[f"{name}logits"] = linear(given.pop(f"{name}hidden"), *its_head).detach()
    values, grad = plain(Problem(logits, p.labels, p.desirable, given, options), **scale)
    wanted = [name for name in trained if name in leaves]
    return values, dict(zip(wanted, torch.autograd.grad(logits, [leaves[name] for name in wanted], grad))), grad


def ours_linear(
    p: LinearProblem, backend: str, trained: tuple[str, ...] = HEAD, **extra
) -> tuple[KTOOutput, dict[str, Tensor]]:
    tensors = dict(p.tensors)
    leaves = {"hidden": p.hidden, "weight": p.weight, "bias": tensors.pop("bias", None)}
    leaves = {name: leaf.detach().requires_grad_(name in trained) for name, leaf in leaves.items() if leaf is not None}
    out = linear_kto_loss(
        leaves["hidden"],
        leaves["weight"],
        p.labels,
        p.desirable,
        bias=leaves.get("bias"),
        **tensors,
        **p.options,
        **extra,
        backend=backend,
    )
    wanted = [name for name in trained if name in leaves]
    return out, dict(zip(wanted, torch.autograd.grad(upstream(out.loss), [leaves[name] for name in wanted])))


def largest_terms(hidden: Tensor, weight: Tensor, logits_grad: Tensor, factor: float) -> dict[str, float]:
    """For each gradient the largest sum of its terms without their signs, which is what is rounded where they cancel:
    `Σ_v |g_v W_v|` and so on. Each term is off by `factor` units of the dtype, and the K partial sums of PyTorch's GEMM
    by one of fp32 each, at random."""
    g, h = logits_grad.double().abs().flatten(0, -2), hidden.double().abs().flatten(0, -2)
    sums = {"hidden": g @ weight.double().abs(), "weight": g.t() @ h, "bias": g.sum(0)}
    rows, vocab = g.shape
    order = torch.finfo(torch.float32).eps / torch.finfo(hidden.dtype).eps
    partial = {"hidden": vocab**0.5 * order, "weight": rows**0.5 * order, "bias": rows**0.5 * order}
    return {name: (factor + partial[name]) * x.max().item() if x.numel() else 0.0 for name, x in sums.items()}


def check_linear(
    p: LinearProblem,
    place: tuple[str, str],
    dtype: torch.dtype,
    trained: tuple[str, ...] = HEAD,
    cancelling: bool = False,
    chunk_rows: int | None = None,
    **extra,
) -> KTOOutput:
    """Compares every value and gradient with fp64. The error of plain PyTorch is the yardstick; as both round the logits,
    not by the same sums, theirs is allowed for besides: half a unit of the largest logit for each token, at random.
    `cancelling`: the gradients may be sums of terms much larger than they are, and log-probabilities differences of
    logits much smaller than they are. `chunk_rows`: plain PyTorch projects so many rows at a time."""
    backend, device = place
    typed = p.to(dtype, device)
    exact, exact_grads, exact_logits_grad = plain_linear(typed.to(torch.float64, device), trained)
    rounded, rounded_grads, _ = plain_linear(typed, trained, chunk_rows)
    out, grads = ours_linear(typed, backend, trained, **extra)
    unit = torch.finfo(dtype).eps
    sides = [(typed.hidden, typed.weight, p.labels.numel() // max(1, len(p.desirable)))]
    if "kl_hidden" in typed.tensors:
        sides.append((typed.tensors["kl_hidden"], typed.weight, 5))  # tokens of the longest
    bias = typed.tensors["bias"].double() if "bias" in typed.tensors else None
    straight = p.options.get("logit_scale", 1.0) / p.options.get("temperature", 1.0)
    noise = 1.0
    for hidden, weight, tokens in sides:
        if hidden.numel():
            largest_logit = linear(hidden.double(), weight.double(), bias).abs().max().item()
            per_token = largest_logit * straight + (math.log(len(weight)) if cancelling else 0.0)
            noise = max(noise, per_token * max(1, tokens) ** 0.5)
    beta = p.options.get("beta", 0.1)
    size = {name: value.abs().max().item() if value.numel() else 0.0 for name, value in exact.items()}
    # Each sequence's sum is rounded in the last place of fp64, beside the noise of its terms; all results follow from it.
    noise += max(size["logps"], size["ref_logps"]) * torch.finfo(torch.float64).eps / unit
    largest = {"logps": noise, "ref_logps": noise, "kl": noise + size["kl"], "rewards": beta * noise + size["rewards"]}
    largest["loss"] = (1 + beta * noise) * size["loss"]
    for name, value in exact.items():
        assert_as_accurate(name, getattr(out, name), rounded[name], value, unit, largest[name])
    assert set(grads) == set(exact_grads)
    factor = 1 + (1 + beta) * noise
    terms = largest_terms(typed.hidden, typed.weight, exact_logits_grad, factor) if cancelling else {}
    for name, grad in grads.items():
        assert grad.dtype == dtype and grad.shape == exact_grads[name].shape
        largest = max(terms.get(name, 0.0), 4 * exact_grads[name].abs().amax().item() if grad.numel() else 0.0)
        assert_as_accurate(f"gradient of {name}", grad, rounded_grads[name], exact_grads[name], unit, largest)
    return out


def gemm_flops(run, *widths: int) -> int:
    """FLOPs of the matrix products that PyTorch really ran, by the profiler's record of their shapes. One dimension of
    such a product is the width of a head or among `widths`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run()
    total = 0
    for event in profile.events():
        if event.name not in ("aten::mm", "aten::addmm", "aten::addmm_"):
            continue
        (m, k), (k_, n) = event.input_shapes[:2] if event.name == "aten::mm" else event.input_shapes[1:3]
        assert k == k_
        if {WIDTH, WIDTH + 8, *widths} & {m, n, k}:  # a bias gradient is a vector's product
            total += 2 * m * n * k
    return total
