"""`scored_lengths` and `kl_scored_lengths`: the numbers of scored positions, from the caller. With them nothing waits for
the device; without them one read waits, whatever is scored. No value of them reads outside of a tensor."""

import functools
import itertools
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kto_kernels import (
    KTOLoss,
    LinearKTOLoss,
    checks,
    linear_kto_loss,
    linear_preference_loss,
    linear_token_logps,
    objectives,
    sequence_logps,
)
from kto_kernels.backends.triton import launch
from kto_kernels.ops.schema import Operator
from tests.losses.test_operators_numbers import graphs

B, K, T, H, V = 4, 2, 7, 8, 13
OFFSETS, KL_OFFSETS = torch.tensor([0, 7, 7, 20, 28]), torch.tensor([0, 6, 14])
CHUNKS = {"one chunk": {}, "deferred": {"long_sequences": "defer"}, "recomputed": {"long_sequences": "recompute"}}
TRAINED = {"frozen": ("hidden",), "trained": ("hidden", "weight", "bias"), "nothing": ()}


def tensors(packed: bool, dtype=torch.float32, seed=0) -> dict:
    """The arguments of a call with all four sides."""
    torch.manual_seed(seed)
    labels, kl_labels = torch.randint(V, (B, T)), torch.randint(V, (K, T))
    labels[0, :3], labels[2], kl_labels[1, ::2] = -100, -100, -100

    def states(of, width):
        return torch.randn(*of.shape, width).to(dtype)

    given = {"hidden": states(labels, H), "weight": torch.randn(V, H).to(dtype), "bias": torch.randn(V).to(dtype)}
    given |= {"ref_hidden": states(labels, H + 1), "ref_weight": torch.randn(V, H + 1).to(dtype)}
    given |= {"kl_hidden": states(kl_labels, H), "ref_kl_hidden": states(kl_labels, H + 1)}
    if packed:
        given = {name: x.flatten(0, 1) if x.dim() == 3 else x for name, x in given.items()}
        given |= {"cu_seqlens": OFFSETS, "kl_cu_seqlens": KL_OFFSETS}
        labels, kl_labels = labels.flatten(), kl_labels.flatten()
    return given | {"labels": labels, "kl_labels": kl_labels, "desirable": torch.arange(B) % 2 == 0}


def count(labels, offsets, shift) -> list[int]:
    """The scored positions of each sequence, one label at a time."""
    ends = map(int, offsets) if offsets is not None else range(0, labels.numel() + 1, labels.shape[-1])
    sequences = [labels.flatten()[a:b] for a, b in itertools.pairwise(ends)]
    return [int((sequence[1 if shift else 0 :] != -100).sum()) for sequence in sequences]


def lengths_of(given, shift=False) -> dict[str, list[int]]:
    return {
        f"{prefix}scored_lengths": count(given[f"{prefix}labels"], given.get(f"{prefix}cu_seqlens"), shift)
        for prefix in ("", "kl_")
    }


def options_of(chunks, dtype=torch.float32, shift=False) -> dict:
    limit = None if chunks == "one chunk" else 3 * V * dtype.itemsize
    return {"backend": "torch", "max_logits_bytes": limit, "beta": 0.3, "shift": shift, **CHUNKS[chunks]}


def results(given, trained, **options) -> list[torch.Tensor]:
    given = given | {name: given[name].clone().requires_grad_() for name in trained}
    out = linear_kto_loss(**given, **options)
    gradients = torch.autograd.grad(out.loss, [given[name] for name in trained]) if trained else ()
    return [out.loss.detach(), out.logps, out.kl, out.token_logps, *gradients]


@pytest.fixture
def device(monkeypatch):
    """The CPU's tensors count as a device's, which the host does not look into. Returns the list of all reads."""
    reads: list[torch.Size] = []
    own = torch.Tensor.cpu
    monkeypatch.setattr(checks, "readable", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (reads.append(self.shape), own(self))[1])
    return reads


