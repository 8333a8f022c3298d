"""The choices by PyTorch's release and build (`kto_kernels.releases`), with stubs for what is not here: other releases,
a CUDA device, a ROCm build."""

import pytest
import torch

from kto_kernels import linear_kto_loss, releases
from kto_kernels.linear import head

CUDA = torch.device("cuda")
Release = torch.torch_version.TorchVersion


def addmm_of_2_8(total, a, b, *, out_dtype, beta, out):
    """`torch.addmm` of 2.8 and 2.9 on CUDA tensors."""
    if total.dtype != b.dtype:
        raise RuntimeError("self and mat2 must have the same dtype")
    raise AssertionError("not used with a sum in the factors' dtype")


def addmm_of_2_10(total, a, b, *, out_dtype, beta, out):
    assert out is total and total.dtype == out_dtype
    return out.copy_((beta * total if beta else 0) + a.float() @ b.float())


def baddbmm_of_2_8(total, a, b, *, out_dtype, beta, out):
    """`torch.baddbmm` of 2.8 and 2.9 on CUDA tensors: it reads its sum from `out`, and never looks at `total`."""
    assert total.shape == out.shape == (*a.shape[:2], b.shape[2]) and a.dtype == b.dtype != out_dtype == out.dtype
    return out.copy_((beta * out if beta else 0) + torch.bmm(a.float(), b.float()))


def no_overload(*arguments, **options):
    raise AssertionError("a device without such a GEMM")


BUILDS = {  # name → release, ROCm, the overloads there, how products are added
    "2.8": ("2.8.0+cu128", None, addmm_of_2_8, baddbmm_of_2_8, "baddbmm"),
    "2.9": ("2.9.1+cu128", None, addmm_of_2_8, baddbmm_of_2_8, "baddbmm"),
    "2.10 in development": ("2.10.0a0+b4e4ee8.nv25.12", None, addmm_of_2_8, baddbmm_of_2_8, "baddbmm"),
    "2.10": ("2.10.0+cu128", None, addmm_of_2_10, no_overload, "addmm"),
    "2.13": ("2.13.0+cu130", None, addmm_of_2_10, no_overload, "addmm"),
    "2.9 with ROCm": ("2.9.1+rocm6.4", "6.4", no_overload, no_overload, "parts"),
    "2.13 with ROCm": ("2.13.0+rocm7.1", "7.1", no_overload, no_overload, "parts"),
}


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    """A build of PyTorch in which the CPU's tensors count as a CUDA device's."""
    release, hip, addmm, baddbmm, expected = BUILDS[request.param]
    monkeypatch.setattr(torch, "__version__", Release(release))
    monkeypatch.setattr(torch.version, "hip", hip, raising=False)
    addition = releases.addition
    monkeypatch.setattr(head.releases, "addition", lambda device: addition(CUDA))
    own = torch.addmm  # sums in the factors' dtype go to the ordinary overload

    def either(*arguments, **options):
        return (addmm if "out_dtype" in options else own)(*arguments, **options)

    monkeypatch.setattr(torch, "addmm", either)
    monkeypatch.setattr(torch, "baddbmm", baddbmm)
    return expected


def test_the_way_of_each_build(build):
    assert head.releases.addition(torch.device("cpu")) == build


@pytest.mark.parametrize("device", ["cpu", "xpu", "mps", "meta"])
def test_devices_without_such_a_gemm(device):
    assert releases.addition(torch.device(device)) == "parts"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sums_of_16_bit_products(build, dtype):
    a, b = torch.randn(5, 7).to(dtype), torch.randn(7, 3).to(dtype)
    product = a.double() @ b.double()
    first = head.add_product(None, a, b, torch.float32)
    second = head.add_product(first, a, b, torch.float32)
    assert second is first and first.dtype == torch.float32
    # Products in parts are rounded to 16 bits.
    rounding = torch.finfo(dtype).eps if build == "parts" else torch.finfo(torch.float32).eps
    assert (first - 2 * product).abs().max() <= 4 * rounding * product.abs().max()


def test_a_trained_head_in_each_build(build):
    """Several chunks, whose products are added to the fp32 gradients of weight and bias."""
    labels, desirable = torch.randint(17, (2, 4)), torch.tensor([True, False])
    hidden, weight, bias = torch.randn(2, 4, 8), torch.randn(17, 8), torch.randn(17)
    gradients = {}
    for dtype in (torch.float64, torch.bfloat16):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        options = {"backend": "torch", "max_logits_bytes": 3 * 17 * dtype.itemsize, "long_sequences": "defer"}
        out = linear_kto_loss(*leaves[:2], labels, desirable, bias=leaves[2], kl=0.1, beta=0.5, **options)
        gradients[dtype] = torch.autograd.grad(out.loss, leaves)
    for exact, found in zip(*gradients.values()):
        assert (exact - found).abs().max() <= 0.02 * exact.abs().max()


def nonzero_static_of_2_8(mask, *, size, fill_value=-1):
    """`torch.nonzero_static` of 2.8 on CUDA tensors."""
    if mask.numel() == 0:
        raise RuntimeError("CUDA error: invalid configuration argument")
    found = mask.nonzero()[:size]
    return torch.cat([found, found.new_full((size - len(found), mask.dim()), fill_value)])


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0), (2, 4)], ids=str)
def test_no_position_is_asked_of_an_empty_tensor(shape, monkeypatch):
    """An empty batch, sequences without tokens (as on a rank of a context group), and labels none of which scores."""
    monkeypatch.setattr(torch, "nonzero_static", nonzero_static_of_2_8)
    monkeypatch.setattr(torch.Tensor, "nonzero_static", nonzero_static_of_2_8)
    hidden, weight = torch.randn(*shape, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
    labels, desirable = torch.full(shape, -100), torch.ones(shape[0], dtype=torch.bool)
    out = linear_kto_loss(hidden, weight, labels, desirable, kl=0.0)
    out.loss.backward()
    assert not weight.grad.any() and hidden.grad.shape == hidden.shape


def test_positions():
    mask = torch.tensor([False, True, True, False, True])
    assert releases.positions(mask, 3).tolist() == [1, 2, 4]
    assert releases.positions(mask, 2).tolist() == [1, 2]
    assert releases.positions(mask, 5).tolist() == [1, 2, 4, 0, 0]  # inside the mask, whatever is asked for
    assert releases.positions(mask[:0], 0).tolist() == []
