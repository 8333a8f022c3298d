"""Paired losses over the ranks of a group are those of one process."""

import pytest
import torch
import torch.distributed as dist

from kto_kernels import linear_preference_loss, preference_loss
from kto_kernels.objectives import DPO, IPO, ORPO
from tests.support.rank_pool import device, distributed, pool
from tests.support.shard_harness import assert_near

pytestmark = distributed

B, T, V, H = 8, 12, 41, 8
OBJECTIVES = {
    "nll": DPO(beta=0.3, nll_weight=0.7),
    "means": IPO(beta=0.3, length_normalised=True),
    "odds": ORPO(beta=0.3),
    "weights": DPO(beta=0.2, nll_weight=0.5),
}
objectives = pytest.mark.parametrize("name", OBJECTIVES)


def problem():
    labels = torch.randint(V, (B, T))
    for i in range(B):
        labels[i, : i + 2] = -100  # so that ranks have unequal numbers of tokens
    hidden, weight = torch.randn(B, T, H), torch.randn(V, H) / 3
    return [x.to(device()) for x in (hidden, weight, labels, -3.0 * torch.rand(B) * T)]


def by_token(name):
    """Weights, and the reference by token, whose log-ratios are clipped."""
    if name != "weights":
        return {}
    torch.manual_seed(1)
    given = {"token_weights": torch.rand(B, T), "ref_token_logps": -3 - torch.rand(B, T)}
    return {key: value.to(device()) for key, value in given.items()}


def loss(objective, hidden, weight, labels, ref_logps, linear=True, **options):
    given = {} if objective.reference_free or "ref_token_logps" in options else {"ref_logps": ref_logps}
    if "ref_token_logps" in options:
        options["humanline"] = (-0.5, 0.8)
    if linear:
        return linear_preference_loss(hidden, weight, labels, objective, **given, **options)
    return preference_loss(hidden @ weight.T, labels, objective, **given, **options)


def whole(name, linear):
    hidden, weight, labels, ref_logps = problem()
    hidden.requires_grad_(), weight.requires_grad_()
    out = loss(OBJECTIVES[name], hidden, weight, labels, ref_logps, linear, **by_token(name))
    out.loss.backward()
    return out, hidden, weight, labels, ref_logps


def one_pair_each(rank, name, linear):
    objective = OBJECTIVES[name]
    out, hidden, weight, labels, ref_logps = whole(name, linear)
    mine = torch.tensor([rank, rank + 4], device=device())
    h, w = hidden.detach()[mine].requires_grad_(), weight.detach().requires_grad_()
    part = loss(
        objective,
        h,
        w,
        labels[mine],
        ref_logps[mine],
        linear,
        process_group=dist.group.WORLD,
        **{key: value[mine] for key, value in by_token(name).items()},
    )
    part.loss.backward()
    # As data-parallel wrappers do, losses and gradients are averaged over ranks.
    for value, expected in ((part.loss.detach(), out.loss), (w.grad, weight.grad)):
        dist.all_reduce(value)
        assert_near(name, value / 4, expected.detach())
    assert_near(name, h.grad / 4, hidden.grad[mine])
    assert h.grad.abs().max() > 0


def some_columns_each(rank, name, linear):
    objective = OBJECTIVES[name]
    out, hidden, weight, labels, ref_logps = whole(name, linear)
    columns = slice((0, 10, 11, 30)[rank], (10, 11, 30, V)[rank])
    h, w = hidden.detach().requires_grad_(), weight.detach()[columns].requires_grad_()
    part = loss(objective, h, w, labels, ref_logps, linear, vocab_group=dist.group.WORLD, vocab=V, **by_token(name))
    part.loss.backward()
    assert_near(name, part.loss.detach(), out.loss.detach())
    assert_near(name, w.grad, weight.grad[columns])
    if not linear:  # through this rank's logits alone
        dist.all_reduce(h.grad)
    assert_near(name, h.grad, hidden.grad)


def some_tokens_each(rank, name, linear):
    objective = OBJECTIVES[name]
    out, hidden, weight, labels, ref_logps = whole(name, linear)
    tokens = slice(3 * rank, 3 * rank + 3)
    h, w = hidden.detach()[:, tokens].requires_grad_(), weight.detach().requires_grad_()
    part = loss(
        objective,
        h,
        w,
        labels[:, tokens],
        ref_logps,
        linear,
        context_group=dist.group.WORLD,
        **{key: value[:, tokens] for key, value in by_token(name).items()},
    )
    part.loss.backward()
    assert_near(name, part.loss.detach(), out.loss.detach())
    assert_near(name, h.grad, hidden.grad[:, tokens])
    dist.all_reduce(w.grad)
    assert_near(name, w.grad, weight.grad)


@objectives
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden states"])
@pytest.mark.parametrize("group", [one_pair_each, some_columns_each, some_tokens_each], ids=lambda f: f.__name__)
def test_a_paired_loss_over_ranks_is_that_of_one_process(group, linear, name):
    pool().run(group, name, linear)


def another_objective(rank):
    hidden, weight, labels, ref_logps = problem()
    try:
        loss(DPO(0.1 if rank else 0.2), hidden, weight, labels, ref_logps, process_group=dist.group.WORLD)
    except RuntimeError as error:
        return str(error)


def test_ranks_with_different_objectives_are_an_error_on_every_rank():
    assert all("objective.beta" in (message or "") for message in pool().run(another_objective))
