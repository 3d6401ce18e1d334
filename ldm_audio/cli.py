"""The console command `ldm-audio`."""

import argparse
import sys

from ldm_audio.config import one_line_errors


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

    args = parser.parse_args()
    if args.command == "quickstart":
        from ldm_audio.quickstart import quickstart

        quickstart(args.folder, seed=args.seed, overrides=args.overrides)
    if args.command == "encode":
        from ldm_audio.config import encode_data

        encode_data(args.overrides)


if __name__ == "__main__":
    sys.exit(main())
