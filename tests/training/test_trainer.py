"""The training loop: exact resume, accumulation, clipping, what happens to bad steps and to signals."""

import os
import signal
from functools import partial

import pytest
import torch
import toys
from runs import VALIDATION, assert_same, assert_same_runs, objective, rows, state, trainer
from safetensors.torch import load_file
from torch import nn

from ldm_audio.errors import InputError
from ldm_audio.objectives.base import Objective
from ldm_audio.training.optim import constant, warmup
from ldm_audio.training.trainer import Diverged

OBJECTIVES = sorted(toys.OBJECTIVES)


class Scripted(Objective):
    """Pulls one weight towards 1; `script[step]` multiplies the loss or is called."""

    accumulable = True

    def __init__(self, script: dict | None = None, validations: tuple[float, ...] = ()):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.0))
        self.script = script or {}
        self.validations = iter(validations)

    def players(self):
        return {"scripted": [self.weight]}

    def networks(self):
        return {}

    def losses(self, batch, step):
        entry = self.script.get(step, 1.0)
        if callable(entry):
            entry()
            entry = 1.0
        distance = (self.weight - 1) ** 2
        root = (0 * self.weight).sqrt() if entry == "gradient" else 0.0  # a loss of 0 whose gradient is NaN
        loss = root + distance * (1.0 if entry == "gradient" else entry)
        yield "scripted", loss, {"distance": distance, "scaled": loss}

    def validate(self, batch):
        return {"loss": torch.tensor(next(self.validations, 1.0))}


# --- resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_resume_is_exact(name, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    torch.manual_seed(1)
    trainer(straight).fit(objective(name), toys.Batches(2), VALIDATION)
    trainer(resumed, max_steps=3).fit(objective(name), toys.Batches(2), VALIDATION)
    torch.manual_seed(123)  # nothing of the second process is like the first
    trainer(resumed, max_steps=6).fit(objective(name, seed=7), toys.Batches(2), VALIDATION)
    assert state(straight)["step"] == 6
    assert_same_runs(straight, resumed)


class Killed(Exception):
    pass


