"""The console command `ldm-audio`."""

import argparse
import sys
from pathlib import Path

from ldm_audio.config import one_line_errors
from ldm_audio.errors import InputError


@one_line_errors
def main() -> None:
    """Parses the command line and runs one command."""
    parser = argparse.ArgumentParser(prog="ldm-audio", description="Train, sample and convert audio models.")
    commands = parser.add_subparsers(dest="command", required=True)

    quick = commands.add_parser(
        "quickstart", help="train every stage on synthetic sounds and sample 48 prompts"
    )
    quick.add_argument(
        "--folder", default="runs/quickstart", help="where everything goes (default: %(default)s)"
    )
    quick.add_argument("--seed", type=int, default=0)
    quick.add_argument(
        "overrides", nargs="*", help="key=value for every train.py call, such as trainer.max_steps=2"
    )

    enc = commands.add_parser("encode", help="write VAE latents and CLAP embeddings of a data set once")
    enc.add_argument("overrides", nargs="*", help="key=value: data=, vae.path=, clap.path=, out=")

    pairs = commands.add_parser(
        "retrieve", help="how well a CLAP finds the text of a sound and the sound of a text"
    )
    pairs.add_argument("overrides", nargs="*", help="key=value: data=, data.path=, clap.path=, split=, out=")

    beats = commands.add_parser("beats", help="find the beats, downbeats and tempo of every recording")
    beats.add_argument("folder", help="with audio files, in subfolders too")
    beats.add_argument("--tracker", choices=("librosa", "beat_this", "files"), default="librosa")
    beats.add_argument("--weights", help="local checkpoint of beat_this")
    beats.add_argument("--files", help="folder of .beats or *_beat_pred.npy of another program")
    beats.add_argument("--table", help="where to write (default: FOLDER/beats.jsonl)")
    beats.add_argument("--workers", type=int, default=0, help="processes (default: %(default)s, in this one)")

    report = commands.add_parser("report", help="one table and picture of runs over arms and seeds")
    report.add_argument("runs", help="folder of the runs, named such as ARM/seed0")
    report.add_argument("--out", help="where report.md, .csv and .png go (default: RUNS)")

    curves = commands.add_parser("curves", help="draw the metrics of runs over their steps")
    curves.add_argument("runs", nargs="+", help="folders with metrics.jsonl; each gets a curves.png")

    convert = commands.add_parser("convert", help="write published weights as ours")
    convert.add_argument("source", help="folder, file or hf://owner/name[@revision][/file]")
    convert.add_argument("out", help="folder, or FILE.safetensors for one network")
    convert.add_argument(
        "options", nargs="*", help="tokenizer=PATH, heads=config|original, licence=TEXT; raw instead of ema"
    )

    look = commands.add_parser("inspect", help="what is in a file or folder, and how it would be taken")
    look.add_argument("source")
    look.add_argument("options", nargs="*", help="heads=original, raw instead of ema, rules for every rule")

    export = commands.add_parser("export", help="write ours as a folder of diffusers or transformers")
    export.add_argument("source", help="a system's folder, or one network's file")
    export.add_argument("out", help="a new folder")
    export.add_argument("--to", choices=("diffusers", "transformers"), required=True)

    args = parser.parse_args()
    if args.command == "quickstart":
        from ldm_audio.quickstart import quickstart

        quickstart(args.folder, seed=args.seed, overrides=args.overrides)
    if args.command == "encode":
        from ldm_audio.config import encode_data

        encode_data(args.overrides)
    if args.command == "retrieve":
        from ldm_audio.config import retrieve

        retrieve(args.overrides)
    if args.command == "beats":
        find_beats(args)
    if args.command == "report":
        from ldm_audio.evaluation.report import write_report

        print(write_report(args.runs, args.out or args.runs), end="")
    if args.command == "curves":
        from ldm_audio.evaluation.curves import draw_curves

        print(*map(draw_curves, args.runs), sep="\n")
    if args.command in ("convert", "inspect", "export"):
        weights(args)


def find_beats(args: argparse.Namespace) -> None:
    """The command about beats: tracks what the table lacks and says what failed."""
    from tqdm import tqdm

    from ldm_audio.audio.beats import BeatFiles, BeatThisTracker, LibrosaTracker
    from ldm_audio.data.beat_table import TABLE, audio_names, track_folder

    if (args.tracker == "beat_this") != (args.weights is not None):
        raise InputError("--tracker beat_this and --weights FILE go together")
    if (args.tracker == "files") != (args.files is not None):
        raise InputError("--tracker files and --files FOLDER go together")
    if args.tracker == "librosa":
        tracker = LibrosaTracker()
    elif args.tracker == "beat_this":
        tracker = BeatThisTracker(weights=args.weights)
    else:
        tracker = BeatFiles(folder=args.files, root=args.folder)
    table = args.table or f"{args.folder}/{TABLE}"
    total = len(audio_names(Path(args.folder)))
    with tqdm(total=total, desc="beats", unit="file", dynamic_ncols=True) as bar:
        outcome = track_folder(
            args.folder, tracker=tracker, table=table, num_workers=args.workers, progress=bar.update
        )
    for name, reason in sorted(outcome.failed.items()):
        print(f"skipped {name}: {reason}", file=sys.stderr)
    kept = outcome.total - len(outcome.failed)
    print(f"{table}: {kept} recordings, {outcome.tracked} of them new, {len(outcome.failed)} failed")


def weights(args: argparse.Namespace) -> None:
    """The commands about weights files."""
    from ldm_audio import exchange

    if args.command == "export":
        exchange.export(args.source, args.out, to=args.to)
    if args.command == "inspect":
        options = read_options(args.options, keys=("heads",), words=("ema", "raw", "rules"))
        print(*exchange.inspect(args.source, **options), sep="\n")
    if args.command == "convert":
        options = read_options(args.options, keys=("tokenizer", "heads", "licence"), words=("ema", "raw"))
        source = exchange.convert(args.source, args.out, **options)
        print(f"{args.source}: {source.kind}", *source.notes, sep="\n  ")
        print(f"written to {args.out}")


def read_options(given: list[str], *, keys: tuple[str, ...], words: tuple[str, ...]) -> dict[str, str | bool]:
    """`key=value` pairs and bare words as keyword arguments; InputError for one that is not known."""
    options: dict[str, str | bool] = {}
    for option in given:
        key, equals, value = option.partition("=")
        if key not in (keys if equals else words):
            known = [*(f"{key}=" for key in keys), *words]
            raise InputError(f"{option}: not an option, expected {', '.join(known)}")
        options[key] = value if equals else True
    if options.pop("raw", False):
        if options.pop("ema", False):
            raise InputError("either ema or raw, not both")
        options["ema"] = False
    return options


if __name__ == "__main__":
    sys.exit(main())
