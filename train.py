"""Trains one stage: `python train.py experiment=NAME key=value ...`; the same command again continues it."""

from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from ldm_audio import config


@config.one_line_errors  # what Hydra says of the overrides
@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@config.one_line_errors  # what our parts say, before Hydra adds to it
def main(cfg: DictConfig) -> float:
    """Composes, builds, fits; returns the best value of the monitored metric."""
    with config.opened_run(cfg) as device:
        train_data, val_data = instantiate(cfg.data.train), instantiate(cfg.data.val)
        objective = config.build_objective(cfg, train_data.captions())
        config.check_latents(objective, [train_data, val_data], cfg)
        config.check_frozen(objective, Path(cfg.folder))
        trainer = config.build_trainer(cfg, device)
        return trainer.fit(objective, config.train_loader(cfg, train_data), config.val_loader(cfg, val_data))


if __name__ == "__main__":
    main()
