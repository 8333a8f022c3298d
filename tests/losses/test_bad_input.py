"""Bad input: one row each, with the functions that refuse it, the error and what its message must say. Every message
begins with the argument's name, and is raised before any work. Below the table, what only running shows: NaN and +inf,
values that a GPU would have to be asked for, gradients asked for twice."""

import contextlib
import inspect
import re

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kto_kernels import (
    KTOLoss,
    LinearKTOLoss,
    checks,
    kl_reference_point,
    kto_loss,
    kto_loss_from_logps,
    linear_kto_loss,
    linear_token_logps,
    sequence_logps,
    token_logps,
)
from kto_kernels.backends import BACKENDS
from kto_kernels.options import Chunking, Objective, Scale, Scoring
from tests.support.harness import ours, places, problem
from tests.support.linear_harness import linear_problem, ours_linear

B, T, H, V, K = 3, 4, 6, 11, 2
NAN, INF = float("nan"), float("inf")
LOGITS, LABELS = torch.randn(B, T, V), torch.randint(V, (B, T))
HIDDEN, WEIGHT, BIAS = torch.randn(B, T, H), torch.randn(V, H), torch.randn(V)
GOOD = torch.tensor([True, False, True])
KL_LOGITS, KL_HIDDEN, KL_LABELS = torch.randn(K, T, V), torch.randn(K, T, H), torch.randint(V, (K, T))
S, SK = torch.randn(B), torch.randn(K)
CU = torch.tensor([0, 4, 8, 12], dtype=torch.int32)
OUTSIDE, NEGATIVE, KL_OUTSIDE = LABELS.clone(), LABELS.clone(), KL_LABELS.clone()
OUTSIDE[1, 2], NEGATIVE[2, 0], KL_OUTSIDE[1, 3] = V, -1, V
LEAF = LOGITS.clone().requires_grad_()

# The arguments of a valid call of each.
VALID = {
    kto_loss: {"logits": LOGITS, "labels": LABELS, "desirable": GOOD, "kl": 0.0},
    linear_kto_loss: {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "desirable": GOOD, "kl": 0.0},
    kto_loss_from_logps: {"logps": S, "desirable": GOOD, "kl": 0.0},
    token_logps: {"logits": LOGITS, "labels": LABELS},
    linear_token_logps: {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS},
    sequence_logps: {"logps": LOGITS[..., 0]},
    kl_reference_point: {"kl_logps": SK},
}
FROM_LOGITS, FROM_HIDDEN = (kto_loss, token_logps), (linear_kto_loss, linear_token_logps)
SCORING = FROM_LOGITS + FROM_HIDDEN
LOSSES = (kto_loss, linear_kto_loss, kto_loss_from_logps)
PACKABLE = (kto_loss, linear_kto_loss, sequence_logps)
KL_ROWS = (kto_loss, linear_kto_loss)


def kl_rows(**changes):
    """Mismatched completions to score, for whichever loss: logits or hidden states."""
    return {"kl": None, "kl_logits": KL_LOGITS, "kl_hidden": KL_HIDDEN, "kl_labels": KL_LABELS} | changes


def packed(offsets, **changes):
    names = {"logits": LOGITS.flatten(0, 1), "hidden": HIDDEN.flatten(0, 1), "logps": LOGITS[..., 0].flatten()}
    return names | {"labels": LABELS.flatten(), "cu_seqlens": offsets} | changes


