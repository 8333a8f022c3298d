"""The names by which trainers call log-probabilities and the loss: TRL's own function where it is installed, and
trainers in miniature that call as TRL to 1.5, LLaMA-Factory and ms-swift do."""

import sys
import types

import pytest
import torch
from torch.nn.functional import logsigmoid

from kto_kernels import kto_loss, kto_loss_from_logps
from kto_kernels.integrations import logps as ours
from kto_kernels.integrations.logps import (
    get_batch_logps,
    get_batch_logps_and_lengths,
    patch_llamafactory,
    patch_trl_kto,
    selective_log_softmax,
    unpatch_llamafactory,
    unpatch_trl_kto,
)

V = 37


@pytest.fixture(scope="module")
def trl_utils():
    return pytest.importorskip("trl.trainer.utils")


def definition(logits, index, temperature=1.0):
    """fp64, materialised."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    return log_p.gather(-1, index[..., None])[..., 0] if index.dim() < logits.dim() else log_p.gather(-1, index)


# selective_log_softmax ────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = [(5,), (3, 4), (1, 1), (2, 3, 4), (0, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("several", [None, 1, 4], ids=["one", "K=1", "K=4"])
@pytest.mark.parametrize("masked", [False, True])
def test_selective_log_softmax_equals_trl(trl_utils, dtype, temperature, several, masked):
    logits = (5 * torch.randn(3, 6, V, dtype=dtype)).requires_grad_()
    index = torch.randint(0, V, (3, 5) if several is None else (3, 5, several))
    mask = torch.randint(0, 2, index.shape) if masked else None
    results = []
    for function in (selective_log_softmax, trl_utils.selective_log_softmax):
        values = function(logits[:, :-1], index, temperature, mask)  # not contiguous
        (gradient,) = torch.autograd.grad(
            values, logits, torch.linspace(-1, 1, index.numel()).to(dtype).view_as(values)
        )
        results.append((values, gradient))
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    for mine, theirs in zip(*results, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        assert theirs.abs().max() > 0.01
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("several", [None, 3], ids=["one", "K=3"])
def test_any_number_of_dimensions(trl_utils, shape, several):
    logits = torch.randn(*shape, V)
    index = torch.randint(0, V, shape if several is None else (*shape, several))
    values = selective_log_softmax(logits, index)
    assert values.shape == index.shape and values.dtype == torch.float32
    torch.testing.assert_close(values.double(), definition(logits, index), rtol=1e-6, atol=1e-6)
    if 0 not in shape:  # TRL stacks the rows of the first dimension
        torch.testing.assert_close(values, trl_utils.selective_log_softmax(logits, index), rtol=1e-5, atol=1e-6)


def test_one_row_of_logits_gives_one_value():
    logits, index = torch.randn(V), torch.tensor(3)
    assert selective_log_softmax(logits, index).shape == ()
    values = selective_log_softmax(logits, torch.tensor([3, 5]))
    torch.testing.assert_close(values.double(), definition(logits, torch.tensor([3, 5])), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("several", [None, 3], ids=["one", "K=3"])
def test_half_precision_is_scored_in_fp32(dtype, several):
    logits = (5 * torch.randn(4, 6, V)).to(dtype).requires_grad_()
    index = torch.randint(0, V, (4, 6) if several is None else (4, 6, several))
    values = selective_log_softmax(logits, index, temperature=0.7)
    assert values.dtype == torch.float32
    exact = definition(logits, index, 0.7)
    torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=2e-6)
    (mine,), (true,) = (torch.autograd.grad(v.sum(), logits) for v in (values, exact))
    assert mine.dtype == dtype
    torch.testing.assert_close(mine, true, rtol=0.02, atol=0.02)


def test_masked_labels_keep_infinities_and_digits():
    """The first of the K, or all of them, may have a logit of −inf; a near-certain token keeps its digits."""
    logits = torch.tensor([[-torch.inf, 0.0, 20.0, 1.0], [-torch.inf, -torch.inf, 0.0, 1.0]]).requires_grad_()
    index = torch.tensor([[0, 2, 1], [0, 1, 0]])
    values = selective_log_softmax(logits, index)
    exact = definition(logits.detach(), index)
    torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(values[0, 1:].sum(), logits)
    assert torch.isfinite(gradient).all()


def test_result_may_be_written_into():
    """ms-swift zeroes ignored tokens in place, before the backward."""
    logits = torch.randn(2, 5, V, requires_grad=True)
    labels = torch.randint(0, V, (2, 5))
    scored = labels > V // 3
    values = selective_log_softmax(logits, labels)
    values[~scored] = 0
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    (expected,) = torch.autograd.grad(definition(logits, labels)[scored].sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("several", [None, 2], ids=["one", "K=2"])
def test_masked_rows_may_hold_any_index(several):
    index = torch.randint(0, V, (2, 3) if several is None else (2, 3, several))
    mask = torch.ones_like(index)
    index[0, 0], mask[0, 0] = -100, 0
    logits = torch.randn(2, 3, V, requires_grad=True)
    values = selective_log_softmax(logits, index, row_mask=mask)
    assert (values[0, 0] == 0).all() and (values[1] < 0).all()
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert (gradient[0, 0] == 0).all() and (gradient[1] != 0).all()


@pytest.mark.parametrize(
    ("logits", "index", "options", "error", "message"),
    [
        ([1.0], torch.tensor(0), {}, TypeError, "logits: expected a tensor"),
        (torch.ones(2, V, dtype=torch.int64), torch.zeros(2), {}, TypeError, "logits: expected dtype"),
        (torch.ones(2, V), torch.zeros(2), {}, TypeError, "index: expected dtype"),
        (torch.ones(2, V), torch.zeros(3, dtype=torch.int64), {}, ValueError, "index: expected shape"),
        (torch.ones(2, V), torch.zeros(2, 3, 1, dtype=torch.int64), {}, ValueError, "index: expected shape"),
        (torch.ones(2, V), torch.zeros((), dtype=torch.int64), {}, ValueError, "index: expected shape"),
        (torch.ones(2, V), torch.zeros(2, 0, dtype=torch.int64), {}, ValueError, "index: expected K >= 1"),
        (torch.ones(2, V), torch.tensor([0, -100]), {}, ValueError, f"index: expected 0 <= index < {V}, got -100"),
        (torch.ones(2, V), torch.tensor([[0], [V]]), {}, ValueError, f"index: expected 0 <= index < {V}, got {V}"),
        (torch.ones(2, V), torch.tensor([0, 1]), {"temperature": 0.0}, ValueError, "temperature: expected"),
        (torch.ones(2, V), torch.tensor([0, 1]), {"row_mask": torch.ones(3)}, ValueError, "row_mask: expected shape"),
        (torch.ones(2, V), torch.tensor([0, 1]), {"row_mask": [1, 1]}, TypeError, "row_mask: expected a tensor"),
        (torch.ones(V, 2).T, torch.tensor([0, 1]), {}, ValueError, "logits: expected stride 1"),
    ],
)
def test_selective_log_softmax_errors(logits, index, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        selective_log_softmax(logits, index, **options)


# get_batch_logps ──────────────────────────────────────────────────────────────────────────────────────────────────────


def batch(dtype=torch.float32, pad=-100):
    logits = torch.randn(4, 9, V).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (4, 9))
    labels[:, :3] = pad
    labels[1, 5:] = pad
    return logits, labels


def summed(logits, labels, average=False, pad=-100, shift=True):
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    scored = labels != pad
    tokens = torch.where(scored, definition(logits, torch.where(scored, labels, 0)), 0.0).sum(-1)
    return tokens / scored.sum(-1).clamp(min=1) if average else tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({}, {}),
        ({"average_log_prob": True}, {"average": True}),
        ({"label_pad_token_id": 5}, {"pad": 5}),
        ({"is_encoder_decoder": True}, {"shift": False}),
        ({"average_log_prob": True, "is_encoder_decoder": True}, {"average": True, "shift": False}),
    ],
)
def test_get_batch_logps_sums_what_the_labels_score(dtype, call, expected):
    logits, labels = batch(dtype, call.get("label_pad_token_id", -100))
    values, exact = get_batch_logps(logits, labels, **call), summed(logits, labels, **expected)
    assert values.shape == (4,) and values.dtype == torch.float32
    torch.testing.assert_close(values.double(), exact, rtol=1e-6, atol=1e-6)
    (mine,), (true,) = (torch.autograd.grad(v.sum(), logits) for v in (values, exact))
    torch.testing.assert_close(
        mine, true, rtol=0.01 if dtype == torch.bfloat16 else 1e-5, atol=1e-3 * true.max().item()
    )


def test_a_sequence_with_nothing_scored_is_0():
    logits, labels = batch()
    labels[2] = -100
    for average in (False, True):
        assert get_batch_logps(logits, labels, average)[2] == 0
    values, lengths = get_batch_logps_and_lengths(logits, labels)
    assert values[2] == 0 and lengths.tolist() == [6, 2, 0, 6]


def test_llamafactorys_lengths_count_the_scored_tokens():
    logits, labels = batch(pad=7)
    values, lengths = get_batch_logps_and_lengths(logits, labels, 7)
    torch.testing.assert_close(values.double(), summed(logits, labels, pad=7), rtol=1e-6, atol=1e-6)
    assert torch.equal(lengths, (labels[:, 1:] != 7).sum(-1)) and lengths.dtype == torch.int64


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: get_batch_logps(x[:, :-1], y), ValueError, "labels: expected shape"),
        (lambda x, y: get_batch_logps(x[0], y[0]), ValueError, "logits: expected"),
        (lambda x, y: get_batch_logps(x, y, "yes"), TypeError, "average_log_prob: "),
        (lambda x, y: get_batch_logps(x, y, False, None), TypeError, "label_pad_token_id: "),
        (lambda x, y: get_batch_logps(x, y, is_encoder_decoder=1), TypeError, "is_encoder_decoder: "),
        (lambda x, y: get_batch_logps_and_lengths(x, y, ld_alpha=0.5), ValueError, "ld_alpha: "),
    ],
)
def test_bad_arguments_of_get_batch_logps_are_errors_that_name_them(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call(*batch())


# Trainers in miniature ────────────────────────────────────────────────────────────────────────────────────────────────


class Accelerator:
    """Two processes: this one's value, and another's."""

    def __init__(self, other=None):
        self.other = other

    def gather_for_metrics(self, value):
        return value if self.other is None else torch.stack([value, torch.as_tensor(self.other, dtype=value.dtype)])


class Old:
    """Calls as TRL's KTOTrainer to 1.5 does; what it calls must have been replaced."""

    def __init__(self, loss_type="kto", other=None):
        self.beta, self.desirable_weight, self.undesirable_weight = 0.3, 1.5, 0.5
        self.loss_type, self.accelerator = loss_type, Accelerator(other)
        self.calculate_KL = loss_type == "kto"

    @staticmethod
    def get_batch_logps(logits, labels, average_log_prob=False, label_pad_token_id=-100, is_encoder_decoder=False):
        raise AssertionError("TRL's own")

    def kto_loss(
        self,
        policy_chosen_logps,
        policy_rejected_logps,
        policy_KL_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        reference_KL_logps,
    ):
        raise AssertionError("TRL's own")

    def step(self, policy, reference, labels, desirable, kl_policy, kl_reference, kl_labels):
        def forward(logits, kl_logits):
            values = self.get_batch_logps(
                logits, labels, average_log_prob=False, is_encoder_decoder=False, label_pad_token_id=-100
            )
            kl_values = (
                self.get_batch_logps(kl_logits, kl_labels, average_log_prob=False) if self.calculate_KL else None
            )
            return values[desirable], values[~desirable], kl_values

        with torch.no_grad():
            reference_logps = forward(reference, kl_reference)
        chosen, rejected, kl_values = forward(policy, kl_policy)
        return self.kto_loss(chosen, rejected, None if kl_values is None else kl_values.detach(), *reference_logps)


