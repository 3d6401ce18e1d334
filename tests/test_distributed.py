"""Two processes train as one with the doubled batch, write one run, and leave checkpoints for any number."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from ldm_audio.distributed import BatchNorm2d
from ldm_audio.training.checkpoint import load_checkpoint

TESTS = Path(__file__).parent


ENVIRONMENT = os.environ | {"PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}


def torchrun_command(*arguments: object) -> list[str]:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    return [sys.executable, *launch, *map(str, arguments)]


def torchrun(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = torchrun_command(*arguments)
    return subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


slow = pytest.mark.slow
every_case = pytest.mark.parametrize(
    "what, name",
    [
        *(("ddp", name) for name in ranks.DDP),
        *(pytest.param("rest", name, marks=slow) for name in ranks.FSDP2),
    ],
)


@pytest.fixture(scope="module")
def two(tmp_path_factory, processes):
    """`two("ddp" or "rest")`: the folder in which two processes trained."""
    folder = tmp_path_factory.mktemp("two")

    def trained(what: str) -> Path:
        if not (folder / what).exists():
            store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            both = [
                processes.Process(target=ranks.run, args=(rank, store.port, what, folder / what))
                for rank in (0, 1)
            ]
            for process in both:
                process.start()
            for process in both:
                process.join()
            assert [process.exitcode for process in both] == [0, 0]
        return folder / what

    return trained


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """`one(name)`: the folder in which one process trained that objective."""
    folder = tmp_path_factory.mktemp("one")

    def trained(name: str) -> Path:
        if not (folder / name).exists():
            ranks.train(folder / name, name, strategy="none", max_steps=5)
        return folder / name

    return trained


def losses(folder: Path) -> list[dict]:
    """What the metrics say, without the clock and the memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "train/", "val/", "grad_norm/", "lr/", "ema_decay")
    return [{key: value for key, value in row.items() if key.startswith(kept)} for row in rows]


def assert_equal_losses(own: list[dict], expected: list[dict]) -> None:
    assert [row.keys() for row in own] == [row.keys() for row in expected]
    for row, other in zip(own, expected):
        assert row == pytest.approx(other, rel=1e-6, abs=1e-6)


@every_case
def test_two_processes_have_the_losses_of_one_with_the_doubled_batch(what, name, one, two):
    rows = losses(two(what) / name)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5, 5]
    assert_equal_losses(rows, losses(one(name)))


@every_case
def test_two_processes_write_the_weights_of_one(what, name, one, two):
    files = sorted(path.relative_to(one(name)) for path in one(name).rglob("*.safetensors"))
    assert files and files == sorted(
        path.relative_to(two(what) / name) for path in (two(what) / name).rglob("*.safetensors")
    )
    for file in files:
        expected = load_file(one(name) / file)
        for key, value in load_file(two(what) / name / file).items():
            assert value.dtype == expected[key].dtype
            assert (value - expected[key]).abs().max() < 1e-6, key


@pytest.mark.parametrize("what", ["ddp", pytest.param("rest", marks=slow)])
def test_batch_statistics_and_the_scale_of_latents_are_those_of_both(what, one, two):
    own, expected = (
        load_checkpoint(folder / "checkpoints" / "last.pt")["objective"]
        for folder in (two(what) / "contrastive", one("contrastive"))
    )
    assert own.keys() == expected.keys()
    for name in ("running_mean", "running_var"):
        key = f"clap.audio_tower.mel_norm.{name}"
        assert torch.allclose(own[key], expected[key], rtol=1e-9)
        assert not torch.allclose(own[key], BatchNorm2d(16).state_dict()[name].double())
    own, expected = (
        load_checkpoint(folder / "checkpoints" / "last.pt")["objective"]["latent_scale"].item()
        for folder in (two(what) / "latent_diffusion", one("latent_diffusion"))
    )
    assert own == pytest.approx(expected, rel=1e-12) and own != 1.0


@slow
@pytest.mark.parametrize("strategy, straight", [("ddp", "ddp"), ("fsdp2", "rest")])
def test_a_run_of_two_resumes(strategy, straight, two):
    straight, resumed = losses(two(straight) / "contrastive"), losses(two("rest") / f"{strategy}_resumed")
    end_of_first = next(i for i, row in enumerate(resumed) if row["step"] == 3 and "val/loss" in row)
    del resumed[end_of_first]
    assert resumed == straight


@slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_accumulation_and_activation_checkpointing_change_nothing(strategy, one, two):
    assert_equal_losses(losses(two("rest") / f"{strategy}_accumulated"), losses(one("latent_diffusion")))


@slow
def test_a_sharded_checkpoint_is_continued_in_one_process(one, two):
    folder = two("rest") / "begun"
    assert (folder / "checkpoints" / "tensors_at_step_0000003" / "__1_0.distcp").exists()
    ranks.train(folder, "latent_diffusion", strategy="none", max_steps=5)
    rows = [row for row in losses(folder) if not (row["step"] == 3 and "val/loss" in row)]
    assert_equal_losses(rows, losses(one("latent_diffusion")))


