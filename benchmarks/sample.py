"""Sampling beside diffusers: full-size AudioLDM-S with the same random weights in both.

    python benchmarks/sample.py [--threads 2] [--repeats 3] [--steps 20] [--clock wall|cpu] [--device cpu]
    python benchmarks/sample.py --threads 1 --clock cpu --repeats 1 --processes 1    # on a machine in use

Times are taken in one process, ours and theirs by turns, and compared by medians; peak memory and cold start
in fresh processes by turns. `--clock cpu` counts the seconds of all threads that the processor gave, for a
machine that others use. Ours goes the way of the command `sample.py`: prompts are embedded first, then the
text tower is let go. The last line is one JSON object; a ratio is ours over theirs. About 8 minutes on two
free cores.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

DURATION = 10.24
PROMPT = "a hammer hits a wooden surface twice, then a door closes"
GUIDANCE = 2.5
CAPTIONS = ("a hammer hits a wooden surface", "a door closes", "rain on a tin roof", "a slow piano melody")


def make_systems(folder: Path) -> None:
    """`theirs`, an AudioLDM-S of diffusers with random weights, and `ours`, the same converted."""
    import diffusers
    import torch
    import transformers

    from ldm_audio import exchange
    from ldm_audio.data.tokenizers import train_bpe

    torch.manual_seed(0)
    words = train_bpe(CAPTIONS, vocab_size=400, max_length=512)
    text = transformers.ClapTextConfig(layer_norm_eps=1e-5)
    unet = diffusers.UNet2DConditionModel(
        sample_size=256, in_channels=8, out_channels=8, block_out_channels=(128, 256, 384, 640),
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
        cross_attention_dim=(128, 256, 384, 640), class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=512, class_embeddings_concat=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=8, block_out_channels=(128, 256, 512),
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=2, scaling_factor=0.92, sample_size=512,
    )  # fmt: skip
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=64, sampling_rate=16000, upsample_initial_channel=1024, upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4], normalize_before=False, initializer_range=0.02,
    )  # fmt: skip
    pipeline = diffusers.AudioLDMPipeline(
        unet=unet,
        vae=vae,
        vocoder=transformers.SpeechT5HifiGan(vocoder),
        text_encoder=transformers.ClapTextModelWithProjection(text),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words.backend, pad_token="<pad>", model_max_length=512
        ),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
    )  # fmt: skip
    pipeline.save_pretrained(folder / "theirs")
    words.save(folder / "tokenizer.json")
    exchange.convert(folder / "theirs", folder / "ours", tokenizer=str(folder / "tokenizer.json"))


def load_theirs(folder: Path, device: str):
    """diffusers' pipeline, silent."""
    import diffusers

    pipeline = diffusers.AudioLDMPipeline.from_pretrained(folder / "theirs").to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_ours(folder: Path, device: str, precision: str = "fp32"):
    """Our pipeline, as `sample.py` prepares it but for the text tower, which is timed."""
    from ldm_audio.pretrained import load_system

    return load_system(folder / "ours", device=device).set_precision(precision).pack()


def sample_ours_as_command(folder: Path, device: str, *, steps: int, duration: float) -> None:
    """What `sample.py` does with one prompt, hashes and files left out."""
    from ldm_audio.pipelines.requests import Request, packing_pays
    from ldm_audio.pretrained import load_system

    request = Request(
        prompt=PROMPT, negative_prompt="", audio_prompt=None, seed=0, duration=duration, num_steps=steps,
        guidance_scale=GUIDANCE, num_waveforms_per_prompt=1,
    )  # fmt: skip
    system = load_system(folder / "ours", device=device)
    embeds = {"prompt_embeds": system.embed([PROMPT], 1), "negative_embeds": system.embed([""], 1)}
    system.forget_text()
    if packing_pays([request]):
        system.pack()
    sample_ours(system, None, steps=steps, duration=duration, **embeds)


def sample_theirs(pipeline, *, steps: int, duration: float = DURATION):
    """(1, s) waveform."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return pipeline(
        PROMPT, num_inference_steps=steps, guidance_scale=GUIDANCE, audio_length_in_s=duration,
        generator=generator, output_type="pt",
    ).audios  # fmt: skip


def sample_ours(pipeline, prompts: list[str] | None, *, steps: int, duration: float = DURATION, **settings):
    """What our pipeline generates."""
    from ldm_audio.diffusion.samplers import ddim

    return pipeline(
        prompts, num_steps=steps, guidance_scale=GUIDANCE, duration=duration, seed=0, batch_size=1,
        sampler=partial(ddim, eta=0.0), spacing="leading", **settings,
    )  # fmt: skip


def child(kind: str, who: str, folder: Path, device: str) -> dict[str, float]:
    """In a process of its own: the processor's seconds until there is a sound, the peak of memory in MB."""
    # Seconds, steps: enough of both that weights are packed but for the cold start, as for many steps.
    duration, steps = {"cold": (2.56, 1), "memory": (DURATION, 4), "long": (60.0, 1)}[kind]
    if who == "ours":
        sample_ours_as_command(folder, device, steps=steps, duration=duration)
    else:
        sample_theirs(load_theirs(folder, device), steps=steps, duration=duration)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss / 1024,
    }


