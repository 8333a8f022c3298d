"""Puts TRL 1.16's fused head on a model, on more models than TRL's own `add_fused_lm_head` supports. The fused head
keeps no reference to a model: copies of a model score with their own weights, and a pickled model has no fused head."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import operator
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..linear.head import gemm_dtype
from ..parallel import dtensor
from . import verify as verification
from .trl_scoring import ChunkedLogProbFunction, current_adapter, scored_by, scores_as_trl, trl_utils, with_adapter

_theirs = trl_utils.add_fused_lm_head
_log = logging.getLogger("kto_kernels")

# Attributes of a model's config, beside the ones that TRL reads.
_SOFTCAPS = ("logits_soft_cap", "output_logit_soft_cap")  # RecurrentGemma, xLSTM
_DIVISORS = ("logits_mup_width_multiplier",)  # Inkling divides its hidden states, which divides the logits
# A layer that the model puts between its backbone and the module that `get_output_embeddings` returns.
_BEFORE_HEAD = {
    "decoder": "lm_head",  # ModernBERT-decoder
    "cls.predictions.decoder": "cls.predictions.transform",  # BERT and most of its family
    "generator_lm_head": "generator_predictions",  # ELECTRA
}


def add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    verify: bool | None = None,
    caller: str = "patch_trl",
) -> None:
    """Replaces TRL's function of this name. A second call on one model changes the options of the first, as TRL's does.

    Args:
        model: the model that gets a fused head, of transformers, with or without adapters.
        temperature: the logits are divided by it, > 0. 1.0 leaves them as they are.
        cast_lm_head_to_fp32: whether the head is multiplied in fp32, outside autocast. False: in the dtype that the
            hidden states have.
        outputs: the fields that TRL's forward returns for each scored token, by TRL's names.
        verify: whether the first batch is compared with the model's own forward. None: only if no batch of this model
            has been compared yet.
        caller: who calls this function, for messages.

    Raises:
        ValueError: the head is not a matrix of floats, which a fused head could multiply by, or an adapter is on it that
            a fused head cannot apply.
    """
    _head(model), _adapter(model)
    forward = vars(model).get("forward")
    while (below := _below_trls(forward)) is not None:  # a fused head from an earlier trainer of TRL
        forward = below if getattr(below, "__func__", None) is not type(model).forward else None
    fused = vars(model).get("_kto_kernels_head")
    if fused is None:
        fused = model._kto_kernels_head = FusedHead()
    fused.set(temperature, cast_lm_head_to_fp32, outputs, caller)
    fused.pending = not fused.verified if verify is None else verify
    if not _has_ours(forward):
        fused_forward, model._kto_kernels_forward = _new_forward(type(model).forward), forward
        forward = types.MethodType(fused_forward, model)
    model.forward = forward


add_unverified: Callable[..., None] = functools.partial(add_fused_lm_head, verify=False)


def _new_forward(own: Callable) -> Callable:
    """A forward with a fused head for models whose class has the forward `own`. It is bound to no model, and finds
    everything through the model that it is called on."""

    # `generate` checks its arguments against the signature of the model's own forward.
    @functools.wraps(own)
    def forward(self, *args, fused_lm_head: bool = False, **kwargs):
        if fused_lm_head:
            return self._kto_kernels_head(self, args, kwargs)
        return own_forward(self)(*args, **kwargs)

    forward.kto_kernels = True
    return forward


def own_forward(model: nn.Module) -> Callable:
    """The model's forward as it was before it had a fused head.

    Args:
        model: a model that may have a fused head.

    Returns:
        The forward.
    """
    # A model may have a forward of its own beside the class's, for instance with hooks that move tensors between
    # devices. The class is looked up at each call, as FSDP2 replaces it.
    return vars(model).get("_kto_kernels_forward") or functools.partial(type(model).forward, model)


def _below_trls(forward: Any) -> Callable | None:
    """The forward that TRL's own fused head has replaced; None if `forward` is not TRL's fused head."""
    function = getattr(forward, "__func__", forward)
    code = getattr(function, "__code__", None)
    if code is None or code.co_name != "_fused_forward" or "original_forward" not in code.co_freevars:
        return None
    return function.__closure__[code.co_freevars.index("original_forward")].cell_contents


def _has_ours(forward: Any) -> bool:
    """Whether a model's forward is ours, or wraps ours as autocast's does."""
    while forward is not None:
        if getattr(forward, "kto_kernels", False):
            return True
        forward = _below_trls(forward) or getattr(forward, "__func__", None) or getattr(forward, "__wrapped__", None)
    return False


class FusedHead:
    """The state of a model's fused head. It holds no tensor, no module and nothing bound to one."""

    def __init__(self):
        self.options: dict[str, Any] = {}
        self.caller: str = ""
        self.pending: bool = False
        self.verified: bool = False
        self.slack: float = 0.0  # how much rounding may change a token's log-probability, by the verified batch
        self._function: Callable | None = None

    def set(self, temperature: float, cast_lm_head_to_fp32: bool, outputs: tuple[str, ...], caller: str) -> None:
        """Sets the options of the fused head, which are those of `add_fused_lm_head`.

        Args:
            temperature: as for `add_fused_lm_head`.
            cast_lm_head_to_fp32: as for `add_fused_lm_head`.
            outputs: as for `add_fused_lm_head`.
            caller: as for `add_fused_lm_head`.
        """
        self.options = {
            "temperature": temperature,
            "cast_lm_head_to_fp32": cast_lm_head_to_fp32,
            "outputs": outputs,
        }
        self.caller, self._function = caller, None

    def __getstate__(self) -> dict[str, Any]:
        """A copied model makes TRL's function again, from the copied config, and verifies a first batch of its own."""
        return vars(self) | {"_function": None, "pending": self.pending or self.verified, "verified": False}

    @functools.partial(torch.compiler.disable, recursive=False)  # the forward that it calls is compiled
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> Any:
        tuples = getattr(model.config, "return_dict", True) is False
        adapter = _adapter(model)
        if adapter is not None and scores_as_trl():
            raise ValueError(
                f"{type(model).__name__}: TRL's own fused head would leave out the adapter on this model's head; "
                "verify='full' compares with it"
            )
        with _named_outputs(model) if tuples else contextlib.nullcontext(), with_adapter(adapter):
            if self.pending and not scores_as_trl():
                self._verify(model, args, kwargs)
                self.pending, self.verified = False, True
            return self._trls(model)(*args, **kwargs)

    @torch.compiler.disable
    def _trls(self, model: nn.Module) -> Callable:
        """TRL's forward with a fused head, for this model."""
        if self._function is None:
            bare = _Bare(model.config)
            _theirs(bare, **self.options)
            self._function = bare.forward.__func__
        return functools.partial(self._function, _Seen(model), fused_lm_head=True)

    @torch.compiler.disable
    def _verify(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        given = dict(zip(names, args)) | kwargs
        labels, inputs = given.pop("labels", None), {}
        if labels is not None and given.get("shift_labels") is None:
            labels, inputs = verification.window(labels, given)
        if not {"input_ids", "inputs_embeds"} & set(inputs):
            _log.warning(
                "%s: the first batch of %s is not verified: no row of it can be scored alone (labels of a part of the "
                "context, or inputs under unknown names)", self.caller, type(model).__name__
            )  # fmt: skip
            return
        recorder = _Recorder(gemm_dtype(_head(model)[0]) if self.options["cast_lm_head_to_fp32"] else None)

        def fused() -> verification.Scored:
            with scored_by(recorder):
                self._trls(model)(**inputs, labels=labels)
            return recorder.scored

        def own() -> Tensor:
            outputs = own_forward(model)(**inputs, use_cache=False)
            logits = outputs.logits
            logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
            kept = (labels[:, 1:] != -100).to(logits.device)
            return logits[:, -labels.shape[1] : -1][kept]

        self.slack = verification.first_batch(model, own, fused, caller=self.caller)


def rounding(model: nn.Module) -> float:
    """How much rounding may change a token's log-probability, on average, by the batch that verified the model.

    Args:
        model: a model that has a fused head itself or in a submodule, or none.

    Returns:
        The change in nats; 0 where no batch has verified the model.
    """
    return max((vars(module)["_kto_kernels_head"].slack for module in model.modules()
                if "_kto_kernels_head" in vars(module)), default=0.0)  # fmt: skip


class _Recorder:
    """Scores as `ChunkedLogProbFunction` does, and keeps what the fused head was given."""

    def __init__(self, dtype: torch.dtype | None):
        self.dtype = dtype  # the model's own head's, where the fused head is cast to fp32
        self.scored: verification.Scored | None = None

    def apply(self, hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
        found = ChunkedLogProbFunction.apply(
            hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
        )
        weight, bias = dtensor.heads(None, weight=weight, bias=bias)
        adapter = current_adapter()
        if adapter is not None:
            adapter = (*dtensor.heads(None, a=adapter[0], b=adapter[1]), adapter[2])
        given = hidden if self.dtype is None else hidden.to(self.dtype)
        scale = (float(logit_scale), softcap, float(temperature))
        self.scored = verification.Scored.of(given, weight, bias, targets, scale, gemm_dtype(given), found[0], adapter)
        return found


# How TRL's fused head sees a model ─────────────────────────────────────────────────────────────────────────────────────


class _Bare:
    """The part of a model that TRL's `add_fused_lm_head` reads when it is called."""

    def __init__(self, config: Any):
        self.config = _Config(config)

    def forward(self) -> None: ...


class _Config:
    """A model's config, with soft cap and scale under the names that TRL reads."""

    def __init__(self, config: Any):
        self._config = config
        softcap = next((getattr(config, name) for name in _SOFTCAPS if hasattr(config, name)), None)
        divisor = next((getattr(config, name) for name in _DIVISORS if hasattr(config, name)), None)
        if softcap is not None:
            self.final_logit_softcapping = softcap
        if divisor is not None:
            self.logit_scale = 1 / divisor

    def get_text_config(self) -> _Config:
        text = self._config.get_text_config()
        return self if text is self._config else _Config(text)

    def __getattr__(self, name: str) -> Any:
        if name == "num_experts" and not hasattr(self._config, name):  # Llama 4
            name = "num_local_experts"
        return getattr(self._config, name)


class _Seen:
    """A model as TRL's fused head uses it: with the hidden states that reach the head, and a head that has weight and
    bias (or None)."""

    def __init__(self, model: nn.Module):
        self._seen = model

    @property
    def base_model(self) -> Callable:
        backbone = self._seen.base_model
        if backbone is self._seen:  # Llama 4's text model has another prefix than its class says
            backbone = getattr(self._seen, "model", None)
        return functools.partial(self._hidden_states, backbone)

    @property
    def model(self) -> Callable:  # used for vision-language models before transformers 5
        return functools.partial(self._hidden_states, self._seen.model)

    def _hidden_states(self, backbone: nn.Module | None, *args: Any, **kwargs: Any) -> Any:
        model = self._seen
        outputs = None if backbone is None else backbone(*args, **kwargs)
        if getattr(outputs, "last_hidden_state", None) is None:
            raise TypeError(
                f"{type(model).__name__}: expected a backbone that returns its last hidden states; got "
                f"{type(backbone).__name__}, which returned {type(outputs).__name__}"
            )
        if (layer := _before_head(model)) is not None:
            outputs.last_hidden_state = layer(outputs.last_hidden_state)
        return outputs

    @torch.compiler.disable
    def get_output_embeddings(self) -> types.SimpleNamespace:
        weight, bias = (_cut(self._seen, x) for x in _head(self._seen))
        return types.SimpleNamespace(weight=weight, bias=bias)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen, name)


@contextlib.contextmanager
def _named_outputs(model: nn.Module) -> Iterator[None]:
    """Makes backbones return named outputs, even where their configs ask for tuples."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    tuples = [config for config in configs if getattr(config, "return_dict", True) is False]
    for config in tuples:
        config.return_dict = True
    try:
        yield
    finally:
        for config in tuples:
            config.return_dict = False


def _before_head(model: nn.Module) -> nn.Module | None:
    """The layer between a model's backbone and the model's head, or None. `_BEFORE_HEAD` knows such layers by name."""
    head = model.get_output_embeddings()
    for name, before in _BEFORE_HEAD.items():
        try:
            if operator.attrgetter(name)(model) is head:
                return operator.attrgetter(before)(model)
        except AttributeError:
            pass
    return None


def _cut(model: nn.Module, rows: Tensor | None) -> Tensor | None:
    """The rows of a head's tensor that make logits: Inkling cuts its logits."""
    count = getattr(model.config.get_text_config(), "unpadded_vocab_size", None)
    return rows if rows is None or count is None or count >= rows.shape[0] else rows[:count]


def _tuner(head: nn.Module | None) -> Any:
    """The head, where it is a layer of PEFT with adapters on it; else None."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return head if peft is not None and isinstance(head, peft.BaseTunerLayer) else None


def _adapter(model: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, scaling) of the LoRA adapter that is active on a model's head; None: there is none, or it is off.

    Raises:
        ValueError: a fused head cannot apply the adapter.
    """
    tuner = _tuner(model.get_output_embeddings())
    if tuner is None or tuner.disable_adapters or tuner.merged:
        return None
    from peft.tuners import lora

    instead = "Leave the head out of `target_modules`, or train all of it with `modules_to_save`"
    refused = f"{type(model).__name__}: an adapter on the head, {type(tuner).__name__}"
    if type(tuner) is not lora.Linear:
        raise ValueError(f"{refused}: expected LoRA on nn.Linear. {instead}")
    active = [name for name in tuner.active_adapters if name in tuner.lora_A]
    if not active:
        return None
    (name, *others), a, b = active, tuner.lora_A[active[0]], tuner.lora_B[active[0]]
    if others:
        raise ValueError(f"{refused}: expected one active adapter, got {', '.join(active)}. {instead}")
    if name in tuner.lora_variant or b.bias is not None:
        raise ValueError(f"{refused}: expected LoRA without DoRA or another variant, and lora_bias=False. {instead}")
    if dropout := getattr(tuner.lora_dropout[name], "p", 0.0):
        raise ValueError(
            f"{refused}: expected lora_dropout=0, got {dropout}; the fused head has no dropout in front of an adapter"
        )
    weight = tuner.get_base_layer().weight
    if getattr(model.get_input_embeddings(), "weight", None) is weight:
        raise ValueError(
            f"{refused}: the head's weight is that of the input embeddings (tie_word_embeddings=True), and merging the "
            f"adapter would change the embeddings too. {instead}"
        )
    return a.weight, _cut(model, b.weight), float(tuner.scaling[name])


def _head(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of a model's head.

    Raises:
        ValueError: the head has no matrix of floats to multiply by.
    """
    head = model.get_output_embeddings()
    what = f"{type(model).__name__}: expected a head with a weight (V, H) of floats, as nn.Linear has; got"
    instead = "This trainer multiplies hidden states by that weight and never calls the head"
    if head is None:
        raise ValueError(f"{what} no output embeddings. {instead}")
    if _tuner(head) is not None:
        head = head.get_base_layer()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(
            f"{what} {type(head).__name__} without a weight. {instead}. Have `get_output_embeddings` return the layer "
            "that has it, or train with trl.KTOTrainer of a version that builds the logits"
        )
    quantized = not weight.is_floating_point() or weight.element_size() < 2
    quantized |= hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "full_tensor")  # packed inside
    if quantized or (weight.dim() != 2 and not hasattr(weight, "ds_id")):
        raise ValueError(
            f"{what} {type(head).__name__} with a {type(weight).__name__} {weight.dtype} of shape "
            f"{tuple(weight.shape)}{', which looks quantized' if quantized else ''}. {instead}. Load the model with its "
            "head left out of quantization (llm_int8_skip_modules, modules_to_not_convert)"
        )
    bias = getattr(head, "bias", None)
    if bias is None:  # PEFT's wrapper of a head with some trained tokens shows the weight alone
        bias = getattr(getattr(head, "original_module", None), "bias", None)
    return weight, bias
