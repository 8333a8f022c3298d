"""`patch_liger()` under TRL 1.12, whose KTOTrainer calls Liger's loss: ten optimizer steps, with and without."""

import pytest
import torch
import trl

from kto_kernels.integrations import liger as ours
from kto_kernels.integrations.liger import patch_liger
from tests.support.trl_harness import MODELS, assert_same_training, make_tokenizer, train

torch.set_num_threads(1)  # tiny models
LOSS_ONLY = dict.fromkeys(("rope", "swiglu", "rms_norm", "cross_entropy", "fused_linear_cross_entropy"), False)


class LigerTrainer(trl.KTOTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.liger_loss.compiled = False  # the same numbers, without a wait for the compiler


def run(path, **options):
    return train(
        LigerTrainer, options.pop("make", MODELS["llama"]), make_tokenizer(), path,
        use_liger_kernel=True, liger_kernel_config=LOSS_ONLY, **options,
    )  # fmt: skip


OPTIONS = {
    "llama": {},
    "tied": {"make": MODELS["tied"]},
    "accumulation": {"gradient_accumulation_steps": 2, "steps": 5},
    "one-sided batches": {"labels": [True] * 20 + [False] * 20},
    "beta": {"beta": 0.4},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_ten_steps(case, tmp_path, monkeypatch):
    theirs = run(tmp_path, **OPTIONS[case])
    assert any(entry["kl"] > 0 for entry in theirs[1] if "kl" in entry)
    calls = []
    loss = ours.linear_kto_loss
    monkeypatch.setattr(ours, "linear_kto_loss", lambda *args, **kwargs: calls.append(1) or loss(*args, **kwargs))
    with patch_liger():
        mine = run(tmp_path, **OPTIONS[case])
    assert len(calls) == 12  # ten of training, two of evaluation
    assert_same_training(theirs, mine, metrics_rtol=1e-4)
    assert {"kl", "rewards/chosen", "logps/rejected", "logits/chosen"} <= set().union(*mine[1])