def spawn(kind: str, who: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Runs `child`; its wall clock: from the interpreter's start until there is a sound, not to its end."""
    command = [sys.executable, __file__, "--child", kind, who, str(folder), "--device", arguments.device]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    told = process.stdout.readline()
    wall = time.perf_counter() - started
    if process.wait():
        sys.exit(process.returncode)
    return json.loads(told) | {"wall": wall}


def by_turns(
    tasks: dict[str, Callable[[], object]], repeats: int, now: Callable[[], float], warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each task, after `warm_up` calls that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in range(warm_up + repeats):
        for name, task in tasks.items():
            started = now()
            task()
            if repeat >= warm_up:
                seconds[name].append(now() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def tasks_of(theirs, ours) -> dict[str, dict[str, Callable[[], object]]]:
    """The parts, each on the same input in both."""
    import torch

    device = ours.device
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 8, 256, 16, generator=generator).to(device)
    embed = torch.randn(2, 512, generator=generator).to(device)
    t = torch.tensor([500, 500], device=device)
    mel = torch.randn(1, 1024, 64, generator=generator).to(device)

    from ldm_audio.pipelines.decoding import decode_mel, vocode

    return {
        "unet_step_fp32": {
            "theirs": lambda: theirs.unet(z, 500, encoder_hidden_states=None, class_labels=embed),
            "ours": lambda: ours.unet(z, t, embed),
        },
        "vae_decode": {
            "theirs": lambda: theirs.vae.decode(z[:1]),
            "ours": lambda: decode_mel(ours.vae, z[:1], None),
        },
        "vocoder": {"theirs": lambda: theirs.vocoder(mel), "ours": lambda: vocode(ours.vocoder, mel.mT)},
        "text_encode": {
            "theirs": lambda: theirs._encode_prompt(PROMPT, device, 1, True),
            "ours": lambda: (ours.embed([PROMPT], 1), ours.embed([""], 1)),
        },
    }


class Ratios(dict):
    """What is measured, told as it comes."""

    def note(self, name: str, medians: dict[str, float], ours: str = "ours") -> None:
        """Ours over theirs."""
        self[name] = round(medians[ours] / medians["theirs"], 3)
        print(f"{name:22s} ours {medians[ours]:9.3f}  theirs {medians['theirs']:9.3f}  ratio {self[name]}")
        sys.stdout.flush()


def measure_times(arguments: argparse.Namespace, folder: Path, ratios: Ratios) -> float:
    """All ratios of one process; returns how far the mel of bf16 is from that of fp32, relative."""
    import torch

    torch.set_num_threads(arguments.threads)
    is_cpu = arguments.device == "cpu"
    clock = time.process_time if arguments.clock == "cpu" and is_cpu else time.perf_counter

    def now() -> float:
        if not is_cpu:
            torch.cuda.synchronize()
        return clock()

    with torch.no_grad():
        theirs, ours = load_theirs(folder, arguments.device), load_ours(folder, arguments.device)
        for name, tasks in tasks_of(theirs, ours).items():
            ratios.note(name, by_turns(tasks, arguments.repeats, now))
        best, mels = load_ours(folder, arguments.device, "bf16"), {}
        sample_ours(best, [PROMPT], steps=1)  # the parts of the others are warm

        def generate(name: str, system) -> None:
            mels[name] = sample_ours(system, [PROMPT], steps=arguments.steps).mels

        whole = {
            "theirs": lambda: sample_theirs(theirs, steps=arguments.steps),
            "ours": lambda: generate("ours", ours),
            "best": lambda: generate("best", best),
        }
        medians = by_turns(whole, arguments.repeats, now, warm_up=0)
    error = ((mels["best"] - mels["ours"]).norm() / mels["ours"].norm()).item()
    print(f"mel of bf16 from fp32 after {arguments.steps} steps: {error:.4f} relative", flush=True)
    ratios.note("text_to_waveform_fp32", medians)
    ratios.note("text_to_waveform_best", medians, ours="best" if error <= 2e-2 else "ours")
    return error


def measure_processes(arguments: argparse.Namespace, folder: Path, ratios: Ratios) -> float:
    """Memory and cold start; returns our peak of memory for 60 s of sound over that for 10.24 s."""
    kinds = [(kind, who) for kind in ("memory", "cold") for who in ("ours", "theirs")] + [("long", "ours")]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.processes):
        for kind in kinds:
            runs[kind].append(spawn(*kind, folder, arguments))

    def medians(kind: str, name: str) -> dict[str, float]:
        return {
            who: statistics.median(run[name] for run in values)
            for (what, who), values in runs.items()
            if what == kind
        }

    ratios.note("peak_memory", medians("memory", "memory"))
    ratios.note("cold_start", medians("cold", arguments.clock))
    growth = medians("long", "memory")["ours"] / medians("memory", "memory")["ours"]
    print(f"60 s of sound over 10.24 s, ours, peak memory: {growth:.3f}", flush=True)
    return growth


def main() -> None:
    """Measures, or is one of the measured processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=3, help="fresh processes of each kind")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="keep the two systems here, or find them here")
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        warnings.filterwarnings("ignore")
        kind, who, folder = arguments.child
        print(json.dumps(child(kind, who, Path(folder), arguments.device)), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "ours" / "system.json").exists():
            make_systems(folder)
        warnings.filterwarnings("ignore")
        ratios = Ratios()
        growth = measure_processes(arguments, folder, ratios)
        error = measure_times(arguments, folder, ratios)
    print(
        json.dumps(
            {
                "ratios": ratios,
                "device": arguments.device,
                "threads": arguments.threads,
                "clock": arguments.clock,
                "steps": arguments.steps,
                "mel_error_bf16": round(error, 4),
                "memory_60s_over_10s": round(growth, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
