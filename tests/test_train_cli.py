"""The entry points, end to end on toy sizes: what they write, and what they say to bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import ldm_audio
from ldm_audio.audio.io import read_audio, write_wav
from ldm_audio.data.latents import Latents
from ldm_audio.pipelines.encode import state_hash
from ldm_audio.pretrained import load, save_network
from ldm_audio.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*CLAP's text tower")  # two steps do not teach it much

CHECKOUT = Path(ldm_audio.__file__).parents[1]
SAMPLES = 10240  # 0.64 s

TINY_VAE = (
    "vae=small",
    "vae.channels=8",
    "vae.channel_mults=[1,2]",
    "vae.norm_groups=4",
    "vae.latent_channels=4",
)
TINY_CLAP = (
    "clap=small", "clap.joint_dim=12", "clap.front_end.max_samples=10080", "clap.audio_tower.spec_size=64",
    "clap.audio_tower.dim=8", "clap.audio_tower.depths=[1,1]", "clap.audio_tower.num_heads=[2,2]",
    "clap.audio_tower.window_size=4", "clap.text_tower.dim=16", "clap.text_tower.depth=1",
    "clap.text_tower.num_heads=2", "clap.text_tower.ff_dim=16", "tokenizer.vocab_size=300",
)  # fmt: skip
TINY_UNET = (
    "unet=small", "unet.channels=8", "unet.channel_mults=[1,2]", "unet.attention_levels=[false,true]",
    "unet.num_heads=[1,2]", "unet.embed_dim=12", "unet.norm_groups=4", "unet.in_channels=4",
    "unet.out_channels=4",
)  # fmt: skip
TINY_VOCODER = ("vocoder=small", "vocoder.channels=16")
SHORT_CLIPS = ("data=synthetic", f"data.num_samples={SAMPLES}", "data.train.size=6", "data.val.size=2")
BRIEF = (
    "batch_size=2", "num_workers=0", "val_items=2", "trainer.max_steps=2", "trainer.log_every=1",
    "trainer.prepare_batches=1",
)  # fmt: skip
STAGES = {
    "vae": ("objective=vae", *TINY_VAE, "discriminator=patch_small", "discriminator.channels=4",
            "objective.adversarial_start=1", *SHORT_CLIPS),
    "clap": ("objective=contrastive", *TINY_CLAP, "data=synthetic", "data.train.size=6", "data.val.size=2"),
    "vocoder": ("objective=vocoder", *TINY_VOCODER, "discriminator=wave_small", "discriminator.periods=[2]",
                "discriminator.period_channels=[2,4]", "discriminator.scale_channels=[]",
                "objective.segment_samples=3200", "optimizer=adam_gan", *SHORT_CLIPS),
    "unet": ("objective=latent_diffusion", *TINY_UNET),
}  # fmt: skip
VAE_RUN = (*STAGES["vae"], *BRIEF)


def part_paths(folder: Path) -> list[str]:
    return [f"{part}.path={folder}/{part}/weights/{part}.safetensors" for part in ("vae", "clap", "vocoder")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, command) -> Path:
    """Two steps of every stage, by the public path: autoencoder, CLAP, vocoder, encoding, diffusion."""
    folder = tmp_path_factory.mktemp("runs")
    for stage in ("vae", "clap", "vocoder"):
        assert command("train.py", *STAGES[stage], *BRIEF, f"runs={folder}", f"run={stage}") == 0
    parts = part_paths(folder)
    encoded = ("data=synthetic", *SHORT_CLIPS[1:], "batch_size=2", f"out={folder}/latents")
    assert command("ldm_audio.cli", "encode", *encoded, *parts[:2]) == 0
    latents = ("data=latents", f"data.path={folder}/latents")
    assert command("train.py", *STAGES["unet"], *BRIEF, f"runs={folder}", "run=ldm", *latents, *parts) == 0
    return folder


@pytest.fixture
def refused(command, capsys, tmp_path) -> Callable[..., str]:
    """`refused(script, ...)`: the one line that a command says before it exits with 2, nothing trained."""

    def run(script: str, *arguments: str) -> str:
        assert command(script, *arguments) == 2
        shown = capsys.readouterr().err
        assert "Traceback" not in shown
        (line,) = (line for line in shown.splitlines() if line.startswith("error: "))
        assert shown.rstrip().endswith(line)
        assert not list(tmp_path.rglob("last.pt"))
        return line

    return run


def recordings(folder: Path, captions: str = "file_name,caption\na.wav,a hum\n") -> tuple[str, ...]:
    """A folder with one recording; overrides that train the autoencoder on it."""
    seconds = np.arange(SAMPLES) / 16000
    write_wav(folder / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * seconds), 16000)
    (folder / "train.csv").write_text(captions)
    (folder / "val.csv").write_text("file_name,caption\na.wav,a hum\n")
    model = [setting for setting in VAE_RUN if not setting.startswith("data")]
    return (
        *model,
        "data=folder",
        f"data.path={folder}",
        f"data.num_samples={SAMPLES}",
        f"runs={folder.parent}/runs",
    )


# --- what works --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, monitored", [("vae", "loss"), ("clap", "loss"), ("vocoder", "mel"), ("ldm", "loss")]
)
def test_every_objective_trains_two_steps(runs, stage, monitored):
    rows = [json.loads(line) for line in (runs / stage / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert rows[-1][f"val/{monitored}"] == pytest.approx(
        load_checkpoint(runs / stage / "checkpoints" / "last.pt")["best"]
    )
    assert (runs / stage / "config.yaml").is_file()


def test_each_stage_leaves_weights_that_load(runs):
    for part in ("vae", "clap", "vocoder"):
        network = load(str(runs / part / "weights" / f"{part}.safetensors"))
        assert network.provenance["run"] == part and network.provenance["audio"]["n_mels"] == 64
    assert (runs / "clap" / "weights" / "tokenizer.json").is_file()
    for folder in ("weights", "best"):
        assert load(str(runs / "ldm" / folder)).latent_scale != 1.0


def test_a_system_makes_sounds_pictures_and_a_page(runs, command, tmp_path):
    out = tmp_path / "samples"
    arguments = [
        f"weights={runs}/ldm/weights",
        "num_steps=2",
        "duration=0.64",
        f"out={out}",
        "prompt=[a hum,rain]",
    ]
    assert command("sample.py", *arguments) == 0
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["a hum", "rain"]
    for row in rows:
        waveform, rate = read_audio(out / row["file"])
        assert rate == 16000 and waveform.shape == (1, SAMPLES)
        assert (out / row["file"]).with_suffix(".png").is_file()
        assert row["file"] in (out / "index.html").read_text()

    again = tmp_path / "again"
    (tmp_path / "prompts.txt").write_text("rain\n\n")
    arguments[3:] = [
        f"out={again}",
        f"prompts={tmp_path}/prompts.txt",
        f"vocoder.path={runs}/vocoder/best/vocoder.safetensors",
    ]
    assert command("sample.py", *arguments) == 0
    (row,) = (json.loads(line) for line in (again / "samples.jsonl").read_text().splitlines())
    assert row["prompt"] == "rain"


def test_a_recording_is_edited_and_varied_by_the_command(runs, command, tmp_path):
    recording = 0.3 * torch.sin(torch.arange(16000) * 0.2)
    write_wav(tmp_path / "in.wav", recording, 16000, subtype="FLOAT")
    common = (f"weights={runs}/ldm/weights", "num_steps=2", f"edit.path={tmp_path}/in.wav")
    mask = ("edit=inpainting", "edit.mask=[[0.2,0.5]]", "prompt=rain", f"out={tmp_path}/filled")
    assert command("sample.py", *common, *mask) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "filled" / "samples.jsonl").read_text().splitlines())
    filled, _ = read_audio(tmp_path / "filled" / row["file"])
    kept = [*range(3200), *range(8000, 16000)]
    assert filled.shape == (1, 16000) and row["edit"]["mask"] == [[0.2, 0.5]]
    assert np.abs(filled[0][kept] - recording.numpy()[kept]).max() < 1e-4  # 16 bits

    varied = ("edit=variation", "num_waveforms_per_prompt=2", f"out={tmp_path}/varied")
    assert command("sample.py", *common, *varied) == 0
    rows = [json.loads(line) for line in (tmp_path / "varied" / "samples.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == [0, 1] and rows[0]["score"] >= rows[1]["score"]
    assert rows[0]["audio_prompt"].endswith("in.wav") and set(rows[0]["weights"]) > {"unet", "vae", "clap"}


def test_latents_hold_both_splits_and_say_who_made_them(runs):
    train, val = (
        Latents(path=str(runs / "latents" / split), seed=0, mixup=None) for split in ("train", "val")
    )
    assert (len(train), len(val)) == (6, 2)
    vae = load(str(runs / "vae" / "weights" / "vae.safetensors"))
    assert train.encoders["vae"] == val.encoders["vae"] == state_hash(vae.state_dict())


def test_retrieval_of_a_trained_clap_is_printed_and_written(runs, command, tmp_path, capsys):
    arguments = (*SHORT_CLIPS, f"clap.path={runs}/clap/weights/clap.safetensors", "permutations=9")
    assert command("ldm_audio.cli", "retrieve", *arguments, f"out={tmp_path}/found.json") == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["pairs"] == 2 and 0.1 <= found["p"] <= 1
    assert "text_of_audio/recall_at_1" in capsys.readouterr().out


def test_more_steps_continue_the_run_and_the_same_command_says_it_is_finished(command, tmp_path, capsys):
    run = (*VAE_RUN, "lr_schedule=warmup_cosine", f"runs={tmp_path}")
    assert command("train.py", *run) == 0
    assert command("train.py", *run) == 0
    assert "finished at step 2; raise trainer.max_steps" in capsys.readouterr().out
    # what may change when a run is continued
    assert (
        command(
            "train.py",
            *run,
            "trainer.max_steps=3",
            "logger=tensorboard",
            "num_workers=1",
            "trainer.log_every=2",
        )
        == 0
    )
    assert load_checkpoint(tmp_path / "vae" / "checkpoints" / "last.pt")["step"] == 3
    assert list((tmp_path / "vae" / "tensorboard").iterdir())


def test_random_frozen_parts_can_be_allowed_and_stay_marked_as_untrained(command, tmp_path, refused):
    parts = (*TINY_VAE, *TINY_CLAP, *TINY_VOCODER, "tokenizer=bpe", *SHORT_CLIPS)
    run = (*STAGES["unet"], *parts, *BRIEF, f"runs={tmp_path}", "run=random")
    said = refused("train.py", *run)
    assert "vae is frozen here but has no weights: give vae=file vae.path=" in said
    assert command("train.py", *run, "allow_random_frozen=true") == 0  # nothing was begun, so nothing differs
    system = load(str(tmp_path / "random" / "weights"))
    assert system.vae.provenance is None


def test_a_system_is_trained_on_sound_as_well(runs, command, tmp_path):
    run = (*STAGES["unet"], *BRIEF, *SHORT_CLIPS, *part_paths(runs), "conditioning=mixed", f"runs={tmp_path}")
    assert command("train.py", *run) == 0
    assert list((tmp_path / "latent_diffusion" / "previews").glob("0000002_*.wav"))


LONG_RUN = (*VAE_RUN, "num_workers=2", "trainer.max_steps=1000000", "objective.adversarial_start=10000")


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """`train.py` in a process group of its own that has logged some steps; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "train.py", *arguments], cwd=CHECKOUT, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = folder / "metrics.jsonl"
    try:
        deadline = time.monotonic() + 600
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


