"""Bad input: one row each, with the argument that the message must name, raised before any work."""

import pytest
import torch

from kto_kernels import kl_reference_point, kto_loss, kto_loss_from_logps, sequence_logps, token_logps

B, T, V, K = 3, 4, 11, 2
LOGITS = torch.randn(B, T, V)
LABELS = torch.randint(V, (B, T))
GOOD = torch.tensor([True, False, True])
KL_LOGITS, KL_LABELS = torch.randn(K, T, V), torch.randint(V, (K, T))
S, SK = torch.randn(B), torch.randn(K)
CU = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
OUTSIDE = LABELS.clone()
OUTSIDE[1, 2] = V
NEGATIVE = LABELS.clone()
NEGATIVE[2, 0] = -1


def packed(offsets):
    return {"logits": LOGITS.flatten(0, 1), "labels": LABELS.flatten(), "cu_seqlens": offsets}


# (changes to a valid call, error, what the message must say)
TABLE = {
    "logits no tensor": ({"logits": [1.0]}, TypeError, "logits: expected a tensor, got list"),
    "logits integer": ({"logits": LOGITS.long()}, TypeError, "logits: expected dtype"),
    "logits rank 1": ({"logits": LOGITS[0, 0]}, ValueError, r"logits: expected \(B, T, V\) or packed"),
    "logits rank 4": ({"logits": LOGITS[None]}, ValueError, r"logits: expected \(B, T, V\) or packed"),
    "logits packed without offsets": ({"logits": LOGITS[0], "labels": LABELS[0]}, ValueError, "cu_seqlens"),
    "no vocabulary": ({"logits": LOGITS[..., :0]}, ValueError, "logits: expected a vocabulary"),
    "vocabulary stride": ({"logits": LOGITS.transpose(1, 2).contiguous().transpose(1, 2)}, ValueError, "logits: .*stride 1"),
    "labels float": ({"labels": LABELS.float()}, TypeError, "labels: expected dtype int32, int64, got float32"),
    "labels bool": ({"labels": LABELS.bool()}, TypeError, "labels: expected dtype"),
    "labels shape": ({"labels": LABELS[:, 1:]}, ValueError, r"labels: expected shape \(3, 4\)"),
    "labels device": ({"labels": LABELS.to("meta")}, ValueError, "labels: expected device cpu"),
    "label too large": ({"labels": OUTSIDE}, ValueError, r"labels: expected 0 <= label < 11 .*got 11 at \(1, 2\)"),
    "label negative": ({"labels": NEGATIVE}, ValueError, r"labels: .*got -1 at \(2, 0\)"),
    "desirable a list": ({"desirable": [True, False, True]}, TypeError, "desirable: expected a tensor, got list"),
    "desirable a string": ({"desirable": "false"}, TypeError, "desirable: expected a tensor, got str"),
    "desirable ints": ({"desirable": GOOD.long()}, TypeError, "desirable: expected dtype bool, got int64"),
    "desirable shape": ({"desirable": GOOD[:2]}, ValueError, r"desirable: expected shape \(3,\)"),
    "both references": ({"ref_logits": LOGITS, "ref_logps": S, "kl": 0.0}, ValueError, "ref_logits, ref_logps"),
    "reference shape": ({"ref_logits": LOGITS[:, 1:]}, ValueError, "ref_logits: expected shape"),
    "reference dtype": ({"ref_logits": LOGITS.bfloat16()}, TypeError, "ref_logits: expected dtype float32"),
    "reference vocabulary": ({"ref_logits": LOGITS[..., 1:]}, ValueError, "ref_logits: expected a vocabulary of 11"),
    "ref_logps shape": ({"ref_logps": S[:1]}, ValueError, r"ref_logps: expected shape \(3,\)"),
    "ref_logps integer": ({"ref_logps": S.long()}, TypeError, "ref_logps: expected dtype"),
    "no KL source": ({"kl": None}, ValueError, "kl: loss_type='kto' needs a KL source.*kl=0.0"),
    "two KL sources": ({"kl_logps": SK}, ValueError, "kl: expected one KL source"),
    "KL logits and logps": (
        {"kl": None, "kl_logps": SK, "kl_logits": KL_LOGITS, "kl_labels": KL_LABELS}, ValueError, "kl_logits, kl_logps",
    ),
    "KL reference logits and logps": (
        {"kl": None, "ref_logps": S, "kl_logps": SK, "ref_kl_logps": SK, "ref_kl_logits": KL_LOGITS, "kl_labels": KL_LABELS},
        ValueError, "ref_kl_logits, ref_kl_logps",
    ),
    "KL reference alone": ({"kl": None, "ref_logps": S, "ref_kl_logps": SK}, ValueError, "ref_kl_logps: go with"),
    "KL reference missing": ({"kl": None, "ref_logps": S, "kl_logps": SK}, ValueError, "ref_kl_logps: needed with a ref"),
    "KL reference without a reference": ({"kl": None, "kl_logps": SK, "ref_kl_logps": SK}, ValueError, "go with ref_logits"),
    "KL labels missing": ({"kl": None, "kl_logits": KL_LOGITS}, ValueError, "kl_labels: needed with kl_logits"),
    "KL labels alone": ({"kl_labels": KL_LABELS}, ValueError, "kl_labels, kl_cu_seqlens: go with"),
    "KL label range": (
        {"kl": None, "kl_logits": KL_LOGITS, "kl_labels": KL_LABELS + V}, ValueError, "kl_labels: expected 0 <= label",
    ),
    "KL vocabulary": ({"kl": None, "kl_logits": KL_LOGITS[..., 1:], "kl_labels": KL_LABELS}, ValueError, "kl_logits: .*11"),
    "KL counts": (
        {"kl": None, "ref_logps": S, "kl_logps": SK, "ref_kl_logps": S}, ValueError, r"ref_kl_logps: expected shape \(2,\)",
    ),
    "KL logps rank": ({"kl": None, "kl_logps": SK[None]}, ValueError, r"kl_logps: expected shape \(K,\)"),
    "kl a vector": ({"kl": S}, ValueError, r"kl: expected shape \(\)"),
    "kl a string": ({"kl": "0"}, TypeError, "kl: expected a number or a 0-d tensor"),
    "kl integer tensor": ({"kl": torch.tensor(1)}, TypeError, "kl: expected dtype"),
    "kl NaN": ({"kl": float("nan")}, ValueError, "kl: expected a finite number"),
    "apo with kl": ({"loss_type": "apo_zero_unpaired"}, ValueError, "kl: .*takes no KL source"),
    "beta zero": ({"beta": 0.0}, ValueError, "beta: expected a finite number > 0"),
    "beta negative": ({"beta": -0.1}, ValueError, "beta: expected a finite number > 0"),
    "beta NaN": ({"beta": float("nan")}, ValueError, "beta: expected a finite number > 0"),
    "beta infinite": ({"beta": float("inf")}, ValueError, "beta: expected a finite number > 0"),
    "beta a tensor": ({"beta": torch.tensor(0.1)}, TypeError, "beta: expected a number, got Tensor"),
    "weight negative": ({"desirable_weight": -1.0}, ValueError, "desirable_weight: expected a finite number >= 0"),
    "weight NaN": ({"undesirable_weight": float("nan")}, ValueError, "undesirable_weight: expected"),
    "temperature zero": ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0"),
    "temperature bool": ({"temperature": True}, TypeError, "temperature: expected a number, got bool"),
    "loss_type": ({"loss_type": "dpo"}, ValueError, "loss_type: expected one of 'kto', 'apo_zero_unpaired'"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction: expected one of"),
    "backend": ({"backend": "gpu"}, ValueError, "backend: expected one of 'auto'"),
    "shift": ({"shift": 1}, TypeError, "shift: expected True or False"),
    "average_log_prob": ({"average_log_prob": "no"}, TypeError, "average_log_prob: expected True or False"),
    "inplace_backward": ({"inplace_backward": None}, TypeError, "inplace_backward: expected True or False"),
    "ignore_index": ({"ignore_index": -100.0}, TypeError, "ignore_index: expected an int"),
    "process_group": ({"process_group": object()}, TypeError, "process_group: expected a torch.distributed ProcessGroup"),
    "offsets with padded": ({"cu_seqlens": CU}, ValueError, "cu_seqlens: goes with packed"),
    "offsets float": (packed(CU.float()), TypeError, "cu_seqlens: expected dtype int32, int64"),
    "offsets rank": (packed(CU[None]), ValueError, r"cu_seqlens: expected shape \(B \+ 1,\)"),
    "offsets empty": (packed(CU[:0]), ValueError, r"cu_seqlens: expected shape \(B \+ 1,\)"),
    "offsets unsorted": (packed(CU[[0, 2, 1, 3]]), ValueError, "cu_seqlens: expected offsets that rise from 0 to N=12"),
    "offsets not from 0": (packed(CU + torch.tensor([1, 0, 0, 0])), ValueError, "cu_seqlens: expected offsets that rise"),
    "offsets not to N": (packed(CU - torch.tensor([0, 0, 0, 1])), ValueError, "cu_seqlens: expected offsets that rise"),
    "offsets too short": (packed(CU[:3]) | {"desirable": GOOD[:2]}, ValueError, "cu_seqlens: expected offsets that rise"),
    "in place on a leaf": (
        {"logits": LOGITS.clone().requires_grad_(), "inplace_backward": True}, ValueError, "inplace_backward: .*leaf",
    ),
    "in place on a view of a leaf": (
        {"logits": LOGITS.clone().requires_grad_()[:, :], "inplace_backward": True}, ValueError, "inplace_backward: .*leaf",
    ),
    "in place on an expanded tensor": (
        {"logits": (LOGITS[:1].clone().requires_grad_() * 1).expand(B, T, V), "inplace_backward": True},
        ValueError, "inplace_backward: .*expanded",
    ),
    "fp64 on the cpu backend": ({"logits": LOGITS.double(), "backend": "cpu"}, TypeError, "logits: backend='cpu' takes"),
}  # fmt: skip


@pytest.mark.parametrize("row", list(TABLE), ids=[name.replace(" ", "-") for name in TABLE])
def test_kto_loss(row):
    changes, error, message = TABLE[row]
    call = {"logits": LOGITS, "labels": LABELS, "desirable": GOOD, "kl": 0.0} | changes
    with pytest.raises(error, match=message):
        kto_loss(call.pop("logits"), call.pop("labels"), call.pop("desirable"), **call)


def test_the_unchanged_call_is_valid():
    assert torch.isfinite(kto_loss(LOGITS, LABELS, GOOD, kl=0.0).loss)
    call = packed(CU)
    assert torch.isfinite(kto_loss(call["logits"], call["labels"], GOOD, kl=0.0, cu_seqlens=CU).loss)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: token_logps(LOGITS, LABELS[0]), ValueError, "labels: expected shape"),
        (lambda: token_logps(LOGITS, OUTSIDE), ValueError, "labels: expected 0 <= label"),
        (lambda: token_logps(LOGITS, LABELS, temperature=-1.0), ValueError, "temperature"),
        (lambda: token_logps(LOGITS.clone().requires_grad_(), LABELS, inplace_backward=True), ValueError, "leaf"),
        (lambda: token_logps(LOGITS, LABELS, backend="rocm"), ValueError, "backend"),
        (lambda: sequence_logps(S), ValueError, r"logps: expected \(B, T\)"),
        (lambda: sequence_logps(LOGITS[0], cu_seqlens=CU), ValueError, r"logps: expected \(B, T\)"),
        (lambda: sequence_logps(torch.randn(11), cu_seqlens=CU), ValueError, "cu_seqlens: expected offsets"),
        (lambda: sequence_logps(LOGITS[0], average_log_prob=True), ValueError, "labels: needed"),
        (lambda: sequence_logps(LOGITS[0], labels=LABELS), ValueError, "labels: expected shape"),
        (lambda: sequence_logps(LABELS), TypeError, "logps: expected dtype"),
        (lambda: kl_reference_point(SK, S), ValueError, "ref_kl_logps: expected shape"),
        (lambda: kl_reference_point(LABELS), TypeError, "kl_logps: expected dtype"),
        (lambda: kl_reference_point(SK, process_group=object()), TypeError, "process_group"),
        (lambda: kto_loss_from_logps(S, GOOD), ValueError, "needs a KL source"),
        (lambda: kto_loss_from_logps(LOGITS[0], GOOD, kl=0.0), ValueError, r"logps: expected shape \(B,\)"),
        (lambda: kto_loss_from_logps(S, GOOD.int(), kl=0.0), TypeError, "desirable"),
        (lambda: kto_loss_from_logps(S, GOOD, ref_logps=SK, kl=0.0), ValueError, "ref_logps"),
        (lambda: kto_loss_from_logps(S, GOOD, kl=0.0, beta=0), ValueError, "beta"),
        (lambda: kto_loss_from_logps(S, GOOD, kl=0.0, reduction="max"), ValueError, "reduction"),
        (lambda: kto_loss_from_logps(S, GOOD, kl=0.0, loss_type="apo_zero_unpaired"), ValueError, "no KL source"),
    ],
)
def test_other_functions(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_unavailable_backend_says_why(monkeypatch):
    from kto_kernels.backends import BACKENDS

    monkeypatch.setattr(type(BACKENDS["cpu"]), "unavailable", lambda self, device: "it was taken away")
    with pytest.raises(RuntimeError, match="backend='cpu' is not available: it was taken away"):
        kto_loss(LOGITS, LABELS, GOOD, kl=0.0, backend="cpu")