def test_a_crash_between_checkpoints_leaves_no_doubled_and_no_missing_row(tmp_path):
    def crash():
        raise Killed

    straight, crashed = tmp_path / "straight", tmp_path / "crashed"
    settings = {"max_steps": 9, "validate_every": 2, "save_every": 4}
    trainer(straight, **settings).fit(Scripted(), toys.Batches(1), VALIDATION)
    with pytest.raises(Killed):
        trainer(crashed, **settings).fit(Scripted({7: crash}), toys.Batches(1), VALIDATION)
    assert rows(crashed)[-1]["step"] == 7 and state(crashed)["step"] == 4
    with (crashed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/dist')  # and the disk was full
    trainer(crashed, **settings).fit(Scripted(), toys.Batches(1), VALIDATION)
    assert_same_runs(straight, crashed)
    steps = [row["step"] for row in rows(crashed) if "train/distance" in row]
    assert steps == list(range(1, 10))


def test_a_run_that_crashed_before_its_first_checkpoint_starts_afresh(tmp_path):
    def crash():
        raise Killed

    with pytest.raises(Killed):
        trainer(tmp_path).fit(Scripted({2: crash}), toys.Batches(1), VALIDATION)
    trainer(tmp_path).fit(Scripted(), toys.Batches(1), VALIDATION)
    assert [row["step"] for row in rows(tmp_path) if "train/distance" in row] == [1, 2, 3, 4, 5, 6]


def test_more_steps_continue_and_a_finished_run_says_so(tmp_path, capsys):
    best = trainer(tmp_path, max_steps=2).fit(Scripted(validations=(3.0,)), toys.Batches(1), VALIDATION)
    before = rows(tmp_path)
    untouched = Scripted()
    assert trainer(tmp_path, max_steps=2).fit(untouched, toys.Batches(1), VALIDATION) == best == 3.0
    assert "finished at step 2; raise trainer.max_steps to go on" in capsys.readouterr().out
    assert rows(tmp_path) == before
    trainer(tmp_path, max_steps=5).fit(Scripted(), toys.Batches(1), VALIDATION)
    assert state(tmp_path)["step"] == 5 and rows(tmp_path)[: len(before)] == before


# --- one step ----------------------------------------------------------------------------------------------


def test_accumulation_equals_the_big_batch(tmp_path):
    weights = []
    sgd = partial(torch.optim.SGD, lr=0.05)
    for accumulate, size in ((1, 6), (3, 2)):
        made = toys.objective("latent_diffusion", text_probability=0.5).double()
        made.prepare = lambda batches: None  # sees other batches where they are smaller
        folder = tmp_path / str(accumulate)
        run = trainer(folder, max_steps=3, accumulate=accumulate, optimizer=sgd, lr_schedule=constant)
        run.fit(made, toys.cached(toys.Batches(size)), [])
        weights.append(made.unet.state_dict())
    torch.manual_seed(0)
    start = toys.unet().state_dict()
    assert max((start[key] - value).abs().max() for key, value in weights[0].items()) > 1e-3
    for key, value in weights[0].items():
        assert value.dtype == torch.float64 and (value - weights[1][key]).abs().max() < 1e-12, key
    for key in ("train/diffusion", "grad_norm/unet"):
        ones, threes = ([row[key] for row in rows(tmp_path / name) if key in row] for name in ("1", "3"))
        assert ones == pytest.approx(threes, rel=1e-6)


def test_resume_with_accumulation_goes_on_with_the_next_batches(tmp_path):
    for name, sessions in (("straight", [4]), ("resumed", [1, 4])):
        for max_steps in sessions:
            made = toys.objective("latent_diffusion").double()
            trainer(tmp_path / name, max_steps=max_steps, accumulate=2).fit(
                made, toys.cached(toys.Batches(2)), []
            )
    straight, resumed = (state(tmp_path / name) for name in ("straight", "resumed"))
    assert resumed.pop("num_rows") == straight.pop("num_rows") + 1  # the validation at the end of step 1
    assert_same(straight, resumed)


@pytest.mark.parametrize("name", ["vae", "vocoder", "contrastive"])
def test_objectives_that_cannot_be_accumulated_refuse(name, tmp_path):
    with pytest.raises(InputError, match=r"trainer\.accumulate=2: .*Objective takes only 1"):
        trainer(tmp_path, accumulate=2).fit(toys.objective(name), toys.Batches(1), VALIDATION)


@pytest.mark.parametrize("limit, moved", [(None, 2.0), (5.0, 2.0), (0.5, 0.5)])
def test_clipping_limits_the_norm_and_logs_what_it_was(limit, moved, tmp_path):
    made = Scripted()
    sgd = partial(torch.optim.SGD, lr=1.0)
    trainer(tmp_path, max_steps=1, clip_norm=limit, optimizer=sgd, lr_schedule=constant).fit(
        made, toys.Batches(1), VALIDATION
    )
    assert made.weight.item() == pytest.approx(moved, rel=1e-5)
    assert rows(tmp_path)[0]["grad_norm/scripted"] == pytest.approx(2.0)


def test_the_learning_rate_follows_the_schedule(tmp_path):
    made = Scripted()
    sgd = partial(torch.optim.SGD, lr=0.25)
    run = trainer(tmp_path, max_steps=3, optimizer=sgd, lr_schedule=partial(warmup, warmup_steps=2))
    run.fit(made, toys.Batches(1), VALIDATION)
    expected = 0.0
    for rate in (0.125, 0.25, 0.25):
        expected -= rate * 2 * (expected - 1)
    assert made.weight.item() == pytest.approx(expected, rel=1e-6)
    logged = [row["lr/scripted"] for row in rows(tmp_path) if "lr/scripted" in row]
    assert logged == [0.125, 0.25, 0.25]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_bf16_trains_float32_weights(name, tmp_path):
    made = objective(name)
    trainer(tmp_path, max_steps=3, precision="bf16").fit(made, toys.Batches(2), VALIDATION)
    assert {value.dtype for value in made.learned_state().values() if value.is_floating_point()} == {
        torch.float32
    }
    losses = [row[key] for row in rows(tmp_path) for key in row if key.startswith(("train/", "val/"))]
    assert (
        losses
        and all(loss is not None for loss in losses)
        and not any("bad_steps" in row for row in rows(tmp_path))
    )


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path):
    kept = []
    for enabled in (False, True):
        torch.manual_seed(3)
        made = objective("latent_diffusion")
        run = trainer(tmp_path / str(enabled), max_steps=2, activation_checkpointing=enabled)
        run.fit(made, toys.Batches(2), VALIDATION)
        kept.append(made.learned_state())
    for key, value in kept[0].items():
        assert (value - kept[1][key]).abs().max() < 1e-6, key


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"trainer\.precision=fp16: expected fp32 or bf16"):
        trainer(tmp_path, precision="fp16")


