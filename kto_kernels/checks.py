"""Validation: every argument is checked before any work, and the error names it and says what was expected.

A wrong type or dtype is a TypeError. A wrong shape, device or number is a ValueError, and so are arguments that exclude
or lack each other. A valid request that is not supported is a NotImplementedError.

The values of labels and offsets are checked on the CPU, where reading them is free. On a GPU the check would wait for
the device: there a label outside the vocabulary scores nothing and bad offsets give undefined results, unless the
environment has KTO_KERNELS_DEBUG=1.
"""

from __future__ import annotations

import numbers
import os
import sys
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def is_dtensor(value: object) -> bool:
    if type(value) in (Tensor, nn.Parameter, type(None)):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # slow to import; while it is not, no DTensor exists
    return module is not None and isinstance(value, module.DTensor)


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], like: Tensor | None = None) -> None:
    """Checks that `value` is a tensor of one of `dtypes`, on the device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if is_dtensor(value):
        raise TypeError(f"{name}: expected a plain tensor, got a DTensor; pass this rank's part of it, .to_local()")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {value.layout}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {str(value.dtype).removeprefix('torch.')}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device} as for the logits, got {value.device}")


def reverse_mode(name: str, value: Tensor) -> None:
    """Checks that neither `torch.func` nor forward mode differentiates `value`: the operators would silently drop the
    tangent."""
    if torch.compiler.is_compiling():
        return
    inner, followed = value, False
    while functorch.is_functorch_wrapped_tensor(inner):
        followed = followed or functorch.is_gradtrackingtensor(inner)
        inner = functorch.get_unwrapped(inner)
    if followed or forward_ad.unpack_dual(inner).tangent is not None:
        raise NotImplementedError(
            f"{name}: torch.func.grad, vjp, jvp and forward-mode derivatives are not supported; use backward() or "
            "torch.autograd.grad, or the stages of kto_kernels.reference, which are plain PyTorch"
        )


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)} ({meaning}), got {_shape(value)}")


# Options may be NumPy's numbers and flags, and come back as Python's.


def number(name: str, value: object, *, positive: bool) -> float:
    """Checks that `value` is a finite number, greater than 0 (`positive`) or at least 0, and returns it as Python's."""
    if not _is_real(value):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    value = value if type(value) in (int, float) else float(value)
    # Comparisons, not math.isfinite: torch.compile may trace with a symbolic number. NaN fails the comparisons too.
    if not (0 <= value <= sys.float_info.max) or (positive and value == 0):
        raise ValueError(f"{name}: expected a finite number {'> 0' if positive else '>= 0'}, got {value}")
    return value


def _is_real(value: object) -> TypeGuard[float]:
    return not isinstance(value, bool) and isinstance(value, (int, float, numbers.Real))


def scalar(name: str, value: object, like: Tensor | None = None) -> None:
    """Checks a finite number of either sign, or a () tensor of one."""
    if isinstance(value, Tensor):
        tensor(name, value, FLOATS, like)
        shape(name, value, (), "one number")
    elif not _is_real(value):
        raise TypeError(f"{name}: expected a number or a 0-d tensor, got {type(value).__name__}")
    elif not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def flag(name: str, value: object) -> bool:
    numpys = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    if not isinstance(value, bool) and not numpys:
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__} ({value!r})")
    return bool(value)


def integer(name: str, value: object) -> int:
    if isinstance(
        value, torch.SymInt
    ):  # of a graph that torch.compile makes for all values; they are checked as it runs
        return value
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {value}")
    return value if type(value) is int else int(value)


def vocabulary_size(vocab: object, columns: int, sharded: bool) -> None:
    """Checks that `vocab` is None or the number of `columns` given. Sharded, it may be any size: the ranks together
    have more columns than these."""
    if vocab is None:
        return
    vocab = integer("vocab", vocab)
    if vocab < 1 or not (sharded or vocab == columns):
        raise ValueError(
            f"vocab: expected {'a size >= 1' if sharded else f'{columns}, the columns given'}, got {vocab}"
        )


def unshifted(shift: bool, context_group: object) -> None:
    """Checks that labels are not shifted in a context group, where a rank lacks the label after its last token."""
    if shift and context_group is not None:
        raise ValueError(
            "shift: with a context_group the label of a rank's last token is on another rank; shift the labels before "
            "the sequences are cut, and pass shift=False"
        )


def rows(
    logits: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    prefix: str = "",
    name: str = "logits",
    *,
    like: Tensor | None = None,
    packed: bool = True,
    sharded: bool = False,
) -> int:
    """Checks logits called `name` with the labels that score them, and returns the number of sequences. `prefix` begins
    the names of labels and offsets. Without `packed`, two-dimensional logits are one sequence and need no offsets."""
    vocabulary(name, logits, like, sharded)
    tensor(f"{prefix}labels", labels, INTEGERS, like=logits)
    return _layout(logits, labels, cu_seqlens, prefix, name, "V", packed)