# The same results ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("trained", TRAINED)
def test_the_same_bits_with_and_without(trained, chunks, packed, shift):
    given, options = tensors(packed), options_of(chunks, shift=shift)
    options |= {"average_log_prob": shift}
    expected = results(given, TRAINED[trained], **options)
    found = results(given, TRAINED[trained], **lengths_of(given, shift), **options)
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("one", [False, True], ids=["(B, T)", "(N,)"])
def test_token_logps_with_and_without(trained, one):
    given = tensors(packed=one)
    leaves = {name: given[name].requires_grad_(name in TRAINED[trained]) for name in ("hidden", "weight", "bias")}
    lengths = [sum(lengths_of(given)["scored_lengths"])] if one else lengths_of(given)["scored_lengths"]
    found = []
    for known in (None, lengths, tuple(lengths), torch.tensor(lengths), torch.tensor(lengths, dtype=torch.int32)):
        logps = linear_token_logps(**leaves, labels=given["labels"], backend="torch", scored_lengths=known)
        wanted = [x for x in leaves.values() if x.requires_grad]
        found.append([logps.detach(), *(torch.autograd.grad(logps.cos().sum(), wanted) if wanted else ())])
    assert all(torch.equal(mine, first) for each in found for mine, first in zip(each, found[0]))


def test_a_module_passes_them_on(device):
    given = tensors(packed=False)
    LinearKTOLoss(backend="torch")(**given, **lengths_of(given))
    assert not device
    assert "scored_lengths" not in KTOLoss.forward.__annotations__  # from logits no number of rows is needed


def test_flops_are_counted_from_them():
    given = tensors(packed=False)
    calls = []
    for lengths in ({}, lengths_of(given)):
        with FlopCounterMode(display=False) as counter:
            linear_kto_loss(**given, **lengths, backend="torch")
        calls.append(counter.get_total_flops())
    assert calls[0] == calls[1] > 0


# Waiting for the device ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("trained", TRAINED)
def test_one_read_for_four_sides_and_none_where_they_are_given(trained, chunks, packed, device):
    given, options = tensors(packed), options_of(chunks)
    lengths = lengths_of(given)
    expected = results(given, TRAINED[trained], **options)
    assert device == [(B + K,)]  # policy and reference have one number for each sequence, and so have both sides of KL
    device.clear()
    found = results(given, TRAINED[trained], **lengths, **options)
    assert device == []
    assert all(map(torch.equal, expected, found))
    for name, shape in (("scored_lengths", (K,)), ("kl_scored_lengths", (B,))):
        device.clear()
        results(given, TRAINED[trained], **{name: lengths[name]}, **options)
        assert device == [shape]


class Capturing(TorchDispatchMode):
    """What a CUDA graph cannot capture is an error: a read of the host, a shape that values decide, and a copy from the
    host, whose memory is gone when the graph is replayed."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "lift_fresh", "is_nonzero", "equal")

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        tensors = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        on_host = [x.device.type == "cpu" for x in tensors]
        result = operator(*args, **(kwargs or {}))
        if any(on_host):  # work of the host alone: the given numbers
            assert all(on_host) and result.device.type == "cpu", f"{operator} takes a tensor of the host"
        else:
            assert name not in self.forbidden, f"a graph cannot capture {operator}"
        return result


def on_the_host(own, values, **options):
    assert str(options.get("device", "cpu")) == "cpu", "a graph cannot capture a copy from the host"
    return own(values, **options)


@pytest.fixture
def capturing(monkeypatch):
    """Runs operators on meta tensors as on a device's, kernels included: there is no value to read."""

    def direct(self, call, numbers=None):
        return self._directly(call)

    monkeypatch.setattr(Operator, "__call__", direct)
    for name in ("tensor", "as_tensor"):  # copies that PyTorch makes where no mode sees them
        monkeypatch.setattr(torch, name, functools.partial(on_the_host, getattr(torch, name)))
    return Capturing()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("trained", TRAINED)
def test_a_graph_can_capture_the_call(trained, chunks, packed, dtype, capturing):
    """With forward and backward."""
    given = tensors(packed, dtype)
    lengths, options = lengths_of(given, shift=True), options_of(chunks, dtype, shift=True)
    given = {name: x.to("meta") for name, x in given.items()}
    with capturing:
        for average in (False, True):
            results(given, TRAINED[trained], **lengths, **options, average_log_prob=average)


@pytest.mark.skipif(launch.kernels is None, reason="Triton is not there")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("trained", TRAINED)
def test_a_graph_can_capture_the_launches_of_triton(trained, chunks, dtype, capturing, monkeypatch):
    launched = []
    monkeypatch.setattr(launch, "_launch", lambda kernel, *_: launched.append(kernel.__name__))
    monkeypatch.setattr(launch.TritonBackend, "unavailable", lambda self, device: None)
    given = tensors(packed=False, dtype=dtype)
    lengths, options = lengths_of(given), options_of(chunks, dtype) | {"backend": "triton"}
    given = {name: x.to("meta") for name, x in given.items()}
    with capturing:
        for average in (False, True):
            results(given, TRAINED[trained], **lengths, **options, average_log_prob=average)
    assert ("sequences_kernel" in launched) == (trained == "trained")