# --- bad steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry, term", [(float("nan"), "scaled"), (float("inf"), "scaled"), ("gradient", "gradient")]
)
def test_a_step_that_is_not_finite_is_skipped_and_named(entry, term, tmp_path, capsys):
    good, bad = Scripted(), Scripted({2: entry})
    trainer(tmp_path / "good", max_steps=3, lr_schedule=constant).fit(good, toys.Batches(1), VALIDATION)
    trainer(tmp_path / "bad", max_steps=4, lr_schedule=constant).fit(bad, toys.Batches(1), VALIDATION)
    assert f"step 2: scripted: {term} not finite; step skipped" in capsys.readouterr().out
    assert bad.weight.item() == good.weight.item() != 0  # four steps, of which one did nothing
    assert [row.get("bad_steps") for row in rows(tmp_path / "bad") if "val/loss" not in row] == [
        None,
        None,
        1.0,
        None,
    ]


def test_a_row_of_bad_steps_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    bad = dict.fromkeys(range(4, 99), float("nan"))
    with pytest.raises(Diverged, match="step 6: scripted: scaled not finite, 3 steps in a row"):
        trainer(tmp_path, max_steps=99, save_every=1).fit(Scripted(bad), toys.Batches(1), VALIDATION)
    assert state(tmp_path)["step"] == 4  # the steps 5 and 6 were due to be saved, but bad
    assert state(tmp_path)["objective"]["weight"].isfinite()


def test_single_bad_steps_do_not_add_up(tmp_path):
    bad = dict.fromkeys((0, 1, 3, 4, 6, 7), float("nan"))
    trainer(tmp_path, max_steps=9).fit(Scripted(bad), toys.Batches(1), VALIDATION)
    assert state(tmp_path)["step"] == 9


def test_a_run_whose_last_step_is_bad_is_not_finished(tmp_path):
    with pytest.raises(Diverged, match="the last 2 steps were bad"):
        trainer(tmp_path).fit(Scripted({4: float("nan"), 5: float("nan")}), toys.Batches(1), VALIDATION)
    assert state(tmp_path)["step"] == 3


def test_a_bad_term_of_either_adversary_moves_neither(tmp_path):
    made = toys.objective("vocoder", mel_weight=float("nan"), adversarial_start=99)
    before = {key: value.clone() for key, value in made.learned_state().items()}
    with pytest.raises(Diverged, match="vocoder: loss not finite"):
        trainer(tmp_path).fit(made, toys.Batches(1), VALIDATION)
    assert_same(before, dict(made.learned_state()))


# --- signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_within_a_step_saves_and_exits_with_its_code(number, tmp_path, capsys):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trainer(straight).fit(Scripted(), toys.Batches(1), VALIDATION)
    with pytest.raises(SystemExit) as exit:
        script = {3: lambda: os.kill(os.getpid(), number)}
        trainer(stopped).fit(Scripted(script), toys.Batches(1), VALIDATION)
    assert exit.value.code == 128 + number
    assert state(stopped)["step"] == 4 == rows(stopped)[-1]["step"]
    assert "stopped at step 4; the same command continues" in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    trainer(stopped).fit(Scripted(), toys.Batches(1), VALIDATION)
    assert_same_runs(straight, stopped)


def test_a_second_signal_interrupts_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path).fit(Scripted({4: twice}), toys.Batches(1), VALIDATION)
    assert state(tmp_path)["step"] == 3


