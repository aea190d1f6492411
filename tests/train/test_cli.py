import csv
import json
import logging
import math
import os
import re
import signal
from dataclasses import replace

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from checkpoints.pretrained import load_pretrained
from configs.command_line.loading import run as one_line_run
from modules.contracts.drafter import Drafter
from modules.contracts.sampling import Sampling
from modules.decoding.decoder import SpeculativeDecoder
from modules.drafters.heads.medusa import Medusa
from tests.fakes import tiny_target
from train.cli import command, make_parser, quieten
from train.run import resume_point
from train.settings import TrainerSettings


def run(recipe, output, *more):
    return command(["--config", str(recipe), "--output", str(output), *more])


def weights(output):
    return load_pretrained(output).state_dict()


def test_a_run_leaves_its_config_a_drafter_a_card_and_logs(tiny, recipe, tmp_path, capsys):
    output = tmp_path / "run"
    assert run(recipe, output, "--drafter.heads", "3") == 0
    assert f"trained: {output / 'drafter'}" in capsys.readouterr().out
    drafter = load_pretrained(output, tiny)
    assert (
        drafter.heads == 3 and drafter.vocabulary_D is not None and len(drafter.vocabulary_D) == 48
    )
    provenance = json.loads((output / "drafter" / "provenance.json").read_text())
    assert {"val/loss", "val/top1_0", "val/top5_2", "probe/tau"} <= set(provenance["measured"])
    assert (
        provenance["data"]["fingerprint"]
        and provenance["settings"]["drafter"]["init_args"]["heads"] == 3
    )
    assert "val/loss" in (output / "drafter" / "README.md").read_text()
    rows = list(csv.DictReader((output / "lightning" / "version_0" / "metrics.csv").open()))
    assert [row["step"] for row in rows if row["train/loss"]] == [str(step) for step in range(1, 7)]
    assert list((output / "lightning" / "version_0").glob("events.*"))


def test_its_config_trains_the_same_again(tiny, recipe, tmp_path):
    run(recipe, tmp_path / "a")
    run(tmp_path / "a" / "config.yaml", tmp_path / "b")
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


class Stop(Callback):
    """Stops hard after some steps, as a lost machine would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


@pytest.mark.parametrize(
    ("at", "flags"), [(2, []), (3, []), (5, []), (3, ["--optimizer.muon_lr", "0.003"])]
)
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    tiny, recipe, tmp_path, monkeypatch, at, flags
):
    run(recipe, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr("train.run.RunProgress", lambda: Stop(at))
        run(recipe, tmp_path / "broken", *flags)
    assert run(recipe, tmp_path / "broken", "--resume", "last", *flags) == 0
    unbroken, resumed = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


class Ask(Callback):
    """Asks the process to end during a step, as a scheduler does."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_saves_and_ends_with_its_own_status(tiny, recipe, tmp_path, monkeypatch, capsys):
    flags = ["--checkpoint.every_n_steps", "100"]
    run(recipe, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        patch.setattr("train.run.RunProgress", Ask)
        command_line = ["--config", str(recipe), "--output", str(tmp_path / "asked"), *flags]
        assert one_line_run(command, command_line) == 143
    said = capsys.readouterr().err
    assert "stopped by SIGTERM after step 4, all of it saved: go on with --resume last" in said
    assert not (tmp_path / "asked" / "drafter").exists()
    (tmp_path / "asked" / "lightning" / "checkpoints" / "best.ckpt").write_bytes(b"torn")
    run(recipe, tmp_path / "asked", "--resume", "last", *flags)
    unbroken, resumed = weights(tmp_path / "whole"), weights(tmp_path / "asked")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_a_torn_checkpoint_is_skipped_and_said_so(tmp_path, caplog):
    folder = tmp_path / "lightning" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "last.ckpt").mkdir()
    torch.save({}, folder / "best.ckpt")
    assert (
        resume_point(tmp_path, "last") == folder / "best.ckpt"
        and "not a whole checkpoint" in caplog.text
    )
    (folder / "best.ckpt").write_bytes((folder / "best.ckpt").read_bytes()[:100])
    with pytest.raises(ValueError, match="--resume last: .* does not exist or is not whole"):
        resume_point(tmp_path, "last")