VAE_RUN = (
    "objective=vae", "vae=small", "vae.channels=8", "vae.channel_mults=[1,2]", "vae.norm_groups=4",
    "discriminator=patch_small", "discriminator.channels=4", "objective.adversarial_start=1",
    "data=synthetic", "data.num_samples=10240", "data.train.size=8", "data.val.size=3", "num_workers=0",
    "val_items=3", "val_batch_size=1", "trainer.log_every=1", "trainer.prepare_batches=1", "run=vae",
)  # fmt: skip


@slow
def test_the_entry_point_trains_in_two_processes_and_goes_on_in_one(command, tmp_path, capsys):
    train = (TESTS.parent / "train.py", *VAE_RUN)
    for name, max_steps in (("two", 2), ("two", 3)):
        run = (f"runs={tmp_path / name}", "batch_size=1", f"trainer.max_steps={max_steps}")
        done = torchrun(*train, *run, "trainer.strategy=ddp", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    alone = (*VAE_RUN, "batch_size=2", "trainer.max_steps=3")
    assert command("train.py", *alone, f"runs={tmp_path / 'one'}") == 0
    (metrics,) = (tmp_path / "two").rglob("metrics.jsonl")
    rows, expected = losses(metrics.parent), losses(tmp_path / "one" / "vae")
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 3]
    del rows[2]  # the validation at the end of the first session
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-2, abs=1e-5)  # float32, three steps on
    # the same items a step in another number of processes
    assert command("train.py", *alone, f"runs={tmp_path / 'two'}", "trainer.max_steps=4") == 0
    assert [row["step"] for row in losses(metrics.parent)][-2:] == [4, 4]
    capsys.readouterr()
    assert command("train.py", *alone, f"runs={tmp_path / 'two'}", "batch_size=1") == 2
    assert "batch_size: 2 -> 1" in capsys.readouterr().err


@slow
def test_two_processes_tell_an_error_once_and_stop_together_at_a_signal(tmp_path):
    train = (TESTS.parent / "train.py", *VAE_RUN, f"runs={tmp_path}", "trainer.strategy=ddp", "batch_size=1")
    done = torchrun(*train, "trainer.precision=fp16", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("error: trainer.precision=fp16: expected fp32 or bf16") == 1
    assert "ldm_audio/" not in done.stderr  # no traceback of ours

    launched = subprocess.Popen(
        torchrun_command(*train, "trainer.max_steps=100000"), cwd=tmp_path, env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "vae" / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 600
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert time.monotonic() < deadline and launched.poll() is None, launched.communicate()
            time.sleep(0.1)
        launched.send_signal(signal.SIGTERM)
        out, err = launched.communicate(timeout=600)
    finally:
        launched.kill()
    assert "stopped at step" in out, err
    last = load_checkpoint(tmp_path / "vae" / "checkpoints" / "last.pt")
    assert last["step"] == json.loads(metrics.read_text().splitlines()[-1])["step"]


@slow
def test_what_does_not_fit_together_is_refused(command, tmp_path, capsys):
    run = (*VAE_RUN, f"runs={tmp_path}")
    assert command("train.py", *run, "trainer.strategy=ddp") == 2
    assert "trainer.strategy=ddp: start it by torchrun" in capsys.readouterr().err
    assert command("train.py", *run, "trainer.strategy=fsdp") == 2
    assert "trainer.strategy=fsdp: expected none, ddp, fsdp2" in capsys.readouterr().err
    done = torchrun(TESTS.parent / "train.py", *run, "trainer.strategy=fsdp2", cwd=tmp_path)
    assert done.stderr.count("trainer.strategy=fsdp2: VAEObjective can be trained by none, ddp") == 1


@pytest.mark.parametrize("shape", [(3, 4, 5, 1), (3, 4, 1, 5), (3, 4, 5, 6), (3, 4, 1, 1)])
def test_gradients_of_batch_norm_are_right_in_every_layout(shape):
    """torch's own are not where an axis of length 1 meets two layouts."""
    x, gradient = torch.randn(2, *shape, dtype=torch.float64)
    deviation = (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    centred = (x - x.mean((0, 2, 3), keepdim=True)) / deviation
    for axes in itertools.product(itertools.permutations(range(4)), repeat=2):
        norm = BatchNorm2d(4).double()
        own, ahead = (
            value.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
            for value, order in zip((x, gradient), axes)
        )
        norm(own).backward(ahead)
        assert torch.allclose(norm.bias.grad, gradient.sum((0, 2, 3))), axes
        assert torch.allclose(norm.weight.grad, (gradient * centred).sum((0, 2, 3))), axes