def last_row(folder: Path) -> dict:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_terminated_run_exits_with_the_signals_code_and_loses_nothing(tmp_path):
    """As a job scheduler does it: the signal goes to the data workers too."""
    with running(tmp_path / "vae", *LONG_RUN, f"runs={tmp_path}") as process:
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Traceback" not in err and "stopped at step" in out
    last = load_checkpoint(tmp_path / "vae" / "checkpoints" / "last.pt")
    assert last["step"] == last_row(tmp_path / "vae")["step"]


@pytest.mark.slow
def test_a_run_is_refused_while_it_runs_and_continues_as_soon_as_it_is_killed(command, tmp_path, capsys):
    folder, again = tmp_path / "vae", (*LONG_RUN, f"runs={tmp_path}", "trainer.save_every=1")
    with running(folder, *again) as process:
        before = last_row(folder)["step"]
        assert command("train.py", *again) == 2
        assert f"error: {folder}: another process works there" in capsys.readouterr().err
        deadline = time.monotonic() + 600
        while last_row(folder)["step"] <= before:  # the first run did not notice
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
        reached = load_checkpoint(folder / "checkpoints" / "last.pt")["step"]
        assert command("train.py", *again, f"trainer.max_steps={reached + 1}") == 0
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, reached + 2), reached + 1]


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_plain_one(command, tmp_path):
    rows = {}
    for name in ("plain", "compiled"):
        run = (
            *VAE_RUN,
            f"runs={tmp_path}",
            f"run={name}",
            f"trainer.compile={str(name == 'compiled').lower()}",
        )
        assert command("train.py", *run) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [
            {k: v for k, v in json.loads(line).items() if k.startswith(("train/", "val/"))} for line in lines
        ]
    for plain, compiled in zip(rows["plain"], rows["compiled"], strict=True):
        assert compiled == pytest.approx(plain, rel=1e-3, abs=1e-4)
    weights = load(str(tmp_path / "compiled" / "weights" / "vae.safetensors"))
    assert weights.recipe["channels"] == 8