def step_arguments(desirable):
    logits, labels = batch()
    reference, (kl_policy, kl_labels), (kl_reference, _) = torch.randn(4, 9, V), batch(), batch()
    return logits, reference, labels, desirable, kl_policy.detach(), kl_reference.detach(), kl_labels


@pytest.fixture
def trl(monkeypatch):
    """`trl` 1.5 in miniature: what `trl.KTOTrainer` names inherits from the class that does the work."""
    module = types.ModuleType("trl")

    class Trainer(Old):
        get_batch_logps, kto_loss = staticmethod(Old.get_batch_logps), Old.kto_loss

    class Renamed(Trainer):
        pass

    module.KTOTrainer, module.owner = Renamed, Trainer
    monkeypatch.setitem(sys.modules, "trl", module)
    yield module
    unpatch_trl_kto()


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("desirable", [[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], ids=str)
def test_the_patched_trl_trainer_gives_trls_own_step(trl, loss_type, desirable):
    desirable = torch.tensor(desirable).bool()
    arguments = step_arguments(desirable)
    policy, reference, labels, _, kl_policy, kl_reference, kl_labels = arguments
    trainer = trl.KTOTrainer(loss_type)
    with patch_trl_kto():
        losses, chosen, rejected, kl = trainer.step(*arguments)
    with pytest.raises(AssertionError, match="TRL's own"):
        trainer.step(*arguments)

    kl_source = {"kl_logits": kl_policy, "ref_kl_logits": kl_reference, "kl_labels": kl_labels}
    whole = kto_loss(
        policy, labels, desirable, ref_logits=reference, beta=0.3, desirable_weight=1.5, undesirable_weight=0.5,
        loss_type=loss_type, shift=True, reduction="none", **(kl_source if loss_type == "kto" else {})
    )  # fmt: skip
    order = torch.cat([desirable.nonzero(), (~desirable).nonzero()])[:, 0]
    torch.testing.assert_close(losses, whole.loss[order], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.cat([chosen, rejected]), whole.rewards[order], rtol=1e-5, atol=1e-6)
    assert chosen.shape == (desirable.sum(),) and not chosen.requires_grad and not rejected.requires_grad
    torch.testing.assert_close(kl, whole.kl, rtol=1e-5, atol=1e-6)
    (mine,), (direct,) = (torch.autograd.grad(v.sum(), policy) for v in (losses, whole.loss))
    assert direct.abs().max() > 0
    torch.testing.assert_close(mine, direct, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("own", "other"), [(1.5, 2.0), (1.5, -50.0), (-1.5, 4.0)])
def test_kl_is_the_mean_over_processes_then_clamped(own, other):
    """Clamping each process's own mean first would give another number."""
    policy = torch.tensor([-3.0, -7.0])
    reference = policy - own + torch.tensor([0.5, -0.5])
    trainer = Old(other=other)
    losses, chosen, rejected, kl = ours.kto_loss(
        trainer, policy[:1], policy[1:], policy, reference[:1], reference[1:], reference
    )
    z0 = max(0.0, (own + other) / 2)
    assert kl.shape == () and kl.item() == pytest.approx(z0)
    r = policy - reference
    expected = torch.stack([1.5 * logsigmoid(-0.3 * (r[0] - z0)).exp(), 0.5 * logsigmoid(0.3 * (r[1] - z0)).exp()])
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(torch.cat([chosen, rejected]), 0.3 * r)


def test_kto_loss_is_kto_loss_from_logps():
    policy, reference = torch.randn(5), torch.randn(5)
    losses, *_ = ours.kto_loss(Old(), policy[:2], policy[2:], policy, reference[:2], reference[2:], reference)
    direct = kto_loss_from_logps(
        policy, torch.arange(5) < 2, ref_logps=reference, kl_logps=policy, ref_kl_logps=reference,
        beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, reduction="none"
    )  # fmt: skip
    torch.testing.assert_close(losses, direct.loss)


def test_trainer_without_loss_type():
    """LLaMA-Factory 0.9.2 and TRL before 0.9.3 set none."""
    trainer = Old()
    del trainer.loss_type
    policy, reference = torch.tensor([-3.0]), torch.tensor([-4.0])
    losses, _, _, kl = ours.kto_loss(trainer, policy, policy, policy, reference, reference, reference)
    assert losses.shape == (2,) and kl == 1.0


@pytest.mark.parametrize(
    ("loss_type", "change", "error", "message"),
    [
        ("bco", {}, ValueError, "loss_type: expected"),
        ("kto", {2: None}, TypeError, "policy_KL_logps: expected a tensor"),
        ("kto", {5: torch.zeros(3)}, ValueError, "reference_KL_logps: expected shape"),
        ("kto", {3: torch.zeros(4)}, ValueError, "ref_logps: expected shape"),
    ],
)
def test_bad_arguments_of_kto_loss_are_errors_that_name_them(loss_type, change, error, message):
    arguments = [change.get(k, torch.zeros(2)) for k in range(6)]
    with pytest.raises(error, match=f"^{message}"):
        ours.kto_loss(Old(loss_type), *arguments)


def test_the_patch_of_trl_is_undone(trl):
    before = vars(trl.owner)["get_batch_logps"], vars(trl.owner)["kto_loss"]
    patch_trl_kto()
    assert trl.KTOTrainer.kto_loss is ours.kto_loss and "kto_loss" not in vars(trl.KTOTrainer)
    with patch_trl_kto():
        assert trl.KTOTrainer.get_batch_logps is get_batch_logps
    assert trl.KTOTrainer.get_batch_logps is get_batch_logps
    for _ in range(2):
        unpatch_trl_kto()
        assert (vars(trl.owner)["get_batch_logps"], vars(trl.owner)["kto_loss"]) == before


def test_patch_trl_without_effect_on_a_trainer(trl):
    """One that inherits from TRL's and has both methods of its own; not one that has one of them."""

    class Half(trl.KTOTrainer):
        def kto_loss(self): ...

    patch = patch_trl_kto()
    assert patch.replaced == tuple(f"{__name__}.{trl.owner.__qualname__}.{n}" for n in ("get_batch_logps", "kto_loss"))
    unpatch_trl_kto()

    class Own(Half):
        get_batch_logps = None

    with pytest.warns(
        UserWarning, match=r"^patch_trl_kto: trl .*: without effect on .*Own, which has a get_batch_logps"
    ):
        patch_trl_kto()


def test_patch_trl_takes_the_shorter_signature(trl):
    """TRL 1.0 to 1.5."""
    trl.owner.get_batch_logps = staticmethod(lambda logits, labels, average_log_prob=False: None)
    with patch_trl_kto():
        assert trl.KTOTrainer.get_batch_logps is get_batch_logps


def test_patch_trl_refuses_other_versions(trl):
    trl.owner.kto_loss = lambda self, policy_logps, label: None
    with pytest.raises(RuntimeError, match=r"^patch_trl_kto: trl .*kto_loss: unknown signature.*policy_logps, label"):
        patch_trl_kto()
    trl.KTOTrainer = type("KTOTrainer", (), {})  # from 1.6 on
    with pytest.raises(RuntimeError, match="no method kto_loss; this patch is for TRL"):
        patch_trl_kto()
    del trl.KTOTrainer
    with pytest.raises(ImportError, match=r"cannot import trl\.KTOTrainer"):
        patch_trl_kto()


def test_patch_trl_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"^patch_trl_kto: needs trl"):
        patch_trl_kto()


