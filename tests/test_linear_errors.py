"""Bad input to `linear_kto_loss` and `linear_token_logps`: the message names the argument, before any work."""

import pytest
import torch

from kto_kernels import linear_kto_loss, linear_token_logps

B, T, H, V, K = 3, 4, 6, 11, 2
HIDDEN, WEIGHT, BIAS = torch.randn(B, T, H), torch.randn(V, H), torch.randn(V)
LABELS = torch.randint(V, (B, T))
GOOD = torch.tensor([True, False, True])
KL_HIDDEN, KL_LABELS = torch.randn(K, T, H), torch.randint(V, (K, T))
S, SK = torch.randn(B), torch.randn(K)
OUTSIDE = LABELS.clone()
OUTSIDE[1, 2] = V
KL_OUTSIDE = KL_LABELS.clone()
KL_OUTSIDE[1, 3] = V
PACKED = {"hidden": HIDDEN.flatten(0, 1), "labels": LABELS.flatten()}
CU = torch.tensor([0, 4, 8, 12])
REF = {"ref_hidden": HIDDEN, "ref_weight": WEIGHT}
KL = {"kl": None, "kl_hidden": KL_HIDDEN, "kl_labels": KL_LABELS}

# (changes to a valid call, error, what the message must say)
TABLE = {
    "hidden no tensor": ({"hidden": [1.0]}, TypeError, "hidden: expected a tensor, got list"),
    "hidden integer": ({"hidden": HIDDEN.long()}, TypeError, "hidden: expected dtype"),
    "hidden rank": ({"hidden": HIDDEN[0, 0]}, ValueError, r"hidden: expected \(B, T, H\) or packed \(N, H\)"),
    "hidden width": ({"hidden": HIDDEN[..., 1:]}, ValueError, r"hidden: expected 6 features as weight of shape \(11, 6\)"),
    "hidden packed without offsets": ({"hidden": HIDDEN[0], "labels": LABELS[0]}, ValueError, r"\(N, H\) with cu_seqlens"),
    "weight no tensor": ({"weight": None}, TypeError, "weight: expected a tensor, got NoneType"),
    "weight integer": ({"weight": WEIGHT.long()}, TypeError, "weight: expected dtype"),
    "weight rank": ({"weight": WEIGHT[0]}, ValueError, r"weight: expected \(V, H\)"),
    "weight empty": ({"weight": WEIGHT[:0]}, ValueError, r"weight: expected \(V, H\) with V >= 1"),
    "weight device": ({"weight": WEIGHT.to("meta")}, ValueError, "weight: expected device cpu"),
    "bias shape": ({"bias": BIAS[1:]}, ValueError, r"bias: expected shape \(11,\)"),
    "bias integer": ({"bias": BIAS.long()}, TypeError, "bias: expected dtype"),
    "labels shape": ({"labels": LABELS[:, 1:]}, ValueError, r"labels: expected shape \(3, 4\)"),
    "labels float": ({"labels": LABELS.float()}, TypeError, "labels: expected dtype int32, int64"),
    "label too large": ({"labels": OUTSIDE}, ValueError, r"labels: expected 0 <= label < 11 .*got 11 at \(1, 2\)"),
    "offsets too short": ({**PACKED, "cu_seqlens": torch.tensor([0, 4, 8, 11])}, ValueError, "cu_seqlens: expected offsets"),
    "offsets with padding": ({"cu_seqlens": CU}, ValueError, r"cu_seqlens: goes with packed \(N, H\) hidden"),
    "desirable ints": ({"desirable": GOOD.long()}, TypeError, "desirable: expected dtype bool"),
    "desirable shape": ({"desirable": GOOD[:2]}, ValueError, r"desirable: expected shape \(3,\)"),
    "both references": ({**REF, "ref_logps": S}, ValueError, "ref_hidden, ref_logps: expected one"),
    "no reference head": ({"ref_hidden": HIDDEN}, ValueError, "ref_weight: goes with ref_hidden.*ref_weight=weight"),
    "reference head alone": ({"ref_weight": WEIGHT}, ValueError, "ref_weight: goes with ref_hidden"),
    "reference bias alone": ({"ref_bias": BIAS}, ValueError, "ref_bias: goes with ref_weight"),
    "reference vocabulary": ({**REF, "ref_weight": WEIGHT[1:]}, ValueError, "ref_weight: expected a vocabulary of 11"),
    "reference width": ({**REF, "ref_hidden": HIDDEN[..., 1:]}, ValueError, "ref_hidden: expected 6 features as ref_weight"),
    "reference tokens": ({**REF, "ref_hidden": HIDDEN[:, 1:]}, ValueError, r"ref_hidden: expected shape \(3, 4, 6\)"),
    "ref_logps shape": ({"ref_logps": S[:1]}, ValueError, r"ref_logps: expected shape \(3,\)"),
    "no KL source": ({"kl": None}, ValueError, "kl: loss_type='kto' needs a KL source"),
    "two KL sources": ({"kl_logps": SK}, ValueError, "kl: expected one KL source"),
    "KL both forms": ({**KL, "kl_logps": SK}, ValueError, "kl_hidden, kl_logps: expected one"),
    "KL without labels": ({**KL, "kl_labels": None}, ValueError, "kl_labels: needed with kl_hidden"),
    "KL labels alone": ({"kl_labels": KL_LABELS}, ValueError, "kl_labels, kl_cu_seqlens: go with kl_hidden"),
    "KL label too large": ({**KL, "kl_labels": KL_OUTSIDE}, ValueError, r"kl_labels: expected 0 <= label < 11 .*\(1, 3\)"),
    "KL width": ({**KL, "kl_hidden": KL_HIDDEN[..., 1:]}, ValueError, "kl_hidden: expected 6 features as weight"),
    "KL reference missing": ({**KL, **REF}, ValueError, "needed with a reference model"),
    "KL under apo": ({**KL, "loss_type": "apo_zero_unpaired"}, ValueError, "kl: loss_type='apo_zero_unpaired'"),
    "logit_scale 0": ({"logit_scale": 0.0}, ValueError, "logit_scale: expected a finite number > 0"),
    "softcap negative": ({"softcap": -1.0}, ValueError, "softcap: expected a finite number > 0"),
    "softcap a string": ({"softcap": "30"}, TypeError, "softcap: expected a number"),
    "budget float": ({"max_logits_bytes": 1e9}, TypeError, "max_logits_bytes: expected an int"),
    "budget 0": ({"max_logits_bytes": 0}, ValueError, "max_logits_bytes: expected a number of bytes > 0"),
    "budget too small": ({"max_logits_bytes": 43}, ValueError, r"max_logits_bytes: expected at least 44 .*got 43"),
    "long_sequences": ({"long_sequences": "drop"}, ValueError, "long_sequences: expected one of 'auto', 'defer', 'recomp"),
    "outputs a string": ({"outputs": "entropy"}, TypeError, "outputs: expected a tuple of names"),
    "outputs unknown": ({"outputs": ("perplexity",)}, ValueError, "outputs: expected one of 'entropy'"),
    "beta 0": ({"beta": 0}, ValueError, "beta: expected a finite number > 0"),
    "reduction": ({"reduction": "batchmean"}, ValueError, "reduction: expected one of"),
    "backend": ({"backend": "tpu"}, ValueError, "backend: expected one of"),
    "process group": ({"process_group": object()}, TypeError, "process_group"),
}  # fmt: skip