@pytest.mark.slow
def test_tensorboard_and_offline_wandb_hold_metrics_pictures_and_sounds(command, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = (*STAGES["vocoder"], *BRIEF, f"runs={tmp_path}", "run=logged", "logger=[tensorboard,wandb]")
    assert command("train.py", *run) == 0
    folder = tmp_path / "logged"
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    ((step, value),) = [(event.step, event.value) for event in events.Scalars("val/mel")]
    assert step == 2 and value == pytest.approx(last["val/mel"], rel=1e-5)
    assert "mel/0_real" in events.Tags()["images"] and "audio/0_vocoded" in events.Tags()["audio"]

    (offline,) = (folder / "wandb").glob("offline-run-*")
    media = offline / "files" / "media"
    assert list(media.rglob("mel/0_vocoded_*.png")) and list(media.rglob("audio/0_vocoded_*.wav"))
    history = [record.history for record in wandb_records(next(offline.glob("*.wandb")))]
    values = {(item.key or item.nested_key[0]): item.value_json for row in history for item in row.item}
    assert float(values["val/mel"]) == pytest.approx(last["val/mel"], rel=1e-6)


def wandb_records(path: Path) -> list:
    """The records of an offline run: protobufs in blocks of 32 KiB, each piece behind a 7-byte header."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, pieces, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no header fits into the rest of the block
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(Record.FromString(pieces))
            pieces = b""
    return records


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, named",
    [
        ("trainer.max_stepz=3", "Could not override 'trainer.max_stepz'"),
        ("unet=enormous", "Could not override 'unet'"),
        ("experiment=nothing", "Could not find 'experiment/nothing' Available options"),
        ("batch_size", "batch_size"),
    ],
)
def test_what_hydra_does_not_know_is_named(override, named, refused, tmp_path):
    assert named in refused("train.py", *VAE_RUN, f"runs={tmp_path}/runs", override)


def test_an_unknown_option_of_a_command_is_named(refused, tmp_path):
    said = refused("ldm_audio.cli", "encode", "data=nothing", f"out={tmp_path / 'out'}")
    assert "Could not find 'data/nothing' Available options in 'data': audiocaps" in said


@pytest.mark.parametrize(
    "overrides, named",
    [
        (("objective=latent_diffusion",), "no value for clap.path, vae.path, vocoder.path: give clap.path="),
        (("objective=vae", "data=folder"), "no value for data.path"),
        (("objective=vae", "vae=null"), "vae=null: a config group is left out by ~vae"),
        ((*VAE_RUN[:-1], "trainer.precision=fp16"), "trainer.precision=fp16: expected fp32 or bf16"),
        ((*VAE_RUN, "batch_size=0"), "batch_size=0: expected at least 1"),
        ((*VAE_RUN, "batch_size=two"), "batch_size=two: expected a whole number"),
        ((*VAE_RUN, "optimizer.lr=1e-3x"), "optimizer.lr=1e-3x: expected a number"),
        ((*VAE_RUN, "trainer.accumulate=2"), "trainer.accumulate=2: VAEObjective takes only 1"),
        ((*VAE_RUN, "audio.fmax=9000"), "fmax=9000"),
        ((*STAGES["clap"], *BRIEF, "tokenizer.vocab_size=9"), "vocab_size=9: expected 260 or more"),
        ((*STAGES["unet"], "data=latents", "data.path=no/where", *part_paths(Path("x"))), "no/where"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_used_are_named(overrides, named, refused, tmp_path):
    assert named in refused("train.py", *overrides, f"runs={tmp_path}/runs")


def test_a_missing_column_is_named(refused, tmp_path):
    run = recordings(tmp_path / "sounds", "file_name,text\na.wav,a hum\n")
    line = refused("train.py", *run)
    assert "train.csv: no column caption; found file_name,text" in line


def test_an_empty_folder_is_named(refused, tmp_path):
    run = recordings(tmp_path / "sounds")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty: the folder is empty" in refused(
        "train.py", *run, f"data.path={tmp_path}/empty"
    )


def test_an_empty_caption_is_named(refused, tmp_path):
    run = recordings(tmp_path / "sounds", "file_name,caption\na.wav,  \n")
    assert "train.csv: line 2: empty caption of a.wav" in refused("train.py", *run)


@pytest.mark.parametrize("content", [b"this is no sound", b""])
def test_a_text_file_that_is_called_wav_is_named(content, refused, tmp_path):
    run = recordings(tmp_path / "sounds", "file_name,caption\nb.wav,a hum\n")
    (tmp_path / "sounds" / "b.wav").write_bytes(content)
    assert "b.wav: not a readable audio file" in refused("train.py", *run)


def test_a_recording_without_samples_is_named(refused, tmp_path):
    run = recordings(tmp_path / "sounds", "file_name,caption\nb.wav,a hum\n")
    soundfile.write(tmp_path / "sounds" / "b.wav", np.zeros(0), 16000)
    assert "b.wav: empty, 0 samples" in refused("train.py", *run)


@pytest.mark.slow
def test_one_broken_file_in_a_hundred_does_not_stop_a_run_and_is_in_its_report(command, tmp_path):
    sounds = tmp_path / "sounds"
    run = recordings(sounds)
    rng = np.random.default_rng(0)
    names = [f"{i:04d}.wav" for i in range(2000)]
    for name in names:
        soundfile.write(sounds / name, rng.uniform(-0.5, 0.5, 5120), 16000)
    for name in names[100::200]:  # found when the run begins
        (sounds / name).write_bytes(b"no sound")
    for name in names[::200]:  # found when they are read
        soundfile.write(sounds / name, np.full(5120, np.nan), 16000, subtype="FLOAT")
    (sounds / "train.csv").write_text("file_name,caption\n" + "".join(f"{name},noise\n" for name in names))
    settings = ("data.num_samples=5120", "batch_size=100", "trainer.max_steps=20", "num_workers=1")
    assert command("train.py", *run, *settings) == 0
    folder = tmp_path / "runs" / "vae"
    left_out = json.loads((folder / "left_out_train.json").read_text())
    assert [entry["clip"] for entry in left_out] == names[100::200]
    unreadable = json.loads((folder / "unreadable_train.json").read_text())
    assert [Path(entry["reason"].split(": ")[0]).name for entry in unreadable] == names[::200]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[-2]["step"] == 20 and rows[-2]["replaced_clips"] >= 10


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_recording_that_is_not_a_number_is_named_and_replaced(num_workers, command, tmp_path, caplog):
    run = recordings(tmp_path / "sounds", "file_name,caption\na.wav,a hum\nb.wav,a hum\n")
    bad = np.full(SAMPLES, np.nan, dtype=np.float32)
    soundfile.write(tmp_path / "sounds" / "b.wav", bad, 16000, subtype="FLOAT")
    assert command("train.py", *run, f"num_workers={num_workers}") == 0
    assert caplog.text.count("b.wav: holds NaN or infinity; another clip takes its place") == 1


def test_another_config_than_the_runs_is_refused_with_the_keys_that_differ(runs, refused):
    before = (runs / "vae" / "config.yaml").read_bytes()
    line = refused("train.py", *VAE_RUN, f"runs={runs}", "run=vae", "optimizer.lr=0.5", "seed=3")
    assert "optimizer.lr: 0.0001 -> 0.5" in line and "seed: 0 -> 3" in line and "choose run=NAME" in line
    assert (runs / "vae" / "config.yaml").read_bytes() == before


def test_another_front_end_than_the_parts_were_trained_with_is_refused(runs, refused, tmp_path):
    run = (*STAGES["unet"], *BRIEF, *SHORT_CLIPS, *part_paths(runs), "audio.fmin=50", f"runs={tmp_path}")
    encoding = ("encode", *SHORT_CLIPS, *part_paths(runs)[:2], "audio.fmin=50", f"out={tmp_path}/latents")
    for script, arguments in (("train.py", run), ("ldm_audio.cli", encoding)):
        assert "was trained on another audio front end (fmin: 0 -> 50)" in refused(script, *arguments)


def test_latents_of_another_front_end_are_refused_with_both_hashes(runs, command, refused, tmp_path):
    """Of a VAE that does not know its own front end, as one of another library does not."""
    vae = load(str(runs / "vae" / "weights" / "vae.safetensors"))
    save_network(vae, tmp_path / "vae.safetensors", recipe=vae.recipe, provenance={})
    parts = (*part_paths(runs), f"vae.path={tmp_path}/vae.safetensors")
    encoding = ("encode", *SHORT_CLIPS, "batch_size=2", *parts[:2], parts[-1], f"out={tmp_path}/latents")
    assert command("ldm_audio.cli", *encoding, "audio.fmin=50") == 0
    encoders = [
        Latents(path=str(folder / "train"), seed=0, mixup=None).encoders
        for folder in (tmp_path / "latents", runs / "latents")
    ]
    theirs, ours = (made["audio"] for made in encoders)
    assert theirs != ours and encoders[0]["vae"] == encoders[1]["vae"]
    run = (*STAGES["unet"], *BRIEF, *parts, "data=latents", f"data.path={tmp_path}/latents")
    line = refused("train.py", *run, f"runs={tmp_path}")
    assert "made by another audio than this run's" in line and f"(hash {theirs}, here {ours})" in line
    line = refused("ldm_audio.cli", *encoding)
    assert f"made with another audio ({theirs}, now {ours})" in line


def test_latents_encoded_without_clap_train_with_texts_alone(runs, command, refused, tmp_path):
    parts = part_paths(runs)
    encoding = ("encode", *SHORT_CLIPS, "batch_size=2", parts[0], f"out={tmp_path}/latents")
    assert command("ldm_audio.cli", *encoding, "~clap", "~tokenizer") == 0
    run = (*STAGES["unet"], *BRIEF, *parts, "data=latents", f"data.path={tmp_path}/latents")
    line = refused("train.py", *run, "conditioning=mixed", f"runs={tmp_path}/mixed")
    assert "encoded without CLAP" in line and "conditioning=text" in line
    losses = []
    for latents in (tmp_path / "latents", runs / "latents"):
        where = (f"data.path={latents}", f"runs={tmp_path}", f"run={latents.parent.name}")
        assert command("train.py", *run, "conditioning=text", *where) == 0
        rows = (tmp_path / latents.parent.name / "metrics.jsonl").read_text().splitlines()
        losses.append([row["train/diffusion"] for row in map(json.loads, rows) if "train/diffusion" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) == 2


def test_latents_of_other_networks_are_refused(runs, refused, tmp_path):
    vae = load(str(runs / "vae" / "weights" / "vae.safetensors"))
    vae.quant_conv.bias[0] += 1
    save_network(vae, tmp_path / "vae.safetensors", recipe=vae.recipe, provenance=vae.provenance)
    run = (*BRIEF, "data=latents", f"data.path={runs}/latents", f"runs={tmp_path}")
    parts = (*part_paths(runs), f"vae.path={tmp_path}/vae.safetensors")
    line = refused("train.py", *STAGES["unet"], *run, *parts)
    assert "the latents at data.path were made by another vae than this run's (hash " in line
    digest = Latents(path=str(runs / "latents" / "train"), seed=0, mixup=None).encoders["vae"]
    assert f"(hash {digest}, here {state_hash(vae.state_dict())}): encode again" in line
    clap = [setting for setting in STAGES["clap"] if not setting.startswith("data")]
    assert "ContrastiveObjective learns from sound" in refused("train.py", *clap, *run)


def test_a_run_whose_frozen_parts_were_exchanged_is_refused(runs, command, capsys, tmp_path):
    vae = load(str(runs / "vae" / "weights" / "vae.safetensors"))
    own = tmp_path / "vae.safetensors"
    save_network(vae, own, recipe=vae.recipe, provenance=vae.provenance)
    parts = (*part_paths(runs), f"vae.path={own}")
    run = (*STAGES["unet"], *BRIEF, *SHORT_CLIPS, *parts, f"runs={tmp_path}", "run=ldm")
    assert command("train.py", *run) == 0
    vae.quant_conv.bias[0] += 1
    save_network(vae, own, recipe=vae.recipe, provenance=vae.provenance)
    assert command("train.py", *run, "trainer.max_steps=3") == 2
    assert "began with other weights of vae: choose run=NAME" in capsys.readouterr().err


def test_a_part_of_the_wrong_kind_is_refused(runs, refused, tmp_path):
    wrong = f"vae.path={runs}/clap/weights/clap.safetensors"
    run = (*STAGES["unet"], *BRIEF, *SHORT_CLIPS, *part_paths(runs), wrong, f"runs={tmp_path}")
    assert "clap.safetensors" in refused("train.py", *run)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("prompt=rain",), "no value for weights"),
        (("weights={runs}/ldm/weights",), 'give either prompt="..." or prompts=FILE'),
        (
            ("weights={runs}/ldm/weights", "prompt=rain", "prompts=x.txt"),
            'give either prompt="..." or prompts=FILE',
        ),
        (("weights={runs}/ldm/weights", "prompts=no/file.txt"), "prompts=no/file.txt: no such file"),
        (("weights={runs}/ldm/weights", "prompts={tmp}/blank.txt"), "blank.txt: expected one prompt a line"),
        (("weights={runs}/ldm/weights", "prompt=rain", "num_steps=0"), "num_steps=0: expected 1 to 1000"),
        (
            ("weights={runs}/ldm/weights", "prompt=rain", "num_steps=1001"),
            "num_steps=1001: expected 1 to 1000",
        ),
        (("weights={runs}/ldm/weights", "prompt=[]"), "prompt=[]: expected a text, or a list"),
        (("weights={runs}/ldm/weights", "prompt=rain", "precision=fp8"), "precision='fp8'"),
        (("weights={runs}/ldm/weights", "prompt=rain", "device=abacus"), "device=abacus"),
        (
            ("weights={runs}/ldm/weights", "audio_prompt={tmp}/blank.txt"),
            "blank.txt: not a readable audio file",
        ),
        (
            ("weights={runs}/ldm/weights", "edit=style_transfer", "edit.path=x.wav", "edit.strength=1.5"),
            "strength=1.5: expected more than 0 and at most 1",
        ),
        (("weights={runs}/ldm/weights", "edit=inpainting", "edit.path=x.wav"), "no value for edit.mask"),
        (
            ("weights={runs}/ldm/weights", "edit=variation", "edit.path={tmp}/none.wav"),
            "none.wav: no such file",
        ),
        (("weights={runs}/ldm/weights", "prompt=rain", "duration=0"), "duration=0"),
        (("weights={runs}/nowhere", "prompt=rain"), "nowhere"),
        (("weights={runs}/vae", "prompt=rain"), "vae: holds neither system.json"),
        (
            ("weights={runs}/ldm/weights", "prompt=rain", "vocoder.path={runs}/none.safetensors"),
            "none.safetensors",
        ),
        (("weights={runs}/ldm/weights", "prompt=rain", "out={tmp}/full"), "full holds samples already"),
    ],
)
def test_what_cannot_be_sampled_is_named(arguments, named, runs, refused, tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "samples.jsonl").write_text("{}")
    given = [argument.format(runs=runs, tmp=tmp_path) for argument in arguments]
    out = [] if any(argument.startswith("out=") for argument in given) else [f"out={tmp_path}/out"]
    assert named in refused("sample.py", *given, *out)
    assert not (tmp_path / "out").exists()
