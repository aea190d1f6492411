import pytest

from tests.fakes import ScriptedDrafter, tiny_target
from train.callbacks import AcceptanceProbe, checkpoint_callbacks
from train.module import TrainableModule
from train.settings import CheckpointSettings, OptimizerSettings, ProbeSettings


@pytest.mark.parametrize(("right", "tau"), [(1.0, 4.0), (0.0, 1.0)])
def test_the_probe_measures_tokens_per_call_with_the_bonus_counted(right, tau, monkeypatch):
    target = tiny_target()
    monkeypatch.setattr(type(target), "eos_ids", frozenset())
    drafter = ScriptedDrafter(target.shape, right=right, depth=3)
    probe = AcceptanceProbe([[7, 8, 9], [10, 11]], ProbeSettings(max_new_tokens=12))
    assert probe.measure(TrainableModule(drafter, target, OptimizerSettings())) == tau


def test_best_is_the_highest_tau_or_the_lowest_loss(tmp_path):
    best, last = checkpoint_callbacks(tmp_path, CheckpointSettings(best_by="probe/tau", every_n_steps=3))
    assert (best.monitor, best.mode, last.monitor) == ("probe/tau", "max", None)
    assert checkpoint_callbacks(tmp_path, CheckpointSettings(best_by="val/loss"))[0].mode == "min"