@pytest.mark.parametrize(("key", "value"), [("strategy", "deepspeed_4"), ("precision", "int3")])
def test_unknown_names_are_refused_before_anything_starts(key, value):
    with pytest.raises(ValueError, match=f"trainer.{key} '{value}' is unknown: use "):
        TrainerSettings(**{key: value})
    assert TrainerSettings(strategy="fsdp").strategy == "fsdp"


def test_deepspeed_refuses_to_clip_by_value():
    with pytest.raises(
        ValueError, match="gradient_clip_algorithm is value, but DeepSpeed clips by norm only"
    ):
        TrainerSettings(strategy="deepspeed_2", gradient_clip_algorithm="value")


def test_the_best_weights_are_exported_with_their_own_figures(tiny, recipe, tmp_path):
    run(recipe, tmp_path / "best", "--optimizer.lr", "5", "--trainer.gradient_clip_val", "0")
    found = json.loads((tmp_path / "best" / "drafter" / "provenance.json").read_text())["measured"]
    logged = csv.DictReader((tmp_path / "best" / "lightning" / "version_0" / "metrics.csv").open())
    losses = [float(row["val/loss"]) for row in logged if row["val/loss"]]
    assert found["val/loss"] == pytest.approx(min(losses), rel=1e-5)


def test_a_loss_that_is_ramped_in_exports_the_weights_that_learnt_most(tiny, recipe, tmp_path):
    """Medusa-2's sine ramp makes the training loss rise while the heads learn; the choice must not
    follow it.
    """
    arguments = {
        "rank": 2,
        "dropout": 0.0,
        "schedule": "sine",
        "self_distillation": True,
        "coefficient": 1.0,
    }
    flags = [
        flag
        for key, value in arguments.items()
        for flag in (f"--drafter.{key}", str(value).lower())
    ]
    run(
        recipe,
        tmp_path / "run",
        "--drafter",
        "modules.drafters.heads.medusa2.Medusa2",
        *flags,
        "--trainer.max_steps",
        "20",
        "--trainer.val_check_interval",
        "5",
        "--probe.prompts",
        "0",
        "--drafter.heads",
        "2",
    )
    logged = list(
        csv.DictReader((tmp_path / "run" / "lightning" / "version_0" / "metrics.csv").open())
    )
    losses, heads = (
        [float(row[name]) for row in logged if row[name]]
        for name in ("val/loss", "val/cross_entropy_0")
    )
    assert (
        losses == sorted(losses, reverse=True)
        and heads == sorted(heads, reverse=True)
        and len(losses) == 5
    )
    last = torch.load(
        tmp_path / "run" / "lightning" / "checkpoints" / "last.ckpt", weights_only=True
    )
    assert all(
        torch.equal(tensor, last["state_dict"][f"trainable.{name}"])
        for name, tensor in weights(tmp_path / "run").items()
    )


def test_weights_between_two_validations_compete_too(tiny, recipe, tmp_path):
    run(recipe, tmp_path / "run", "--trainer.max_steps", "5", "--trainer.val_check_interval", "4")
    last = torch.load(
        tmp_path / "run" / "lightning" / "checkpoints" / "last.ckpt", weights_only=True
    )
    assert last["global_step"] == 5
    exported = weights(tmp_path / "run")
    assert torch.equal(
        exported["blocks.0.0.linear.weight"],
        last["state_dict"]["trainable.blocks.0.0.linear.weight"],
    )