def _layout(
    values: Tensor, labels: Tensor, cu_seqlens: Tensor | None, prefix: str, name: str, last: str, packed: bool
) -> int:
    """The number of sequences in padded (B, T, last) or packed (N, last) values."""
    shape(f"{prefix}labels", labels, tuple(values.shape[:-1]), f"{name} without its last dimension")
    if values.dim() == 3:
        if cu_seqlens is not None:
            raise ValueError(
                f"{prefix}cu_seqlens: goes with packed (N, {last}) {name}, got {name} of shape {_shape(values)}"
            )
        return values.shape[0]
    if not packed:
        return 1
    if cu_seqlens is None:
        raise ValueError(
            f"{name}: expected (B, T, {last}), or (N, {last}) with {prefix}cu_seqlens; got shape {_shape(values)}"
        )
    return offsets(f"{prefix}cu_seqlens", cu_seqlens, values)


def head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "", name: str = "hidden", sharded: bool = False
) -> None:
    """Checks a head (V, H) with its bias (V,), and the hidden states called `name` that the head projects. `sharded`
    allows V = 0, as on a rank of a vocabulary group."""
    tensor(name, hidden, FLOATS)
    tensor(f"{prefix}weight", weight, FLOATS, like=hidden)
    if weight.dim() != 2 or weight.shape[1] == 0 or (weight.shape[0] == 0 and not sharded):
        raise ValueError(f"{prefix}weight: expected (V, H) with V >= 1 and H >= 1, got shape {_shape(weight)}")
    if hidden.dim() not in (2, 3):
        raise ValueError(f"{name}: expected (B, T, H) or packed (N, H), got shape {_shape(hidden)}")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: expected {weight.shape[1]} features as {prefix}weight of shape {_shape(weight)}, "
            f"got shape {_shape(hidden)}"
        )
    if bias is not None:
        tensor(f"{prefix}bias", bias, FLOATS, like=hidden)
        shape(f"{prefix}bias", bias, weight.shape[:1], "one per token of the vocabulary")
        reverse_mode(f"{prefix}bias", bias)
    reverse_mode(name, hidden)
    reverse_mode(f"{prefix}weight", weight)