def arguments(**changes):
    valid = {"hidden": HIDDEN, "weight": WEIGHT, "labels": LABELS, "desirable": GOOD, "kl": 0.0}
    given = valid | changes
    return [given.pop(name) for name in ("hidden", "weight", "labels", "desirable")], given


@pytest.mark.parametrize("case", TABLE)
def test_bad_input(case):
    changes, error, message = TABLE[case]
    positional, options = arguments(**changes)
    with pytest.raises(error, match=message):
        linear_kto_loss(*positional, **options)


def test_the_valid_call_is_valid():
    positional, options = arguments()
    linear_kto_loss(*positional, **options)
    positional, options = arguments(**KL, **REF, ref_kl_hidden=KL_HIDDEN)
    linear_kto_loss(*positional, **options)


SEAM = [
    name
    for name, (changes, _, _) in TABLE.items()
    if set(changes) <= {"hidden", "weight", "bias", "labels", "logit_scale", "softcap", "max_logits_bytes", "backend"}
    and name != "hidden packed without offsets"  # one sequence here
]


@pytest.mark.parametrize("case", SEAM)
def test_bad_input_to_the_seam(case):
    changes, error, message = TABLE[case]
    (hidden, weight, labels, _), options = arguments(**changes)
    options.pop("kl")
    with pytest.raises(error, match=message):
        linear_token_logps(hidden, weight, labels, **options)


def test_a_backend_that_does_not_take_the_dtype_says_so():
    with pytest.raises(TypeError, match="hidden, weight: backend='cpu' takes bfloat16, float16, float32, got float64"):
        linear_token_logps(HIDDEN.double(), WEIGHT, LABELS, backend="cpu")


def test_meta_tensors_have_shapes():
    meta = [tensor.to("meta") for tensor in (HIDDEN, WEIGHT, LABELS, GOOD)]
    assert linear_kto_loss(*meta, kl=0.0, outputs=("entropy",)).entropy.shape == (B, T)
