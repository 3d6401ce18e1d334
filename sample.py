"""Writes sounds for prompts: `python sample.py weights=FOLDER prompt="..." key=value ...`."""

import hydra
from omegaconf import DictConfig

from ldm_audio.config import one_line_errors
from ldm_audio.sampling import sample


@one_line_errors  # what Hydra says of the overrides
@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
@one_line_errors  # what our parts say, before Hydra adds to it
def main(cfg: DictConfig) -> None:
    """Composes, loads the system, samples, writes wav files, pictures, `samples.jsonl` and a page."""
    sample(cfg)


if __name__ == "__main__":
    main()
