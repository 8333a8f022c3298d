"""Numbers that change from call to call (a β schedule, the KL of the last step) are data to torch.compile, not constants:
two graphs however many values, as plain PyTorch has; the same bits as without a compiler."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import kto_kernels
from kto_kernels import KTOLoss, LinearKTOLoss

VALUES = [0.1 + 0.07 * k for k in range(12)]
VOCAB = 33
LOSS = ("kl", "beta", "desirable_weight", "undesirable_weight")
SCALE = ("temperature", "logit_scale", "softcap")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def arguments():
    labels = torch.randint(VOCAB, (2, 5))
    return torch.randn(2, 5, 8), torch.randn(VOCAB, 8), labels, torch.tensor([True, False])


def calls():
    hidden, weight, labels, desirable = arguments()
    logits = hidden @ weight.t()
    loss, linear_loss = KTOLoss(), LinearKTOLoss()

    def module(x, **options):
        linear_loss.options |= options  # a schedule sets them there
        return linear_loss(x * 1, weight, labels, desirable, kl=0.3).loss

    def logits_module(x, beta):
        loss.options["beta"] = beta
        return loss(x * 1, labels, desirable, kl=beta).loss

    def logps(x, kl=0.3, **options):
        return kto_kernels.kto_loss_from_logps(x * 1, desirable, kl=kl, **options).loss

    def kto(x, kl=0.3, **options):
        return kto_kernels.kto_loss(x * 1, labels, desirable, kl=kl, **options).loss

    def frozen(x, kl=0.3, **options):
        return kto_kernels.linear_kto_loss(x * 1, weight, labels, desirable, kl=kl, **options).loss

    def trained(x, kl=0.3, **options):
        return kto_kernels.linear_kto_loss(hidden, x * 1, labels, desirable, kl=kl, **options).loss

    def tokens(x, **options):
        return kto_kernels.token_logps(x * 1, labels, **options).sum()

    def frozen_tokens(x, **options):
        return kto_kernels.linear_token_logps(x * 1, weight, labels, **options).sum()

    def trained_tokens(x, **options):
        return kto_kernels.linear_token_logps(hidden, x * 1, labels, **options).sum()

    return {
        "kto_loss": (kto, logits, (*LOSS, "temperature")),
        "kto_loss_from_logps": (logps, torch.randn(2), LOSS),
        "linear_kto_loss, frozen head": (frozen, hidden, (*LOSS, *SCALE)),
        "linear_kto_loss, trained head": (trained, weight, (*LOSS, *SCALE)),
        "token_logps": (tokens, logits, ("temperature",)),
        "linear_token_logps, frozen head": (frozen_tokens, hidden, SCALE),
        "linear_token_logps, trained head": (trained_tokens, weight, SCALE),
        "KTOLoss": (logits_module, logits, ("beta",)),
        "LinearKTOLoss": (module, hidden, ("beta", "softcap")),
    }


CASES = [(name, option) for name, (_, _, options) in calls().items() for option in options]


def graphs(function, x, option, values=VALUES, backend="aot_eager") -> int:
    """How many graphs the values took; each result is compared with the function's own."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for value in values:
        results = []
        for run in (compiled, function):
            leaf = x.clone().requires_grad_()
            loss = run(leaf, **{option: value})
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        for mine, eager in zip(*results):
            if backend == "aot_eager":
                assert torch.equal(mine, eager)
            else:  # which rounds its sums in another order
                torch.testing.assert_close(mine, eager)
    return counter.frame_count


def plain_graphs() -> int:
    return graphs(lambda x, beta: (torch.sigmoid(x * beta) / beta).sum(), torch.randn(3, 4), "beta")


@pytest.mark.parametrize(("name", "option"), CASES)
def test_a_number_that_changes_takes_two_graphs(name, option):
    function, x, _ = calls()[name]
    assert graphs(function, x, option, VALUES[:5]) <= 2


@pytest.mark.fault(5)
@pytest.mark.parametrize(("name", "option"), [("kto_loss", "kl"), ("linear_kto_loss, trained head", "beta")])
def test_a_number_that_changes_makes_two_graphs_as_in_plain_pytorch(name, option):
    function, x, _ = calls()[name]
    expected = plain_graphs()
    torch.compiler.reset()
    assert graphs(function, x, option) == expected == 2


def test_several_at_once_with_inductor():
    function, x, _ = calls()["linear_kto_loss, trained head"]

    def scheduled(x, step):
        return function(x, kl=step, beta=step / 2, temperature=1 + step)

    assert graphs(scheduled, x, "step", VALUES[:4], "inductor") <= 2


def test_an_estimate_below_zero_and_whole_numbers():
    function, x, _ = calls()["linear_kto_loss, frozen head"]
    assert graphs(function, x, "kl", [-0.3, -0.1, 0.1, 0.3]) <= 2
    torch.compiler.reset()
    assert graphs(function, x, "beta", [2, 3, 4, 5]) <= 2


WHOLE = {"ignore_index": [-100, -1, 3, 5, 8], "max_logits_bytes": [1 << 20, 500, 700, 900]}
FUNCTIONS = [name for name in calls() if name != "kto_loss_from_logps" and "KTOLoss" not in name]
WHOLE_CASES = [(name, "ignore_index") for name in FUNCTIONS]
WHOLE_CASES += [(name, "max_logits_bytes") for name in FUNCTIONS if name.startswith("linear")]


@pytest.mark.parametrize(("name", "option"), WHOLE_CASES)
def test_a_whole_number_that_changes_takes_two_graphs(name, option):
    function, x, _ = calls()[name]
    assert graphs(function, x, option, WHOLE[option]) <= 2


def test_a_softcap_that_comes_and_goes():
    """Whether there is one is a graph of its own; its value is not."""
    function, x, _ = calls()["linear_token_logps, frozen head"]
    assert graphs(function, x, "softcap", [None, 3.0, None, 4.0, 5.0, None, 6.0]) <= 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_what_is_no_number_is_still_refused(value):
    """Without a compiler by name; a compiled call may not go on with it either."""
    function, x, _ = calls()["kto_loss"]
    with pytest.raises(ValueError, match=rf"^beta: expected a finite number > 0, got {value}$"):
        function(x, beta=value)
    compiled = torch.compile(function, backend="eager")
    for right in (0.1, 0.2):
        compiled(x, beta=right)
    with pytest.raises((ValueError, RuntimeError)):
        compiled(x, beta=value)