def adapter(value: object) -> tuple[Tensor, Tensor, float]:
    """Checks that an adapter is (A, B, scaling), and returns the scaling as Python's number."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        got = f"{len(value)} values" if isinstance(value, (tuple, list)) else type(value).__name__
        raise TypeError(f"adapter: expected (A, B, scaling), got {got}")
    a, b, scaling = value
    return a, b, number("adapter: scaling", scaling, positive=False)


def adapter_tensors(a: Tensor, b: Tensor, weight: Tensor) -> None:
    """Checks A (r, H) and B (V, r), which belong to a weight (V, H)."""
    for name, value in (("adapter: A", a), ("adapter: B", b)):
        tensor(name, value, FLOATS, like=weight)
        reverse_mode(name, value)
    vocab, width = weight.shape
    if a.dim() != 2 or a.shape[0] == 0 or a.shape[1] != width:
        raise ValueError(
            f"adapter: A: expected (r, {width}) with r >= 1 and the features of weight, got shape {_shape(a)}"
        )
    shape("adapter: B", b, (vocab, a.shape[0]), "the rows of weight, and the rank of A")


def reference_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, name: str, policy: Tensor, sharded: bool = False
) -> None:
    """Checks the reference's head, whose vocabulary is the policy's. The hidden states may have another width."""
    head(hidden, weight, bias, "ref_", name, sharded)
    if weight.shape[0] != policy.shape[0]:
        raise ValueError(f"ref_weight: expected a vocabulary of {policy.shape[0]} as weight, got {weight.shape[0]}")
    if hidden.device != policy.device:
        raise ValueError(f"{name}: expected device {policy.device} as weight, got {hidden.device}")


def hidden_rows(
    hidden: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    prefix: str = "",
    name: str = "hidden",
    *,
    packed: bool = True,
) -> int:
    """Checks hidden states called `name` with the labels that score them, and returns the number of sequences."""
    tensor(f"{prefix}labels", labels, INTEGERS, like=hidden)
    return _layout(hidden, labels, cu_seqlens, prefix, name, "H", packed)


def outputs(value: object, choices: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (tuple, list)):
        raise TypeError(f"outputs: expected a tuple of names out of {', '.join(map(repr, choices))}, got {value!r}")
    for name in value:
        choice("outputs", name, choices)
    return tuple(name for name in choices if name in value)


def offsets(name: str, cu_seqlens: Tensor, like: Tensor) -> int:
    """Checks offsets `cu_seqlens` (B + 1,), and returns B."""
    tensor(name, cu_seqlens, INTEGERS, like)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name}: expected shape (B + 1,), got {_shape(cu_seqlens)}")
    return cu_seqlens.shape[0] - 1


def vocabulary(name: str, logits: Tensor, like: Tensor | None = None, sharded: bool = False) -> None:
    """Checks floating logits of two or three dimensions, contiguous along the vocabulary. `sharded` allows an empty
    vocabulary."""
    tensor(name, logits, FLOATS if like is None else (like.dtype,), like)
    if logits.dim() not in (2, 3):
        raise ValueError(f"{name}: expected (B, T, V) or packed (N, V), got shape {_shape(logits)}")
    if logits.shape[-1] == 0 and not sharded:
        raise ValueError(f"{name}: expected a vocabulary of at least one token, got shape {_shape(logits)}")
    if like is not None and logits.shape[-1] != like.shape[-1]:
        raise ValueError(f"{name}: expected a vocabulary of {like.shape[-1]} as for the logits, got {logits.shape[-1]}")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            f"{name}: expected stride 1 along the vocabulary, got {logits.stride(-1)}; pass {name}.contiguous()"
        )
    reverse_mode(name, logits)


def sequences(name: str, value: Tensor, count: int, meaning: str, like: Tensor) -> None:
    """Checks floating sequence log-probabilities (count,)."""
    tensor(name, value, FLOATS, like)
    shape(name, value, (count,), meaning)


def weight_values(name: str, value: Tensor) -> None:
    """Checks that weights are finite and >= 0, where they may be read."""
    if readable(value) and not bool(((value >= 0) & (value < torch.inf)).all()):
        raise ValueError(f"{name}: expected finite numbers >= 0")


def desirable(value: Tensor, count: int, like: Tensor) -> None:
    tensor("desirable", value, (torch.bool,), like)
    shape("desirable", value, (count,), "one per sequence")


def kl_source(
    loss_type: str,
    kl: Tensor | float | None,
    like: Tensor,
    values: tuple[str, ...],
    *,
    has_reference: bool,
    has_kl: bool,
    has_ref_kl: bool,
) -> None:
    """Checks that there is one source of the reference point under "kto", and none under "apo_zero_unpaired". `values`
    are what the function takes beside numbers and before "logps": logits, hidden states, or nothing."""

    def names(prefix: str, joint: str) -> str:
        return joint.join(f"{prefix}{each}" for each in (*values, "logps"))

    if loss_type == "apo_zero_unpaired":
        if kl is not None or has_kl or has_ref_kl:
            raise ValueError("kl: loss_type='apo_zero_unpaired' has z0 = 0 and takes no KL source")
        return
    if kl is not None and (has_kl or has_ref_kl):
        raise ValueError("kl: expected one KL source, got kl and kl_*/ref_kl_*")
    if has_ref_kl and not has_kl:
        raise ValueError(f"{names('ref_kl_', ', ')}: go with {names('kl_', ' or ')}, got neither")
    if kl is None and not has_kl:
        raise ValueError(
            f"kl: loss_type='kto' needs a KL source: kl or {names('kl_', ' or ')}. For a reference point of zero ask for "
            "kl=0.0 (loss_type='apo_zero_unpaired' is the same by definition)"
        )
    if has_kl and has_reference and not has_ref_kl:
        raise ValueError(f"{names('ref_kl_', ', ')}: needed with a reference model, got neither")
    if has_ref_kl and not has_reference:
        raise ValueError(f"{names('ref_kl_', ', ')}: go with {names('ref_', ' or ')}, got neither")
    if kl is not None:
        scalar("kl", kl, like)


def kl_pair(kl_logps: Tensor | None, ref_kl_logps: Tensor | None, count: int | None, like: Tensor) -> None:
    """Checks the sequence log-probabilities (K,) of the two sides of the KL estimate. `count` is K where logits or
    hidden states of one of these sides tell it already."""
    for name, value in (("kl_logps", kl_logps), ("ref_kl_logps", ref_kl_logps)):
        if value is None:
            continue
        tensor(name, value, FLOATS, like)
        if value.dim() != 1:
            raise ValueError(f"{name}: expected shape (K,), got {_shape(value)}")
        if count is not None:
            shape(name, value, (count,), "one per mismatched completion")
        count = value.shape[0]


def in_place(inplace_backward: object, logits: Tensor) -> None:
    """Checks the option `inplace_backward`; where it is set, also that the gradient may overwrite these logits."""
    flag("inplace_backward", inplace_backward)
    if not (inplace_backward and logits.requires_grad and torch.is_grad_enabled()):
        return
    # torch.compile does not trace `_base`: under it a view of a leaf goes unnoticed.
    base = None if torch.compiler.is_compiling() else logits._base
    if logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
        raise ValueError(
            "inplace_backward: the logits are a leaf (a parameter or an input that requires grad), whose value the "
            "gradient would overwrite; pass the output of a computation, or inplace_backward=False"
        )
    if _overlaps(logits):
        raise ValueError(
            "inplace_backward: the logits are expanded or overlap (several rows share memory); pass logits.clone()"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory: some stride does not reach past all elements along the smaller strides."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def debugging() -> bool:
    """Whether to make the checks that cost time too: of values on a GPU, and of ranks that hold the same part."""
    return os.environ.get("KTO_KERNELS_DEBUG") == "1"


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values, which do not become part of a graph where they are read."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return get_proxy_mode() is None


PLAIN: tuple[type[Tensor], ...] = (Tensor, nn.Parameter)


def plain(x: Tensor | None) -> bool:
    """Whether a kernel may read the memory of `x`: there is memory, and it holds the values of `x` themselves."""
    return x is None or (
        type(x) in PLAIN
        and torch._C._has_storage(x)  # not so for the wrappers of `vmap`
        and not (x.is_meta or x.is_neg() or x._is_zerotensor())
    )


def readable(tensor: Tensor) -> bool:
    """Whether to read values, where there are any: on the CPU always, elsewhere (reading waits for the device) under
    KTO_KERNELS_DEBUG=1."""
    return (tensor.device.type == "cpu" or debugging()) and has_values(tensor)


def row_values(labels: Tensor, cu_seqlens: Tensor | None, vocab: int, ignore_index: int, prefix: str = "") -> None:
    """Checks values: labels inside the vocabulary, cu_seqlens that rise from 0 to N."""
    label_values(labels, vocab, ignore_index, prefix)
    if cu_seqlens is not None:
        offset_values(f"{prefix}cu_seqlens", cu_seqlens, labels.numel())


def scored_lengths(name: str, value: object, count: int, labels: Tensor, shift: bool) -> Tensor | None:
    """The numbers of scored positions that the caller gave, as a tensor on the CPU. They are checked without a look at
    the labels: one for each of the `count` sequences, and no more than the sequence has positions."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        tensor(name, value, INTEGERS)
        if value.device.type != "cpu":
            raise ValueError(f"{name}: expected ints, or a tensor on the CPU, got device {value.device}")
        shape(name, value, (count,), "one per sequence")
        if has_values(value):
            try:
                lengths = value.tolist()
            except RuntimeError as error:  # a wrapper of other tensors
                raise TypeError(
                    f"{name}: expected ints, or a plain tensor of them, got {type(value).__name__}"
                ) from error
            _lengths_in_range(name, lengths, labels, shift)
        return value.to(torch.int64, copy=True)  # the caller may fill this memory again before the backward
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of ints, or a tensor on the CPU, got {type(value).__name__}")
    value = [integer(name, length) for length in value]
    if len(value) != count:
        raise ValueError(f"{name}: expected {count} ints, one per sequence, got {len(value)}")
    _lengths_in_range(name, value, labels, shift)
    return torch.tensor(value, dtype=torch.int64, device="cpu")