PREFERENCES = {
    "margin": objectives.DPO(),
    "means": objectives.SimPO(),
    "two numbers": objectives.ORPO(),
    "members apart": objectives.BCOPair(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("objective", PREFERENCES.values(), ids=PREFERENCES)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_a_graph_can_capture_a_preference_loss(objective, trained, chunks, dtype, weighted, capturing):
    given = tensors(packed=False, dtype=dtype)
    options = options_of(chunks, dtype) | {"pairs": "interleaved" if weighted else "halves"}
    options.pop("beta")
    lengths = lengths_of(given)["scored_lengths"][:4]
    given = {
        name: given[name][:4] if name in ("hidden", "labels") else given[name]
        for name in ("hidden", "weight", "bias", "labels")
    }
    if weighted:
        options |= {"token_weights": torch.rand(given["labels"].shape), "sequence_weights": torch.rand(2)}
        if not objective.reference_free:
            options |= {"ref_token_logps": torch.randn(given["labels"].shape), "humanline": (-1.0, 1.5)}
    given, options = (
        {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in some.items()}
        for some in (given, options)
    )
    leaves = [given[name].requires_grad_() for name in TRAINED[trained]]
    with capturing:
        out = linear_preference_loss(**given, objective=objective, scored_lengths=lengths, **options)
        if leaves:
            torch.autograd.grad(out.loss, leaves)


@pytest.mark.parametrize("trained", TRAINED)
def test_a_graph_can_capture_token_logps(trained, capturing):
    given = {name: x.to("meta") for name, x in tensors(packed=True).items()}
    leaves = {name: given[name].requires_grad_(name in TRAINED[trained]) for name in ("hidden", "weight", "bias")}
    with capturing:
        logps = linear_token_logps(**leaves, labels=given["labels"], backend="torch", scored_lengths=[17])
        if logps.requires_grad:
            logps.cos().sum().backward()


def test_a_graph_cannot_capture_the_call_without_them(capturing):
    given = {name: x.to("meta") for name, x in tensors(packed=False).items()}
    with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), capturing:
        results(given, (), backend="torch")


# Wrong ones ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["scored_lengths", "kl_scored_lengths"])
def test_wrong_ones_are_named_where_labels_may_be_read(name):
    given = tensors(packed=False)
    lengths = lengths_of(given)
    right = list(lengths[name])
    lengths[name][0] -= 1
    message = rf"^{name}: expected \[{right[0]}, .*, the scored positions of each sequence"
    with pytest.raises(ValueError, match=message), FlopCounterMode(display=False) as counter:
        linear_kto_loss(**given, **lengths)
    assert counter.get_total_flops() == 0  # no side is scored before all values are checked


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", ["labels", "kl_labels", "cu_seqlens", "kl_cu_seqlens"])
def test_every_value_is_checked_before_any_product(name, trained):
    given = tensors(packed=True)
    given |= {leaf: given[leaf].requires_grad_() for leaf in TRAINED[trained]}
    given[name] = given[name].clone()
    given[name][1] = 99
    with pytest.raises(ValueError, match=rf"^{name}: expected"), FlopCounterMode(display=False) as counter:
        linear_kto_loss(**given)
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("trained", TRAINED)
def test_wrong_ones_read_nothing_outside(trained, chunks, packed, backend, device):
    """An index outside would be an error of PyTorch on the CPU, and so are labels outside to these backends."""
    given, options = tensors(packed), options_of(chunks, shift=True) | {"backend": backend}
    right, draw = lengths_of(given, shift=True), random.Random(0)
    for _ in range(8):
        lengths = {name: [draw.randint(0, T - 1) for _ in values] for name, values in right.items()}
        if packed and (sum(lengths["scored_lengths"]) > B * T or sum(lengths["kl_scored_lengths"]) > K * T):
            continue
        for found in results(given, TRAINED[trained], **lengths, **options):
            assert torch.isfinite(found).all()
    assert device == []


# torch.compile ─────────────────────────────────────────────────────────────────────────────────────────────────────────

LENGTHS = [[4, 7, 3, 6], [5, 6, 2, 7], [5, 4, 6, 5], [7, 7, 7, 7], [2, 5, 6, 3]]


@pytest.mark.parametrize(("form", "most"), [(list, 2), (torch.tensor, 1)], ids=["ints", "tensor"])
@pytest.mark.parametrize("call", [linear_kto_loss, linear_token_logps])
@pytest.mark.parametrize("leaf", ["hidden", "weight"])
def test_new_values_are_data(leaf, call, form, most):
    """Ints take a second graph, for any values; a tensor takes one in all."""
    torch.compiler.reset()
    given = tensors(packed=False)
    labels = torch.full((len(LENGTHS), B, T), -100)
    for k, lengths in enumerate(LENGTHS):
        for i, length in enumerate(lengths):
            labels[k, i, :length] = 1
    known = {"desirable": given["desirable"], "kl": 0.1} if call is linear_kto_loss else {}

    def function(x, case):
        lengths, of_case = case
        leaves = {"hidden": given["hidden"], "weight": given["weight"]} | {leaf: x * 1}
        found = call(**leaves, labels=of_case, scored_lengths=lengths, **known)
        return found.loss if known else found.sum()

    values = [(form(lengths), of_case.clone()) for lengths, of_case in zip(LENGTHS, labels)]
    assert graphs(function, given[leaf], "case", values) <= most


def test_wrong_values_are_refused_in_a_compiled_call():
    torch.compiler.reset()
    given = {name: x for name, x in tensors(packed=False).items() if name in ("hidden", "weight", "labels")}
    compiled = torch.compile(linear_token_logps, backend="aot_eager", fullgraph=True)
    right = torch.tensor(lengths_of(given | {"kl_labels": given["labels"]})["scored_lengths"])
    assert torch.equal(compiled(**given, scored_lengths=right), linear_token_logps(**given))
    for wrong in (right + T, right - T, right - 1):
        with pytest.raises(ValueError, match=r"^scored_lengths: expected"):
            compiled(**given, scored_lengths=wrong)


def test_tensors_without_values_are_traced_with_every_form_of_lengths():
    """make_fx's and FakeTensorMode's tensors: the numbers are not looked at, and a graph looks when it runs."""
    given = tensors(packed=True)
    names = [*given, "scored_lengths", "kl_scored_lengths"]
    right = {name: torch.tensor(values) for name, values in lengths_of(given).items()}

    def function(*values):
        return linear_kto_loss(**dict(zip(names, values)), backend="torch", average_log_prob=True).loss

    expected = function(*given.values(), *right.values())
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(function, tracing_mode=mode)(*given.values(), *right.values())
        assert torch.equal(graph(*given.values(), *right.values()), expected)
        assert not any("_local_scalar_dense" in str(node.target) for node in graph.graph.nodes)
        with pytest.raises(ValueError, match=r"^kl_scored_lengths: expected"):
            graph(*given.values(), right["scored_lengths"], right["kl_scored_lengths"] + T)
    fakes = FakeTensorMode()
    values, lengths = ([fakes.from_tensor(x) for x in each.values()] for each in (given, right))
    for forms in (lengths, [x.tolist() for x in right.values()]):
        with fakes:
            assert function(*values, *forms).shape == ()


def test_offsets_without_values_are_not_looked_at():
    logps, offsets = torch.randn(28), OFFSETS
    expected = sequence_logps(logps, cu_seqlens=offsets)
    call = functools.partial(sequence_logps, cu_seqlens=offsets)
    assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(logps), expected)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda x, of: sequence_logps(x, cu_seqlens=of), tracing_mode=mode)(logps, offsets)
        assert torch.equal(graph(logps, offsets), expected)


# The caller's memory ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("form", [lambda buffer: buffer, lambda buffer: torch.from_numpy(buffer.numpy())])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", ["frozen", "trained"])
def test_a_collator_may_fill_its_buffer_again_before_the_backward(trained, reduction, form, device):
    """PyTorch notices what overwrites a tensor, but not what overwrites the memory of a NumPy array behind it."""
    given, found = tensors(packed=False), []
    for refilled in (False, True):
        buffers = {name: torch.tensor(values) for name, values in lengths_of(given).items()}
        leaves = {name: given[name].clone().requires_grad_() for name in TRAINED[trained]}
        lengths = {name: form(buffer) for name, buffer in buffers.items()}
        loss = linear_kto_loss(**given | leaves, **lengths, reduction=reduction, backend="torch").loss
        if refilled:
            for buffer in buffers.values():
                buffer.fill_(2)
            if (trained, reduction) == ("trained", "mean"):  # the gradients are formed: no label is read again
                given["labels"].fill_(2)
        found.append(torch.autograd.grad(loss.sum(), list(leaves.values())))
    assert all(map(torch.equal, *found))