@pytest.fixture
def llamafactory(monkeypatch):
    """`llamafactory.train.kto.trainer` in miniature: the function is a global that a method calls."""
    source = """
def get_batch_logps(logits, labels, label_pad_token_id=-100, ld_alpha=None):
    raise AssertionError("LLaMA-Factory's own")

class CustomKTOTrainer:
    def forward(self, logits, labels):
        logps, valid_length = get_batch_logps(logits=logits, labels=labels)
        return logps, logps / valid_length
"""
    for name in ("llamafactory", "llamafactory.train", "llamafactory.train.kto", "llamafactory.train.kto.trainer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = sys.modules["llamafactory.train.kto.trainer"]
    exec(source, vars(module))
    yield module
    unpatch_llamafactory()


def test_the_patch_of_llamafactory_works_and_is_undone(llamafactory):
    trainer, (logits, labels) = llamafactory.CustomKTOTrainer(), batch()
    patch_llamafactory()
    with patch_llamafactory():
        values, mean = trainer.forward(logits, labels)
    torch.testing.assert_close(values.double(), summed(logits, labels), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean.double(), summed(logits, labels, average=True), rtol=1e-6, atol=1e-6)
    assert llamafactory.get_batch_logps is get_batch_logps_and_lengths
    for _ in range(2):
        unpatch_llamafactory()
        with pytest.raises(AssertionError, match="LLaMA-Factory's own"):
            trainer.forward(logits, labels)


def test_patch_llamafactory_takes_the_shorter_signature(llamafactory):
    """LLaMA-Factory before 0.9.3."""
    llamafactory.get_batch_logps = lambda logits, labels, label_pad_token_id=-100: None
    with patch_llamafactory():
        assert llamafactory.get_batch_logps is get_batch_logps_and_lengths


def test_patch_llamafactory_refuses_other_versions(llamafactory):
    llamafactory.get_batch_logps = lambda logits, labels, ignore_index=-100: None
    with pytest.raises(RuntimeError, match=r"^patch_llamafactory: llamafactory .*unknown signature"):
        patch_llamafactory()
    del llamafactory.get_batch_logps
    with pytest.raises(RuntimeError, match="has no get_batch_logps"):
        patch_llamafactory()


def test_patch_llamafactory_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    with pytest.raises(ImportError, match=r"^patch_llamafactory: needs llamafactory\.train\.kto\.trainer"):
        patch_llamafactory()
