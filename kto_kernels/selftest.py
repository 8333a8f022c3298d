"""The last line of `python -m kto_kernels`: a small loss, forward and backward, on every backend that runs here, from
logits and from hidden states, against the definition in fp64 (`kto_kernels.reference`, differentiated by autograd)."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from . import reference
from .backends import available_backends
from .loss import kto_loss, linear_kto_loss

# How far a result may be from the exact one, in units of the largest exact value. Zeros in its place would be off by 1.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02}
BATCH, TOKENS, VOCAB, WIDTH = 3, 5, 259, 24  # a vocabulary that no vector divides
BETA = 0.1


def self_test() -> tuple[bool, str]:
    """Whether everything is right, and one line that says so or names all that is wrong."""
    started = time.perf_counter()
    passed, wrong = [], []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        names = [name for name, reason in available_backends(device).items() if reason is None]
        passed.append(f"{', '.join(names)}{' on a GPU' if device == 'cuda' else ''}")
        for name in names:
            # Triton compiles each kernel anew for each dtype, which takes its time, and so does its interpreter.
            for dtype in [torch.float32] if name == "triton" else TOLERANCES:
                for function in ("kto_loss", "linear_kto_loss"):
                    fault = check(function, name, device, dtype)
                    if fault:
                        wrong.append(f"backend {name!r} on {device}, {function}, {str(dtype)[6:]}: {fault}")
    if wrong:
        return False, f"self-test: FAILED: {'; '.join(wrong)}"
    return True, f"self-test: passed on {', '.join(passed)} ({time.perf_counter() - started:.1f} s)"


def check(function: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """The fault in the results of a function on a backend; None where there is none."""
    given = inputs(dtype)
    widened = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    expected = exact(function, widened)
    try:
        found = results(function, backend, {name: tensor.to(device) for name, tensor in given.items()})
        found = {name: tensor.double().cpu() for name, tensor in found.items()}
    except Exception as error:  # whatever it is, it is the answer to "does it work here?"
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    faults = []
    for name, right in expected.items():
        off = ((found[name] - right).abs().max() / right.abs().max()).item()
        if not off <= TOLERANCES[dtype]:  # NaN is no small number
            faults.append(f"{name} is off by {off:.2g} of its largest value (allowed: {TOLERANCES[dtype]:.2g})")
    return ", ".join(faults) or None


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits, and hidden states of a head `weight`, of policy, reference and mismatched completions. The reference is near
    the policy, so that no sigmoid saturates, and less sure of the mismatched labels, so that the KL is not 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels, kl_labels = torch.randint(VOCAB, (2, BATCH, TOKENS), generator=generator)
    labels[0, :3] = -100
    weight = normal(VOCAB, WIDTH) / WIDTH**0.5
    found = {"weight": weight}
    for kind, towards in (("logits", torch.eye(VOCAB)), ("hidden", weight)):  # what makes each label likelier
        size = (BATCH, TOKENS, towards.shape[1])
        found[kind], found[f"kl_{kind}"] = 2 * normal(*size), 2 * normal(*size)
        found[f"ref_{kind}"] = found[kind] + 0.2 * normal(*size)
        found[f"ref_kl_{kind}"] = found[f"kl_{kind}"] - 0.5 * towards[kl_labels.roll(-1, -1)]
    found = {name: tensor.to(dtype) for name, tensor in found.items()}
    return found | {"labels": labels, "kl_labels": kl_labels, "desirable": torch.arange(BATCH) % 2 == 0}


def results(function: str, backend: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, the numbers behind it, and the gradients of what the policy has."""
    kind = "logits" if function == "kto_loss" else "hidden"
    names = ("labels", "desirable", f"ref_{kind}", f"kl_{kind}", f"ref_kl_{kind}", "kl_labels")
    options = {name: given[name] for name in names} | {"beta": BETA, "shift": True, "backend": backend}
    policy, weight = given[kind].requires_grad_(), given["weight"].requires_grad_()
    if function == "kto_loss":
        out = kto_loss(policy, **options)
        return named(out.loss, out.logps, out.ref_logps, out.kl, logits=policy)
    out = linear_kto_loss(policy, weight, ref_weight=weight.detach(), **options)
    return named(out.loss, out.logps, out.ref_logps, out.kl, hidden=policy, weight=weight)


def exact(function: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by the definition."""
    kind = "logits" if function == "kto_loss" else "hidden"
    policy, weight = given[kind].requires_grad_(), given["weight"].requires_grad_()

    def logps(side: Tensor, labels: Tensor, head: Tensor) -> Tensor:
        logits = side if kind == "logits" else side @ head.T
        return reference.sequence_logps(reference.token_logps(logits, reference.targets(labels, True, -100)))

    kl_labels, frozen = given["kl_labels"], weight.detach()
    kl_logps, ref_kl_logps = (logps(given[f"{side}_{kind}"], kl_labels, frozen) for side in ("kl", "ref_kl"))
    kl = reference.kl_reference_point(kl_logps, ref_kl_logps)
    mine, ref = logps(policy, given["labels"], weight), logps(given[f"ref_{kind}"], given["labels"], frozen)
    loss = reference.loss(reference.log_ratio(mine, ref), kl, given["desirable"], BETA, (1.0, 1.0)).mean()
    leaves = {"logits": policy} if kind == "logits" else {"hidden": policy, "weight": weight}
    return named(loss, mine, ref, kl, **leaves)


def named(loss: Tensor, logps: Tensor, ref_logps: Tensor, kl: Tensor, **leaves: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    found = {"loss": loss, "logps": logps, "ref_logps": ref_logps, "kl": kl}
    found |= {f"the gradient of {name}": gradient for name, gradient in zip(leaves, gradients)}
    return {name: tensor.detach() for name, tensor in found.items()}
