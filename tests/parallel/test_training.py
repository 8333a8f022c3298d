"""A model and its loss in one wrapped module, as examples/fsdp2_loop.py has them: under FSDP2 and DDP ten steps of two
processes end in the parameters of one process with the whole batch."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from kto_kernels import linear_token_logps, sequence_logps
from tests.support.rank_pool import device, distributed, group, pool
from tests.support.shard_harness import assert_near

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

transformers = pytest.importorskip("transformers")

pytestmark = distributed

STEPS, BATCH, MISMATCHED, TOKENS, VOCAB = 10, 8, 4, 7, 50
# Four sequences for each rank; three mismatched completions for the first, one for the second.
PARTS = [(slice(0, 4), slice(0, 3)), (slice(4, 8), slice(3, 4))]


def tiny(tied):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=tied, initializer_range=0.3, **size)
    return transformers.LlamaForCausalLM(config).to(device())


def with_loss(model, process_group):
    from fsdp2_loop import WithLoss

    return WithLoss(model, process_group, beta=0.5, desirable_weight=1.2)


def batches(model):
    """The arguments of `WithLoss` at each step; the reference is the model, moved a little."""
    generator = torch.Generator().manual_seed(1)
    reference = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.05)

    def completions(count):
        ids = torch.randint(VOCAB, (count, TOKENS), generator=generator).to(device())
        labels = ids.masked_fill(torch.arange(TOKENS, device=device()) < 3, -100)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)

    def logps(x):
        hidden = reference.base_model(x.input_ids, x.attention_mask).last_hidden_state
        return sequence_logps(linear_token_logps(hidden, reference.lm_head.weight, x.labels, shift=True))

    for _ in range(STEPS):
        own, mismatched = completions(BATCH), completions(MISMATCHED)
        desirable = (torch.rand(BATCH, generator=generator) < 0.6).to(device())
        yield own, mismatched, desirable, logps(own), logps(mismatched)


def part_of(batch, rank):
    own, mismatched, desirable, ref_logps, ref_kl_logps = batch
    sequences, others = PARTS[rank]
    parts = [
        SimpleNamespace(**{name: value[rows] for name, value in vars(x).items()})
        for x, rows in ((own, sequences), (mismatched, others))
    ]
    return *parts, desirable[sequences], ref_logps[sequences], ref_kl_logps[others]


def trained(module, data):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses, kls = [], []
    for batch in data:
        loss, out = module(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        kls.append(out.kl)
    return torch.stack(losses), torch.stack(kls)


def shard(module, mesh):
    from torch.distributed.fsdp import fully_shard

    for layer in module.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def ddp(module, mesh):
    return torch.nn.parallel.DistributedDataParallel(module, process_group=mesh.get_group())


WRAPPERS = {"FSDP2": shard, "DDP": ddp}


def same_as_one_process(rank, wrapper, tied):
    pair = group(0, 1)
    if rank > 1:
        return
    mesh = dist.DeviceMesh.from_group(pair, device().type)
    model = tiny(tied)
    data = list(batches(model))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    single = copy.deepcopy(model)
    losses, kls = trained(with_loss(single, None), data)
    assert (kls > 0).sum() > STEPS / 2  # its sum over the ranks matters

    mine, my_kls = trained(WRAPPERS[wrapper](with_loss(model, mesh), mesh), [part_of(b, rank) for b in data])
    dist.all_reduce(mine, group=pair)
    assert_near("losses", mine / 2, losses)
    assert_near("kl", my_kls, kls, ulps=256)
    expected = dict(single.named_parameters())
    for name, parameter in model.named_parameters():
        assert hasattr(parameter, "full_tensor") == (wrapper == "FSDP2")
        whole = parameter.full_tensor() if wrapper == "FSDP2" else parameter
        assert (whole - start[name]).abs().max() > 1e-3 * start[name].abs().max()
        assert_near(name, whole.detach(), expected[name].detach())


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ten_steps_of_two_processes_equal_one(wrapper, tied):
    pool().run(same_as_one_process, wrapper, tied, ranks=4)


def outside(rank):
    pair = group(0, 1)
    if rank > 1:
        return None
    mesh = dist.DeviceMesh.from_group(pair, device().type)
    model = tiny(tied=False)
    batch = part_of(next(batches(model)), rank)
    wrapped = ddp(with_loss(model, mesh), mesh)
    found = []
    for module in (wrapped.module, wrapped):
        module(*batch)[0].backward()
        found.append([p.grad.cpu() for p in model.parameters()])
        wrapped.zero_grad()
    return found


def test_a_loss_outside_of_the_wrapped_forward_is_not_reduced():
    """Why the example wraps model and loss as one: with DDP's own forward left out each process keeps its gradients."""
    first, second, *_ = pool().run(outside)
    assert not any(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first[1], second[1], strict=True))
