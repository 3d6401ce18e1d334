"""Writes sounds for prompts: `python sample.py weights=FOLDER prompt="..." key=value ...`."""

import hydra
from omegaconf import DictConfig

from ldm_audio.config import one_line_errors
from ldm_audio.sampling import sample


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
@one_line_errors
def main(cfg: DictConfig) -> None:
    """Composes, loads the system, samples, writes wav files, pictures, `samples.jsonl` and a page."""
    sample(cfg)


if __name__ == "__main__":
    main()