def test_a_warm_start_begins_with_the_weights_of_an_earlier_run(tiny, recipe, tmp_path):
    run(recipe, tmp_path / "a")
    run(recipe, tmp_path / "b", "--init_from", str(tmp_path / "a"), "--optimizer.lr", "1e-12")
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_an_output_that_is_taken_is_refused_unless_overwritten(tiny, recipe, tmp_path):
    run(recipe, tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run: add --resume last, --overwrite"):
        run(recipe, tmp_path / "run")
    assert run(recipe, tmp_path / "run", "--overwrite") == 0
    assert not (tmp_path / "run" / "lightning" / "version_1").exists()


def test_a_resumed_run_may_not_change_what_it_trains(tiny, recipe, tmp_path):
    run(recipe, tmp_path / "run")
    with pytest.raises(
        ValueError, match="--resume: drafter.heads is 3, but the run was begun with 2"
    ):
        run(recipe, tmp_path / "run", "--resume", "last", "--drafter.heads", "3")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--drafter.hads", "3"], "the key 'drafter.hads' is unknown: did you mean heads?"),
        (["--drafter.heads", "many"], "drafter.heads.*expected int"),
        (["--trainer.max_steps", "x"], "trainer.max_steps: expected int"),
        (["--trainer.steps", "3"], "--trainer.steps"),
        (["--trainer.max_steps", "-1"], "trainer.max_steps and trainer.max_epochs are both -1"),
        (
            ["--data.max_lenth", "3"],
            "the key 'data.max_lenth' is unknown: did you mean max_length?",
        ),
        (["--data.train", "none.jsonl"], "none.jsonl.* does not exist"),
        (["--optimizer.lr", "0"], "optimizer.lr must be above 0"),
        (["--config", "nothing.yaml"], "--config 'nothing.yaml' is neither"),
        (["--resume", "last"], "last.ckpt does not exist or is not whole"),
        (["--init_from", "/none"], "'/none' does not exist"),
        (["--trainer.strategy", "magic"], "trainer.*'magic' is unknown: use auto, ddp"),
        (["--trainer.precision", "7"], "trainer.*'7' is unknown: use one of 32-true"),
        (
            ["--config", "preference/aligned.yaml"],
            "objective: it continues a trained drafter: .* --init_from",
        ),
        (["--checkpoint.best_by", "probe/tau", "--probe.prompts", "0"], "probe.prompts is 0"),
    ],
)
def test_mistakes_are_one_line_before_any_model_loads(recipe, tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr("train.run.load_target", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=words) as caught:
        run(recipe, tmp_path / "run", *flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "lightning").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--drafter.heads=0", "heads"),
        ("--drafter.heads=-2", "heads"),
        ("--drafter.blocks=-1", "blocks"),
        ("--drafter.tree=nonsense", "tree"),
        ("--drafter.heads=null", "drafter: its arguments do not fit: TypeError"),
        ("--data.validation_fraction=null", "the config cannot be read: TypeError"),
        ("--drafter.tree=[[99]]", "tree"),
        ("--drafter.draft_vocabulary=0", "draft_vocabulary"),
    ],
)
def test_arguments_of_a_drafter_are_checked_before_the_target_loads(
    tiny, recipe, tmp_path, monkeypatch, flag, words
):
    monkeypatch.setattr("train.run.load_target", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=words) as caught:
        run(recipe, tmp_path / "run", flag)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("profile", [[], ["--profile"]])
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--drafter.fc_norm", "true", "--drafter.norm_before_fc", "true"],
            "fc_norm and norm_before_fc are both true, .*: set one of them to false",
        ),
        (
            ["--optimizer.muon_lr", "1e-3", "--trainer.strategy", "deepspeed_2"],
            "optimizer.muon_lr is 0.001, but trainer.strategy deepspeed_2 cuts matrices",
        ),
    ],
)
def test_what_excludes_each_other_is_refused_before_data_and_target_load(
    tiny, recipe, tmp_path, monkeypatch, flags, words, profile
):
    for name in ("train.run.load_target", "train.cli.load_target"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(
        "data.datamodule.ConversationData.setup", lambda *_: pytest.fail("data was loaded")
    )
    recipe.write_text(
        recipe.read_text()
        .replace("heads.medusa.Medusa", "feature.eagle3.Eagle3")
        .replace("{heads: 2, ", "{")
    )
    with pytest.raises(ValueError, match=words) as caught:
        run(recipe, tmp_path / "run", *flags, *profile)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_target_is_outlined_where_tensors_hold_numbers(tiny, recipe, tmp_path, monkeypatch):
    """A GGUF file is converted there on a new machine, which the meta device cannot."""

    def outline(*_):
        assert torch.empty(0).device.type == "cpu"
        raise ValueError("outlined")

    monkeypatch.setattr("train.cli.outline", outline)
    with pytest.raises(ValueError, match="outlined"):
        run(recipe, tmp_path / "run")


def test_a_run_that_ends_before_training_leaves_nothing(tiny, recipe, tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("no such target")

    monkeypatch.setattr("train.run.load_target", refuse)
    with pytest.raises(ValueError, match="no such target"):
        run(recipe, tmp_path / "runs" / "x")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("seed: 1")
    with pytest.raises(ValueError, match="no such target"):
        run(recipe, tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["config.yaml"]


def test_a_command_without_a_recipe_says_what_is_missing():
    with pytest.raises(ValueError, match="--config is missing: name a recipe"):
        command(["--trainer.max_steps", "3"])


def test_configs_merge_left_to_right_and_flags_win(recipe, tmp_path):
    (tmp_path / "more.yaml").write_text(
        "drafter: {init_args: {heads: 7}}\ntrainer: {max_steps: 2}\nseed: 5\n"
    )
    config = make_parser().parse_args(
        ["--config", str(recipe), "--config", str(tmp_path / "more.yaml"), "--seed", "9"]
    )
    assert config.drafter.init_args.heads == 7 and config.drafter.init_args.draft_vocabulary == 48
    assert (config.trainer.max_steps, config.optimizer.lr, config.seed) == (2, 0.01, 9)


def test_what_deepspeed_says_of_the_device_is_left_out(caplog):
    quieten()
    for words in ("Setting accelerator to CPU. If you have GPU", "the loss scale is too low"):
        logging.getLogger("DeepSpeed").warning(words)
    assert caplog.messages == ["the loss scale is too low"]


def test_the_help_fits_on_one_screen():
    lines = make_parser().format_help().splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 120
    shown = "\n".join(lines)
    assert all(
        f"--{name}" in shown
        for name in ("config", "drafter", "output", "resume", "init_from", "trainer.KEY")
    )


def test_the_printed_config_is_a_config(recipe, capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--config", str(recipe), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["optimizer"]["lr"] == 0.01


def test_the_target_stays_out_of_the_checkpoints(tiny, recipe, tmp_path):
    run(recipe, tmp_path / "run")
    saved = torch.load(
        tmp_path / "run" / "lightning" / "checkpoints" / "last.ckpt", weights_only=True
    )
    assert all(name.startswith("trainable.") for name in saved["state_dict"])


@pytest.mark.parametrize("arch", ["qwen3", "gpt2"])
def test_other_architectures_train_and_decode_losslessly(recipe, tmp_path, monkeypatch, arch):
    target = tiny_target(arch, dtype=torch.float64)
    monkeypatch.setattr("train.run.load_target", lambda *_: target)
    run(recipe, tmp_path / "run", "--trainer.precision", "64-true")
    drafter = load_pretrained(tmp_path / "run", target)
    assert isinstance(drafter, Drafter) and next(drafter.parameters()).dtype == torch.float64
    prompts = [[7, 8, 9], [20, 21, 22, 23]]
    drafted, plain = (
        SpeculativeDecoder(target, one).decode(prompts, Sampling(), 24) for one in (drafter, None)
    )
    assert [trace.ids for trace in drafted] == [trace.ids for trace in plain]


def test_a_loss_that_is_not_a_number_ends_the_run_in_one_line(
    tiny, recipe, tmp_path, capsys, monkeypatch
):
    losses, seen = Medusa.loss, []

    def spoilt(self, *arguments):
        made = losses(self, *arguments)
        seen.append(float(made.total))
        return replace(made, total=made.total * math.nan) if len(seen) == 3 else made

    monkeypatch.setattr(Medusa, "loss", spoilt)
    assert one_line_run(command, ["--config", str(recipe), "--output", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert re.search(r"error: the train loss is nan at step 2: lower optimizer.lr", said)


def test_recomputed_activations_train_the_same_weights(tiny, recipe, tmp_path):
    run(recipe, tmp_path / "kept")
    run(recipe, tmp_path / "recomputed", "--trainer.activation_checkpointing", "true")
    kept, recomputed = weights(tmp_path / "kept"), weights(tmp_path / "recomputed")
    for name, tensor in kept.items():
        torch.testing.assert_close(recomputed[name], tensor)
