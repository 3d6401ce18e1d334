"""Writes sounds for prompts: `python sample.py weights=FOLDER prompt="..." key=value ...`."""

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from ldm_audio import config
from ldm_audio.pipelines import gallery
from ldm_audio.pretrained import load_system


@hydra.main(version_base="1.3", config_path="configs", config_name="sample")
@config.one_line_errors
def main(cfg: DictConfig) -> None:
    """Composes, loads the system, samples, writes wav files, pictures, `samples.jsonl` and a page."""
    config.require(cfg)
    prompts = config.read_prompts(cfg)
    folder = config.open_samples(cfg)
    system = load_system(
        cfg.weights,
        vocoder=cfg.vocoder.path,
        tokenizer=cfg.tokenizer.path,
        ema=cfg.ema,
        heads=cfg.heads,
        device=cfg.device,
    )
    generated = system(
        prompts,
        negative_prompts=cfg.negative_prompt and [cfg.negative_prompt] * len(prompts),
        duration=cfg.duration,
        num_steps=cfg.num_steps,
        guidance_scale=cfg.guidance_scale,
        sampler=instantiate(cfg.sampler),
        spacing=cfg.spacing,
        seed=cfg.seed,
        num_waveforms_per_prompt=cfg.num_waveforms_per_prompt,
        batch_size=cfg.batch_size,
    )
    gallery.write_samples(folder, generated, mel=system.mel, settings=config.plain(cfg))


if __name__ == "__main__":
    main()
