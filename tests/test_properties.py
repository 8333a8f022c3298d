"""Every public function on random inputs, on every backend, against fp64: the error is at most 1.5 times what plain
PyTorch makes in that dtype and one unit in the last place (of a token, a sequence, or the largest gradient of a row).

What is drawn, and how the bound is read, is in `cases`. `make fuzz` draws thousands of cases where `make test` draws
hundreds.
"""

import torch
from cases import explore, gradient_errors, in_units, loss_cases, token_cases, unit_of
from harness import DEFAULTS, exact_token_logps, places, plain, sequence_sums, upstream

from kto_kernels import kto_loss, reference, token_logps


@places
def test_token_logps(place, poisoned_memory):
    backend, device = place

    def measure(case):
        logits, labels, upstream = case.make(device)
        x, around = case.layout.place(logits, requires_grad=True)
        mine = token_logps(
            x, case.layout.place_labels(labels), inplace_backward=case.inplace, backend=backend, **case.options
        )
        upstream = upstream.to(mine.dtype)
        (grad,) = torch.autograd.grad(mine, x, upstream)
        assert (around() == 99).all()
        target = reference.targets(labels, case.shift, case.ignore_index)
        options = {"ignore_index": case.ignore_index, "temperature": case.temperature}
        z = logits.double().requires_grad_()
        exact = exact_token_logps(z, target, **options)
        (exact_grad,) = torch.autograd.grad(exact, z, upstream.double())
        plain = reference.token_logps(logits, target, **options)
        plain_grad = reference.token_logps_grad(logits, target, upstream, **options)
        exact = exact.detach()
        return {
            "logps": in_units(mine.detach(), plain, exact, unit_of(mine.dtype) * exact.abs()),
            "gradient": gradient_errors(grad, plain_grad, exact_grad),
        }

    explore(place, lambda elements: token_cases(elements, backend), measure)


def units_of_loss(p, exact, dtype):
    """One unit of each output, and what it makes of the gradient, relative to that: token log-probabilities are rounded
    to `dtype`, so that a sequence's is off by a unit of itself, `x = β(r − z0)` by a δ that follows, and the loss
    λ·σ(−x) and its derivative by a factor of e^δ at most."""
    eps, smallest = unit_of(dtype), torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps

    def size(sums):
        return 0.0 if sums is None else sums.double().abs().nan_to_num(0.0, 0.0, 0.0)

    sums = eps * (size(exact["logps"]) + size(exact["ref_logps"]))
    kl = eps * exact["kl"].nan_to_num(0.0, 0.0, 0.0)
    kl_sides = [
        sequence_sums(p, side, p.tensors.get(f"{side}logits"), exact_token_logps) for side in ("kl_", "ref_kl_")
    ]
    if kl_sides[0] is not None and kl_sides[0].numel():
        kl = kl + eps * sum(size(side) for side in kl_sides).mean()
    options = DEFAULTS | p.options
    slack = torch.expm1(options["beta"] * (sums + kl))
    losses = reference.loss(
        reference.log_ratio(exact["logps"], exact["ref_logps"]),
        exact["kl"],
        p.desirable,
        options["beta"],
        (options["desirable_weight"], options["undesirable_weight"]),
    )
    units = {
        "loss": reference.reduce(losses * (eps + slack), options["reduction"]) + smallest,
        "logps": eps * size(exact["logps"]),
        "ref_logps": eps * size(exact["ref_logps"]),
        "rewards": options["beta"] * sums + smallest,
        "kl": kl,
    }
    return units, slack


@places
def test_kto_loss(place, poisoned_memory):
    backend, device = place

    def measure(case):
        p = case.make(device)
        placed = {name: case.layout.place(t)[0] if name.endswith("logits") else t for name, t in p.tensors.items()}
        x, around = case.layout.place(p.logits, requires_grad=True)
        out = kto_loss(x, p.labels, p.desirable, **placed, **p.options, inplace_backward=case.inplace, backend=backend)
        (grad,) = torch.autograd.grad(upstream(out.loss), x)
        assert (around() == 99).all()
        assert all(torch.isfinite(torch.tensor(v)) for k, v in out.metrics().items() if k == "loss")
        wide = p.to(torch.float64, device)
        exact, exact_grad = plain(wide, exact_token_logps)
        rounded, rounded_grad = plain(p)
        unit, slack = units_of_loss(wide, exact, out.loss.dtype)
        errors = {name: in_units(getattr(out, name).detach(), rounded[name], exact[name], unit[name]) for name in exact}
        if "cu_seqlens" in p.tensors:
            slack = slack.repeat_interleave(p.tensors["cu_seqlens"].diff(), output_size=len(p.logits))
        errors["gradient"] = gradient_errors(grad, rounded_grad, exact_grad, slack)
        return errors

    explore(place, lambda elements: loss_cases(elements, backend), measure)