# name: (functions, changes to the valid call, error, what the message must say). Changes that a function has no
# argument for are not made.
TABLE = {
    # Types, ranks, shapes, devices
    "vocab another": (SCORING, {"vocab": 2 * V}, ValueError, f"vocab: expected {V}, the columns given, got {2 * V}"),
    "vocab float": (SCORING, {"vocab": float(V)}, TypeError, "vocab: expected an int, got float"),
    "logits no tensor": (FROM_LOGITS, {"logits": [1.0]}, TypeError, "logits: expected a tensor, got list"),
    "logits integer": (FROM_LOGITS, {"logits": LOGITS.long()}, TypeError, "logits: expected dtype"),
    "logits complex": (FROM_LOGITS, {"logits": LOGITS.cfloat()}, TypeError, "logits: expected dtype"),
    "logits sparse": (FROM_LOGITS, {"logits": LOGITS.to_sparse()}, TypeError, "logits: expected a dense tensor"),
    "logits rank 1": (FROM_LOGITS, {"logits": LOGITS[0, 0]}, ValueError, r"logits: expected \(B, T, V\) or packed"),
    "logits rank 4": (FROM_LOGITS, {"logits": LOGITS[None]}, ValueError, r"logits: expected \(B, T, V\) or packed"),
    "logits packed without offsets": ((kto_loss,), {"logits": LOGITS[0], "labels": LABELS[0]}, ValueError, "logits: .*cu_seqlens"),
    "no vocabulary": (FROM_LOGITS, {"logits": LOGITS[..., :0]}, ValueError, "logits: expected a vocabulary"),
    "vocabulary stride": (
        FROM_LOGITS, {"logits": LOGITS.transpose(1, 2).contiguous().transpose(1, 2)}, ValueError, "logits: .*stride 1",
    ),
    "hidden no tensor": (FROM_HIDDEN, {"hidden": [1.0]}, TypeError, "hidden: expected a tensor, got list"),
    "hidden integer": (FROM_HIDDEN, {"hidden": HIDDEN.long()}, TypeError, "hidden: expected dtype"),
    "hidden rank": (FROM_HIDDEN, {"hidden": HIDDEN[0, 0]}, ValueError, r"hidden: expected \(B, T, H\) or packed \(N, H\)"),
    "hidden width": (FROM_HIDDEN, {"hidden": HIDDEN[..., 1:]}, ValueError, r"hidden: expected 6 features as weight of shape \(11, 6\)"),
    "hidden packed without offsets": (
        (linear_kto_loss,), {"hidden": HIDDEN[0], "labels": LABELS[0]}, ValueError, r"hidden: .*\(N, H\) with cu_seqlens",
    ),
    "weight no tensor": (FROM_HIDDEN, {"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
    "weight integer": (FROM_HIDDEN, {"weight": WEIGHT.long()}, TypeError, "weight: expected dtype"),
    "weight rank": (FROM_HIDDEN, {"weight": WEIGHT[0]}, ValueError, r"weight: expected \(V, H\)"),
    "weight empty": (FROM_HIDDEN, {"weight": WEIGHT[:0]}, ValueError, r"weight: expected \(V, H\) with V >= 1"),
    "no features": (
        FROM_HIDDEN, {"hidden": HIDDEN[..., :0], "weight": WEIGHT[:, :0]}, ValueError, r"weight: expected \(V, H\) with V >= 1 and H >= 1",
    ),
    "no features of the reference": (
        (linear_kto_loss,), {"ref_hidden": HIDDEN[..., :0], "ref_weight": WEIGHT[:, :0]}, ValueError, r"ref_weight: expected \(V, H\)",
    ),
    "weight device": (FROM_HIDDEN, {"weight": WEIGHT.to("meta")}, ValueError, "weight: expected device cpu"),
    "bias shape": (FROM_HIDDEN, {"bias": BIAS[1:]}, ValueError, r"bias: expected shape \(11,\)"),
    "bias integer": (FROM_HIDDEN, {"bias": BIAS.long()}, TypeError, "bias: expected dtype"),
    "logps integer": ((kto_loss_from_logps, sequence_logps), {"logps": LABELS}, TypeError, "logps: expected dtype"),
    "logps rank": ((kto_loss_from_logps,), {"logps": LOGITS[0]}, ValueError, r"logps: expected shape \(B,\)"),
    "token logps rank": ((sequence_logps,), {"logps": S}, ValueError, r"logps: expected \(B, T\)"),
    "token logps packed rank": ((sequence_logps,), {"logps": LOGITS[0], "cu_seqlens": CU}, ValueError, r"logps: expected \(B, T\)"),
    "labels no tensor": (SCORING, {"labels": [[1] * T] * B}, TypeError, "labels: expected a tensor, got list"),
    "labels float": (SCORING, {"labels": LABELS.float()}, TypeError, "labels: expected dtype int32, int64, got float32"),
    "labels bool": (SCORING, {"labels": LABELS.bool()}, TypeError, "labels: expected dtype"),
    "labels shape": ((*SCORING, sequence_logps), {"labels": LABELS[:, 1:]}, ValueError, r"labels: expected shape \(3, 4\)"),
    "labels rank": (SCORING, {"labels": LABELS[0]}, ValueError, r"labels: expected shape \(3, 4\)"),
    "labels device": (SCORING, {"labels": LABELS.to("meta")}, ValueError, "labels: expected device cpu"),
    "labels to count missing": ((sequence_logps,), {"average_log_prob": True}, ValueError, "labels: needed"),
    "label too large": (SCORING, {"labels": OUTSIDE}, ValueError, r"labels: expected 0 <= label < 11 .*got 11 at \(1, 2\)"),
    "label negative": (SCORING, {"labels": NEGATIVE}, ValueError, r"labels: .*got -1 at \(2, 0\)"),
    "lengths a number": (FROM_HIDDEN, {"scored_lengths": 4}, TypeError, "scored_lengths: expected a list of ints, or a tensor on the CPU, got int"),
    "lengths floats": (FROM_HIDDEN, {"scored_lengths": [4.0] * B}, TypeError, "scored_lengths: expected an int, got float"),
    "lengths flags": (FROM_HIDDEN, {"scored_lengths": [True] * B}, TypeError, "scored_lengths: expected an int, got bool"),
    "lengths of too few": (FROM_HIDDEN, {"scored_lengths": [T] * 2}, ValueError, "scored_lengths: expected 3 ints, one per sequence, got 2"),
    "lengths negative": (FROM_HIDDEN, {"scored_lengths": [T, -1, T]}, ValueError, "scored_lengths: expected 0 <= length <= 4, .*got -1"),
    "lengths too long": (FROM_HIDDEN, {"scored_lengths": [T, 5, T]}, ValueError, "scored_lengths: expected 0 <= length <= 4, .*got 5"),
    "lengths too long shifted": (FROM_HIDDEN, {"scored_lengths": [T] * B, "shift": True}, ValueError, "scored_lengths: expected 0 <= length <= 3, .*got 4"),
    "lengths too many": ((linear_kto_loss,), packed(CU, scored_lengths=[5] * B), ValueError, "scored_lengths: expected a sum of at most 12, .*got 15"),
    "lengths not those of the labels": (FROM_HIDDEN, {"scored_lengths": [T, 3, T]}, ValueError, r"scored_lengths: expected \[4, 4, 4\], .*got \[4, 3, 4\]"),
    "lengths a float tensor": (FROM_HIDDEN, {"scored_lengths": S}, TypeError, "scored_lengths: expected dtype int32, int64, got float32"),
    "lengths a tensor elsewhere": (FROM_HIDDEN, {"scored_lengths": LABELS[:, 0].to("meta")}, ValueError, "scored_lengths: expected ints, or a tensor on the CPU"),
    "lengths a tensor of too many": (FROM_HIDDEN, {"scored_lengths": LABELS[0]}, ValueError, r"scored_lengths: expected shape \(3,\)"),
    "lengths a tensor too long": (FROM_HIDDEN, {"scored_lengths": torch.tensor([4, 4, 5])}, ValueError, "scored_lengths: expected 0 <= length <= 4"),
    "KL lengths without rows": ((linear_kto_loss,), {"kl_scored_lengths": [T] * K}, ValueError, "kl_scored_lengths: goes with kl_labels, got none"),
    "KL lengths of too many": (
        (linear_kto_loss,), kl_rows(kl_scored_lengths=[T] * B), ValueError, "kl_scored_lengths: expected 2 ints, one per sequence, got 3",
    ),
    "KL lengths not those of the labels": (
        (linear_kto_loss,), kl_rows(kl_scored_lengths=[T, 2]), ValueError, r"kl_scored_lengths: expected \[4, 4\], .*got \[4, 2\]",
    ),
    "desirable a list": (LOSSES, {"desirable": [True, False, True]}, TypeError, "desirable: expected a tensor, got list"),
    "desirable a string": (LOSSES, {"desirable": "false"}, TypeError, "desirable: expected a tensor, got str"),
    "desirable ints": (LOSSES, {"desirable": GOOD.long()}, TypeError, "desirable: expected dtype bool, got int64"),
    "desirable floats": (LOSSES, {"desirable": GOOD.float()}, TypeError, "desirable: expected dtype bool, got float32"),
    "desirable shape": (LOSSES, {"desirable": GOOD[:2]}, ValueError, r"desirable: expected shape \(3,\)"),
    "desirable a column": (LOSSES, {"desirable": GOOD[:, None]}, ValueError, r"desirable: expected shape \(3,\)"),
    "desirable device": (LOSSES, {"desirable": GOOD.to("meta")}, ValueError, "desirable: expected device cpu"),
    # The reference
    "both references": ((kto_loss,), {"ref_logits": LOGITS, "ref_logps": S}, ValueError, "ref_logits, ref_logps: expected one"),
    "both references, hidden": (
        (linear_kto_loss,), {"ref_hidden": HIDDEN, "ref_weight": WEIGHT, "ref_logps": S}, ValueError, "ref_hidden, ref_logps: expected one",
    ),
    "reference shape": ((kto_loss,), {"ref_logits": LOGITS[:, 1:]}, ValueError, "ref_logits: expected shape"),
    "reference dtype": ((kto_loss,), {"ref_logits": LOGITS.bfloat16()}, TypeError, "ref_logits: expected dtype float32"),
    "reference device": ((kto_loss,), {"ref_logits": LOGITS.to("meta")}, ValueError, "ref_logits: expected device cpu"),
    "reference vocabulary": ((kto_loss,), {"ref_logits": LOGITS[..., 1:]}, ValueError, "ref_logits: expected a vocabulary of 11"),
    "no reference head": (
        (linear_kto_loss,), {"ref_hidden": HIDDEN}, ValueError, "ref_weight: goes with ref_hidden.*ref_weight=weight",
    ),
    "reference head alone": ((linear_kto_loss,), {"ref_weight": WEIGHT}, ValueError, "ref_weight: goes with ref_hidden"),
    "reference bias alone": ((linear_kto_loss,), {"ref_bias": BIAS}, ValueError, "ref_bias: goes with ref_weight"),
    "reference head's vocabulary": (
        (linear_kto_loss,), {"ref_hidden": HIDDEN, "ref_weight": WEIGHT[1:]}, ValueError, "ref_weight: expected a vocabulary of 11",
    ),
    "reference width": (
        (linear_kto_loss,), {"ref_hidden": HIDDEN[..., 1:], "ref_weight": WEIGHT}, ValueError, "ref_hidden: expected 6 features as ref_weight",
    ),
    "reference tokens": (
        (linear_kto_loss,), {"ref_hidden": HIDDEN[:, 1:], "ref_weight": WEIGHT}, ValueError, r"ref_hidden: expected shape \(3, 4, 6\)",
    ),
    "ref_logps shape": (LOSSES, {"ref_logps": S[:1]}, ValueError, r"ref_logps: expected shape \(3,\)"),
    "ref_logps integer": (LOSSES, {"ref_logps": S.long()}, TypeError, "ref_logps: expected dtype"),
    "ref_logps device": (LOSSES, {"ref_logps": S.to("meta")}, ValueError, "ref_logps: expected device cpu"),
    # The KL source
    "no KL source": (LOSSES, {"kl": None}, ValueError, "kl: loss_type='kto' needs a KL source.*kl=0.0"),
    "two KL sources": (LOSSES, {"kl_logps": SK}, ValueError, "kl: expected one KL source"),
    "kl and KL rows": (KL_ROWS, kl_rows(kl=0.0), ValueError, "kl: expected one KL source"),
    "KL rows and logps": (KL_ROWS, kl_rows(kl_logps=SK), ValueError, "kl_(logits|hidden), kl_logps: expected one"),
    "KL reference rows and logps": (
        (kto_loss,), {"kl": None, "ref_logps": S, "kl_logps": SK, "ref_kl_logps": SK, "ref_kl_logits": KL_LOGITS, "kl_labels": KL_LABELS},
        ValueError, "ref_kl_logits, ref_kl_logps",
    ),
    "KL reference alone": (LOSSES, {"kl": None, "ref_logps": S, "ref_kl_logps": SK}, ValueError, "ref_kl_logps: go with"),
    "KL reference missing": (LOSSES, {"kl": None, "ref_logps": S, "kl_logps": SK}, ValueError, "ref_kl_logps: needed with a ref"),
    "KL reference without a reference": (
        LOSSES, {"kl": None, "kl_logps": SK, "ref_kl_logps": SK}, ValueError, "ref_kl_logps: go with ref_",
    ),
    "KL labels missing": (KL_ROWS, kl_rows(kl_labels=None), ValueError, "kl_labels: needed with kl_(logits|hidden)"),
    "KL labels alone": (KL_ROWS, {"kl_labels": KL_LABELS}, ValueError, "kl_labels, kl_cu_seqlens: go with kl_"),
    "KL label too large": (KL_ROWS, kl_rows(kl_labels=KL_OUTSIDE), ValueError, r"kl_labels: expected 0 <= label < 11 .*\(1, 3\)"),
    "KL labels float": (KL_ROWS, kl_rows(kl_labels=KL_LABELS.float()), TypeError, "kl_labels: expected dtype"),
    "KL vocabulary": ((kto_loss,), kl_rows(kl_logits=KL_LOGITS[..., 1:]), ValueError, "kl_logits: .*11"),
    "KL width": ((linear_kto_loss,), kl_rows(kl_hidden=KL_HIDDEN[..., 1:]), ValueError, "kl_hidden: expected 6 features as weight"),
    "KL offsets not to N": (
        KL_ROWS, kl_rows(kl_logits=KL_LOGITS[0], kl_hidden=KL_HIDDEN[0], kl_labels=KL_LABELS[0], kl_cu_seqlens=CU[:2] - CU[:2] // 4),
        ValueError, "kl_cu_seqlens: expected offsets that rise from 0 to N=4",
    ),
    "KL counts": (LOSSES, {"kl": None, "ref_logps": S, "kl_logps": SK, "ref_kl_logps": S}, ValueError, r"ref_kl_logps: expected shape \(2,\)"),
    "KL counts, alone": ((kl_reference_point,), {"ref_kl_logps": S}, ValueError, r"ref_kl_logps: expected shape \(2,\)"),
    "KL logps rank": ((*LOSSES, kl_reference_point), {"kl": None, "kl_logps": SK[None]}, ValueError, r"kl_logps: expected shape \(K,\)"),
    "KL logps integer": ((kl_reference_point,), {"kl_logps": LABELS[0]}, TypeError, "kl_logps: expected dtype"),
    "kl a vector": (LOSSES, {"kl": S}, ValueError, r"kl: expected shape \(\)"),
    "kl a string": (LOSSES, {"kl": "0"}, TypeError, "kl: expected a number or a 0-d tensor"),
    "kl a bool": (LOSSES, {"kl": False}, TypeError, "kl: expected a number or a 0-d tensor"),
    "kl integer tensor": (LOSSES, {"kl": torch.tensor(1)}, TypeError, "kl: expected dtype"),
    "kl device": (LOSSES, {"kl": torch.zeros((), device="meta")}, ValueError, "kl: expected device cpu"),
    "kl NaN": (LOSSES, {"kl": NAN}, ValueError, "kl: expected a finite number"),
    "kl infinite": (LOSSES, {"kl": -INF}, ValueError, "kl: expected a finite number"),
    "kl beyond floats": (LOSSES, {"kl": 10**400}, ValueError, "kl: expected a finite number"),
    "apo with kl": (LOSSES, {"loss_type": "apo_zero_unpaired"}, ValueError, "kl: .*takes no KL source"),
    "apo with KL logps": (LOSSES, {"loss_type": "apo_zero_unpaired", "kl": None, "kl_logps": SK}, ValueError, "kl: .*takes no KL source"),
    "apo with KL rows": (KL_ROWS, kl_rows(loss_type="apo_zero_unpaired"), ValueError, "kl: .*takes no KL source"),
    # Options
    "beta zero": (LOSSES, {"beta": 0.0}, ValueError, "beta: expected a finite number > 0"),
    "beta negative": (LOSSES, {"beta": -0.1}, ValueError, "beta: expected a finite number > 0"),
    "beta NaN": (LOSSES, {"beta": NAN}, ValueError, "beta: expected a finite number > 0"),
    "beta infinite": (LOSSES, {"beta": INF}, ValueError, "beta: expected a finite number > 0"),
    "beta beyond floats": (LOSSES, {"beta": 10**400}, ValueError, "beta: expected a finite number > 0"),
    "beta a tensor": (LOSSES, {"beta": torch.tensor(0.1)}, TypeError, "beta: expected a number, got Tensor"),
    "weight negative": (LOSSES, {"desirable_weight": -1.0}, ValueError, "desirable_weight: expected a finite number >= 0"),
    "weight NaN": (LOSSES, {"undesirable_weight": NAN}, ValueError, "undesirable_weight: expected a finite number >= 0"),
    "loss_type": (LOSSES, {"loss_type": "dpo"}, ValueError, "loss_type: expected one of 'kto', 'apo_zero_unpaired'"),
    "reduction": (LOSSES, {"reduction": "avg"}, ValueError, "reduction: expected one of"),
    "temperature zero": (SCORING, {"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0"),
    "temperature negative": (SCORING, {"temperature": -1}, ValueError, "temperature: expected a finite number > 0"),
    "temperature bool": (SCORING, {"temperature": True}, TypeError, "temperature: expected a number, got bool"),
    "backend": (SCORING, {"backend": "gpu"}, ValueError, "backend: expected one of 'auto'"),
    "shift": ((*SCORING, sequence_logps), {"shift": 1}, TypeError, "shift: expected True or False"),
    "ignore_index": ((*SCORING, sequence_logps), {"ignore_index": -100.0}, TypeError, "ignore_index: expected an int"),
    "backend an array": (SCORING, {"backend": np.array(["cpu", "torch"])}, ValueError, "backend: expected one of 'auto'"),
    "loss_type an array": (LOSSES, {"loss_type": np.array(["kto", "kto"])}, ValueError, "loss_type: expected one of"),
    "beta an array": (LOSSES, {"beta": np.array([0.1])}, TypeError, "beta: expected a number, got ndarray"),
    "beta NumPy's NaN": (LOSSES, {"beta": np.float32(NAN)}, ValueError, "beta: expected a finite number > 0"),
    "temperature NumPy's bool": (SCORING, {"temperature": np.True_}, TypeError, "temperature: expected a number, got bool"),
    "shift NumPy's int": ((*SCORING, sequence_logps), {"shift": np.int64(1)}, TypeError, "shift: expected True or False"),
    "ignore_index NumPy's float": (SCORING, {"ignore_index": np.float32(-100)}, TypeError, "ignore_index: expected an int"),
    "ignore_index beyond 64 bits": (SCORING, {"ignore_index": 2**63}, ValueError, "ignore_index: expected an int of 64 bits"),
    "average_log_prob": (PACKABLE, {"average_log_prob": "no"}, TypeError, "average_log_prob: expected True or False"),
    "inplace_backward": (FROM_LOGITS, {"inplace_backward": None}, TypeError, "inplace_backward: expected True or False"),
    "process_group": (
        (*LOSSES, kl_reference_point), {"process_group": object()}, TypeError, "process_group: expected a torch.distributed ProcessGroup",
    ),
    "logit_scale 0": (FROM_HIDDEN, {"logit_scale": 0.0}, ValueError, "logit_scale: expected a finite number > 0"),
    "softcap negative": (FROM_HIDDEN, {"softcap": -1.0}, ValueError, "softcap: expected a finite number > 0"),
    "softcap a string": (FROM_HIDDEN, {"softcap": "30"}, TypeError, "softcap: expected a number"),
    "budget float": (FROM_HIDDEN, {"max_logits_bytes": 1e9}, TypeError, "max_logits_bytes: expected an int"),
    "budget 0": (FROM_HIDDEN, {"max_logits_bytes": 0}, ValueError, "max_logits_bytes: expected a number of bytes > 0"),
    "budget too small": (FROM_HIDDEN, {"max_logits_bytes": 43}, ValueError, r"max_logits_bytes: expected at least 44 .*got 43"),
    "long_sequences": ((linear_kto_loss,), {"long_sequences": "drop"}, ValueError, "long_sequences: expected one of 'auto', 'defer', 'recomp"),
    "outputs a string": ((linear_kto_loss,), {"outputs": "entropy"}, TypeError, "outputs: expected a tuple of names"),
    "outputs unknown": ((linear_kto_loss,), {"outputs": ("perplexity",)}, ValueError, "outputs: expected one of 'entropy'"),
    # Packed sequences
    "offsets with padded": (KL_ROWS, {"cu_seqlens": CU}, ValueError, "cu_seqlens: goes with packed"),
    "offsets float": (PACKABLE, packed(CU.float()), TypeError, "cu_seqlens: expected dtype int32, int64"),
    "offsets rank": (PACKABLE, packed(CU[None]), ValueError, r"cu_seqlens: expected shape \(B \+ 1,\)"),
    "offsets empty": (PACKABLE, packed(CU[:0]), ValueError, r"cu_seqlens: expected shape \(B \+ 1,\)"),
    "offsets device": (PACKABLE, packed(CU.to("meta")), ValueError, "cu_seqlens: expected device cpu"),
    "offsets unsorted": (PACKABLE, packed(CU[[0, 2, 1, 3]]), ValueError, "cu_seqlens: expected offsets that rise from 0 to N=12"),
    "offsets not from 0": (PACKABLE, packed(CU + torch.tensor([1, 0, 0, 0])), ValueError, "cu_seqlens: expected offsets that rise"),
    "offsets not to N": (PACKABLE, packed(CU - torch.tensor([0, 0, 0, 1])), ValueError, "cu_seqlens: expected offsets that rise"),
    "offsets past N": (PACKABLE, packed(CU + torch.tensor([0, 0, 0, 1])), ValueError, "cu_seqlens: expected offsets that rise"),
    "offsets too short": (PACKABLE, packed(CU[:3], desirable=GOOD[:2]), ValueError, "cu_seqlens: expected offsets that rise"),
    # In place
    "in place on a leaf": (FROM_LOGITS, {"logits": LEAF, "inplace_backward": True}, ValueError, "inplace_backward: .*leaf"),
    "in place on a view of a leaf": (FROM_LOGITS, {"logits": LEAF[:, :], "inplace_backward": True}, ValueError, "inplace_backward: .*leaf"),
    "in place on an expanded tensor": (
        FROM_LOGITS, {"logits": (LEAF[:1] * 1).expand(B, T, V), "inplace_backward": True}, ValueError, "inplace_backward: .*share memory",
    ),
    "in place on overlapping rows": (
        FROM_LOGITS, {"logits": (LEAF * 1).as_strided((B, T, V), (T * V, 5, 1)), "inplace_backward": True}, ValueError, "inplace_backward: .*share memory",
    ),
    # Backends
    "fp64 on the cpu backend": (FROM_LOGITS, {"logits": LOGITS.double(), "backend": "cpu"}, TypeError, "logits: backend='cpu' takes"),
    "fp64 hidden on the cpu backend": (
        FROM_HIDDEN, {"hidden": HIDDEN.double(), "backend": "cpu"}, TypeError, "hidden, weight: backend='cpu' takes bfloat16, float16, float32, got float64",
    ),
}  # fmt: skip


def call(function, changes):
    known = inspect.signature(function).parameters
    return function(**VALID[function] | {name: value for name, value in changes.items() if name in known})


@pytest.mark.parametrize(
    ("function", "row"),
    [pytest.param(f, name, id=f"{f.__name__}-{name.replace(' ', '-')}") for name, row in TABLE.items() for f in row[0]],
)
def test_bad_input_is_an_error_that_names_the_argument(function, row):
    _, changes, error, message = TABLE[row]
    with pytest.raises(error, match=message) as raised:
        call(function, changes)
    assert re.match(r"[a-z_0-9, ]+: ", str(raised.value))
    # Arguments of another function are no help.
    others = re.findall(r"\b(?:ref_|kl_|ref_kl_)(?:logits|hidden|logps)\b", str(raised.value))
    assert {*others} <= {*inspect.signature(function).parameters}


@pytest.mark.parametrize("function", VALID, ids=[f.__name__ for f in VALID])
def test_the_unchanged_call_is_valid(function):
    for changes in ({}, packed(CU)) if function in PACKABLE else ({},):
        out = call(function, changes)
        assert torch.isfinite(getattr(out, "loss", out)).all()


def test_changes_of_many_functions_are_valid_where_they_are_not_the_error():
    for function in KL_ROWS:
        assert torch.isfinite(call(function, kl_rows()).loss)
    assert torch.isfinite(call(linear_kto_loss, {"ref_hidden": HIDDEN, "ref_weight": WEIGHT}).loss)
    # A step of rows that only touch, and a stride of a dimension of one: nothing overlaps.
    x = (LEAF * 1)[:1].as_strided((1, T, V), (0, V, 1))
    assert call(token_logps, {"logits": x, "labels": LABELS[:1], "inplace_backward": True}).shape == (1, T)


# The ends of messages on options that go with some tensors.
OF_THE_TENSORS = (f"got {2 * V}", "got 43", "takes no KL source")


def test_modules_refuse_what_the_functions_refuse():
    """At construction, each bad option of the table."""
    refused = 0
    for module, function in ((KTOLoss, kto_loss), (LinearKTOLoss, linear_kto_loss)):
        options = set(inspect.signature(module).parameters) - {"process_group"}
        for functions, changes, error, message in TABLE.values():
            if function in functions and set(changes) <= options and not message.endswith(OF_THE_TENSORS):
                refused += 1
                with pytest.raises(error, match=message):
                    module(**changes)
    assert refused > 40


NUMPYS = {
    "beta": np.float32(0.25),
    "desirable_weight": np.int64(2),
    "undesirable_weight": np.float16(0.5),
    "temperature": np.float64(2.0),
    "logit_scale": np.float32(0.5),
    "softcap": np.float32(8.0),
    "max_logits_bytes": np.int32(2 * V * 4),
    "ignore_index": np.int64(-7),
    "vocab": np.int64(V),
    "shift": np.True_,
    "average_log_prob": np.bool_(True),
    "inplace_backward": np.False_,
    "kl": np.float32(0.125),
    "scored_lengths": [np.int64(T - 1)] * B,
}


@pytest.mark.parametrize("observed", [False, True], ids=["direct", "operator"])
@pytest.mark.parametrize("function", [*LOSSES, *SCORING[1::2], sequence_logps], ids=lambda f: f.__name__)
def test_numpys_numbers_mean_what_pythons_mean(function, observed):
    def plain(value):
        return [plain(x) for x in value] if isinstance(value, list) else value.item()

    labels = {"labels": LABELS} if function is sequence_logps else {}
    with FlopCounterMode(display=False) if observed else contextlib.nullcontext():
        found = call(function, NUMPYS | labels)
        expected = call(function, {name: plain(value) for name, value in NUMPYS.items()} | labels)
    assert torch.equal(getattr(found, "loss", found), getattr(expected, "loss", expected))


def test_records_keep_pythons_numbers():
    kept = [Scale(*[np.float32(2)] * 3), Objective(*[np.float32(1)] * 3, np.True_), Chunking(np.int64(9))]
    kept.append(Scoring(Scale(), np.True_, np.int8(3)))
    values = [value for record in kept for value in vars(record).values() if not isinstance(value, (Scale, tuple))]
    assert {type(value) for value in values} == {float, int, bool, str}
    KTOLoss(beta=np.float32(0.1), shift=np.True_, vocab=np.int64(V), inplace_backward=np.False_)


def test_meta_tensors_have_shapes_and_no_values():
    meta = [tensor.to("meta") for tensor in (HIDDEN, WEIGHT, LABELS, GOOD)]
    assert linear_kto_loss(*meta, kl=0.0, outputs=("entropy",)).entropy.shape == (B, T)


def test_unavailable_backend_says_why(monkeypatch):
    monkeypatch.setattr(type(BACKENDS["cpu"]), "unavailable", lambda self, device: "it was taken away")
    for function in SCORING:
        with pytest.raises(RuntimeError, match="backend='cpu' is not available: it was taken away"):
            call(function, {"backend": "cpu"})


@pytest.mark.parametrize("function", PACKABLE, ids=[f.__name__ for f in PACKABLE])
def test_empty_sequences_are_no_bad_input(function):
    """Two equal offsets: packing makes them, and a rank of a context-parallel group may have no token of a sequence. They
    score 0, and the others what they score without them."""
    good = torch.tensor([True, True, False, False, True, True])
    out = call(function, packed(CU[[0, 0, 1, 2, 2, 3, 3]], desirable=torch.cat([good, good[:0]])))
    full = call(function, packed(CU))
    values, expected = (getattr(x, "logps", x) for x in (out, full))
    assert values[[0, 3, 5]].tolist() == [0, 0, 0]
    assert torch.equal(values[[1, 2, 4]], expected)


# Values that a GPU would have to be asked for ─────────────────────────────────────────────────────────────────────────


@places
@pytest.mark.parametrize("outside", [-1, 131, 2**31 - 1, -(2**31)])
def test_labels_outside_the_vocabulary_score_nothing_where_they_are_not_looked_at(outside, place, monkeypatch):
    """The way of a GPU without KTO_KERNELS_DEBUG: finite, and as if the label were ignored."""
    if place[1] == "cpu":
        monkeypatch.setattr(checks, "readable", lambda tensor: False)
    for options in ({"packed": True, "shift": True}, {"average_log_prob": True, "label_dtype": torch.int32}):
        p = problem(**options).to(torch.float32, place[1])
        at, kl_at = (0, 1) if p.labels.dim() == 1 else ((0, 1), (0, 1))
        p.labels[at] = p.tensors["kl_labels"][kl_at] = -100
        expected, expected_grad = ours(p, place[0])
        p.labels[at] = p.tensors["kl_labels"][kl_at] = outside
        out, grad = ours(p, place[0])
        assert torch.equal(out.loss, expected.loss) and torch.equal(out.logps, expected.logps)
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)])
def test_labels_outside_the_vocabulary_from_hidden_states(trained, monkeypatch):
    p = linear_problem(kl="number", average_log_prob=True)
    p.labels[0, 2] = -100
    expected, expected_grads = ours_linear(p, "cpu", trained)
    monkeypatch.setattr(checks, "readable", lambda tensor: False)
    p.labels[0, 2] = 10**6
    out, grads = ours_linear(p, "cpu", trained)
    assert torch.equal(out.loss, expected.loss)
    assert all(torch.equal(grads[name], expected_grads[name]) for name in trained)


class Elsewhere(torch.Tensor):
    """A CPU tensor that says it is on a GPU: what the checks do there, without one."""

    device = property(lambda self: torch.device("cuda", 0))


@pytest.mark.parametrize("debug", [False, True])
def test_debug_mode_looks_at_values_on_every_device(debug, monkeypatch):
    monkeypatch.setenv("KTO_KERNELS_DEBUG", "1" if debug else "0")
    labels, offsets = OUTSIDE.as_subclass(Elsewhere), CU[[0, 2, 1, 3]].as_subclass(Elsewhere)
    for look, message in (
        (
            lambda: checks.label_values(labels, V, -100, "kl_"),
            r"kl_labels: expected 0 <= label < 11 .*got 11 at \(1, 2\)",
        ),
        (
            lambda: checks.offset_values("cu_seqlens", offsets, 12),
            "cu_seqlens: expected offsets that rise from 0 to N=12",
        ),
    ):
        if debug:
            with pytest.raises(ValueError, match=message):
                look()
        else:
            look()
    meta = [tensor.to("meta") for tensor in (LOGITS, LABELS, GOOD)]
    assert kto_loss(*meta, kl=0.0).loss.shape == ()  # nothing to look at


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("function", SCORING, ids=[f.__name__ for f in SCORING])
def test_debug_mode_finds_bad_labels_on_a_gpu(function, monkeypatch):
    on_gpu = {name: v.cuda() for name, v in VALID[function].items() if isinstance(v, torch.Tensor)}
    on_gpu["labels"] = OUTSIDE.cuda()
    assert torch.isfinite(getattr(call(function, on_gpu), "loss", torch.zeros(()))).all()
    monkeypatch.setenv("KTO_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"labels: expected 0 <= label < 11 .*got 11 at \(1, 2\)"):
        call(function, on_gpu)


# NaN and +inf ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@places
def test_a_nan_estimate_is_seen_in_every_loss(place):
    p = problem(kl="tensor", ref_kl=None, reduction="none").to(torch.float32, place[1])
    p.tensors["kl"] = p.tensors["kl"] * NAN
    out, _ = ours(p, place[0])
    assert out.kl.isnan() and out.loss.isnan().all()