def test_a_signal_in_the_last_step_leaves_its_validation_to_the_same_command(tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    script = {5: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with pytest.raises(SystemExit):
        trainer(stopped).fit(Scripted(script), toys.Batches(1), VALIDATION)
    assert state(stopped)["step"] == 6 and state(stopped)["validation_due"]
    assert trainer(stopped).fit(Scripted(), toys.Batches(1), VALIDATION) == 1.0
    trainer(straight).fit(Scripted(), toys.Batches(1), VALIDATION)
    assert_same_runs(straight, stopped)


# --- what is written ---------------------------------------------------------------------------------------


def test_the_best_weights_are_those_with_the_smallest_monitored_value(tmp_path):
    written = []
    run = trainer(
        tmp_path, validate_every=1, save_weights=lambda made, folder: written.append((folder.name, run.step))
    )
    best = run.fit(Scripted(validations=(5.0, 4.0, 6.0, float("nan"), 3.0, 3.5)), toys.Batches(1), VALIDATION)
    assert best == 3.0 == state(tmp_path)["best"]
    assert [step for name, step in written if name == "best"] == [1, 2, 5]
    assert [step for name, step in written if name == "weights"] == [3, 6]


def test_weights_files_hold_the_average_and_training_goes_on_from_its_own(tmp_path):
    made = objective("latent_diffusion")
    trainer(tmp_path, max_steps=3).fit(made, toys.Batches(2), VALIDATION)
    kept = state(tmp_path)
    for key, value in load_file(tmp_path / "weights" / "unet.safetensors").items():
        assert torch.equal(value, kept["ema"][f"unet.{key}"])
        assert torch.equal(made.unet.state_dict()[key], kept["objective"][f"unet.{key}"])
    own, average = kept["objective"]["unet.conv_in.weight"], kept["ema"]["unet.conv_in.weight"]
    assert not torch.equal(own, average)


def test_validation_is_the_mean_over_items_with_averaged_weights_in_eval_mode(tmp_path):
    seen = []

    class Watched(Scripted):
        def networks(self):
            return {}

        def averaged(self):
            return {"all": self}

        def validate(self, batch):
            seen.append((self.training, self.weight.item()))
            return {"loss": batch["item"].float().mean()}

    made = Watched()
    sgd = partial(torch.optim.SGD, lr=0.5)
    run = trainer(tmp_path, max_steps=1, optimizer=sgd, lr_schedule=constant, ema_decay=0.9)
    best = run.fit(made, toys.Batches(1), [toys.batch(0, 2), toys.batch(7)])
    assert best == pytest.approx((0 + 2 + 7) / 3)
    assert made.training and made.weight.item() == 1.0
    averaged = 1 - 2 / 11  # from 0 towards 1 with decay (1 + 1) / (10 + 1)
    assert seen == [(False, pytest.approx(averaged))] * 2


@pytest.mark.parametrize("name, waveforms", [("vae", False), ("vocoder", True), ("latent_diffusion", True)])
def test_previews_are_written_beside_the_metrics(name, waveforms, tmp_path):
    trainer(tmp_path, max_steps=1).fit(objective(name), toys.Batches(2), VALIDATION)
    files = sorted(path.name for path in (tmp_path / "previews").iterdir())
    assert "0000001.png" in files
    assert any(file.endswith(".wav") for file in files) == waveforms


class Recorder:
    """A logger that remembers."""

    def __init__(self):
        self.steps, self.previews, self.closed = [], [], False

    def log(self, step, metrics):
        assert all(isinstance(value, float) for value in metrics.values())
        self.steps.append(step)

    def preview(self, step, previews):
        self.previews.append(step)

    def close(self):
        self.closed = True


def test_other_loggers_see_everything_and_are_closed_even_after_an_error(tmp_path):
    recorder = Recorder()
    run = trainer(tmp_path / "good", max_steps=4, log_every=2, validate_every=2, loggers=[recorder])
    run.fit(objective("vae"), toys.Batches(2), VALIDATION)
    assert recorder.steps == [2, 2, 4, 4] and recorder.previews == [2, 4] and recorder.closed
    recorder = Recorder()
    with pytest.raises(Diverged):
        bad = dict.fromkeys(range(9), float("nan"))
        trainer(tmp_path / "bad", loggers=[recorder]).fit(Scripted(bad), toys.Batches(1), VALIDATION)
    assert recorder.closed


def test_an_error_before_the_first_batch_is_shown_as_it_is(tmp_path):
    def no_batches(step):
        raise InputError("the data set is empty")

    made = Scripted()
    trainer(tmp_path, max_steps=3).fit(made, toys.Batches(1), VALIDATION)
    with pytest.raises(InputError, match="the data set is empty"):
        trainer(tmp_path).fit(made, no_batches, VALIDATION)
