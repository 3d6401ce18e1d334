"""The quickstart: its prompts, and the whole of it with two steps a stage."""

import json

import pytest

from ldm_audio.data.synthetic import split_combinations
from ldm_audio.quickstart import NUM_PROMPTS, SAMPLE_SEEDS, choose_prompts, quickstart


def test_half_of_the_prompts_are_combinations_absent_from_training():
    prompts = choose_prompts(0)
    trained = split_combinations("train")
    assert len(prompts) == NUM_PROMPTS
    assert sum(prompt.trained for prompt in prompts) == NUM_PROMPTS // 2
    assert all((prompt.attributes in trained) == prompt.trained for prompt in prompts)


def test_prompts_depend_on_the_seed_alone():
    assert choose_prompts(0) == choose_prompts(0) != choose_prompts(1)


@pytest.mark.slow
def test_every_stage_leaves_what_readme_promises(tmp_path):
    run = tmp_path / "quick"
    summary = quickstart(str(run), seed=0, overrides=["trainer.max_steps=2"])
    assert json.loads((run / "summary.json").read_text()) == summary
    for name in ("chance", "shuffled", "attributes_right", "ceiling"):
        assert 0 <= summary[name] <= 1
    assert set(summary["seconds"]) >= {"clap", "vae", "vocoder", "encode", "ldm", "evaluate"}
    for name in ("index.html", "mels.png", "results.md", "table.md", "metrics.jsonl"):
        assert (run / name).stat().st_size > 0
    for seed in SAMPLE_SEEDS:
        assert len(list((run / "samples" / f"seed{seed}").glob("*.wav"))) == NUM_PROMPTS
    assert len((run / "table.md").read_text().splitlines()) == NUM_PROMPTS + 2
