"""`patch_trl_kto()` and `patch_liger()` under TRL 0.24: ten optimizer steps of its KTOTrainer, with and without."""

import pytest
import torch
import trl

from kto_kernels.integrations import liger, logps
from kto_kernels.integrations.liger import patch_liger
from kto_kernels.integrations.logps import patch_trl_kto
from tests.support.trl_harness import MODELS, assert_same_training, make_tokenizer, train

torch.set_num_threads(1)  # tiny models


class LigerTrainer(trl.KTOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kto_loss_fn.compiled = False  # the same numbers, without a wait for the compiler


@pytest.fixture
def calls(monkeypatch):
    """How often our loss was called."""
    made = []
    for module, name in ((logps, "kto_loss_from_logps"), (liger, "linear_kto_loss")):
        ours = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, ours=ours, **kw: made.append(1) or ours(*args, **kw))
    return made


OPTIONS = {
    "llama": {},
    "gemma2": {"make": MODELS["gemma2"]},
    "apo": {"loss_type": "apo_zero_unpaired"},
    "weights and beta": {"desirable_weight": 1.3, "undesirable_weight": 0.6, "beta": 0.4},
    "accumulation": {"gradient_accumulation_steps": 2, "steps": 5},
    "precomputed reference": {"precompute_ref_log_probs": True},
    "one-sided batches": {"labels": [True] * 20 + [False] * 20},
}


def with_and_without(patch, cls, path, *, make=MODELS["llama"], **options):
    theirs = train(cls, make, make_tokenizer(), path, **options)
    with patch():
        mine = train(cls, make, make_tokenizer(), path, **options)
    return theirs, mine


@pytest.mark.parametrize("case", OPTIONS)
def test_ten_steps(case, tmp_path, calls):
    theirs, mine = with_and_without(patch_trl_kto, trl.KTOTrainer, tmp_path, **OPTIONS[case])
    assert len(calls) == 12  # ten of training, two of evaluation
    assert_same_training(theirs, mine, metrics_rtol=1e-4)
    assert {"kl", "rewards/chosen", "logps/rejected"} <= set().union(*mine[1])


def test_ten_steps_of_ligers_loss(tmp_path, calls):
    runs = with_and_without(patch_liger, LigerTrainer, tmp_path, use_liger_loss=True)
    assert len(calls) == 12
    # Liger's sums of logits count the prompt and the padding too.
    theirs, mine = ((p, [{k: v for k, v in e.items() if "logits/" not in k} for e in history]) for p, history in runs)
    assert_same_training(theirs, mine, metrics_rtol=1e-4)