def _lengths_in_range(name: str, lengths: Sequence[int], labels: Tensor, shift: bool) -> None:
    packed, rows = labels.dim() == 1, labels.shape[-1]
    most = rows if packed else max(0, rows - shift)
    for length in lengths:
        if not 0 <= length <= most:
            raise ValueError(f"{name}: expected 0 <= length <= {most}, the positions that may score, got {length}")
    if packed and sum(lengths) > rows:
        raise ValueError(f"{name}: expected a sum of at most {rows}, the rows given, got {sum(lengths)}")


def scored_length_values(lengths: list[int], counts: Tensor, labels: Tensor, shift: bool, prefix: str = "") -> None:
    """Checks the numbers of scored positions that the caller gave against those counted on the device, where these may
    be read."""
    name = f"{prefix}scored_lengths"
    _lengths_in_range(name, lengths, labels, shift)
    if readable(counts) and lengths != (found := counts.tolist()):
        raise ValueError(f"{name}: expected {found}, the scored positions of each sequence, got {lengths}")


def label_values(labels: Tensor, vocab: int, ignore_index: int, prefix: str = "") -> None:
    if not readable(labels):
        return
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"{prefix}labels: expected 0 <= label < {vocab} or ignore_index={ignore_index}, "
            f"got {labels[where].item()} at {where}"
        )


def offset_values(name: str, cu_seqlens: Tensor, n_rows: int) -> None:
    """Checks that offsets rise from 0 to N. Two equal offsets make an empty sequence, which scores 0: trainers that
    pack make such sequences, and a rank of a context group may have no token of a sequence."""
    if not readable(cu_seqlens):
        return
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != n_rows or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"{name}: expected offsets that rise from 0 to N={n_rows}, got {cu_seqlens.tolist()}")
