"""Published weights on the command line: inspect, convert, export, sample.py and train.py init=."""

import json
import warnings

import foreign
import pytest
import torch

from ldm_audio import pretrained
from ldm_audio.convert import laion
from ldm_audio.convert.rules import invert_rules
from ldm_audio.training.checkpoint import load_checkpoint


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A toy `audioldm-*.ckpt`, with a tokenizer beside it in `words/`."""
    foreign.allow_toy_vocoder(monkeypatch)
    foreign.save_tokenizer(tmp_path / "words")
    path = tmp_path / "audioldm-toy.ckpt"
    torch.save({"state_dict": foreign.checkpoint_state(foreign.networks())}, path)
    return path


def test_convert_inspect_and_export_follow_each_other(checkpoint, tmp_path, command, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    words = f"tokenizer={tmp_path / 'words'}"
    assert command("ldm_audio.cli", "convert", checkpoint, ours, words, "licence=CC-BY-NC-4.0") == 0
    said = capsys.readouterr().out
    assert "original AudioLDM checkpoint" in said and "the UNet's averaged weights" in said
    assert json.loads((ours / "system.json").read_text())["licence"] == "CC-BY-NC-4.0"

    assert command("ldm_audio.cli", "inspect", ours) == 0
    assert "licence: CC-BY-NC-4.0" in capsys.readouterr().out

    assert command("ldm_audio.cli", "export", ours, theirs, "--to", "diffusers") == 0
    assert command("ldm_audio.cli", "inspect", theirs) == 0
    said = capsys.readouterr().out
    assert "kind: diffusers AudioLDMPipeline" in said and said.count("every tensor fits") == 4


def test_inspect_says_what_is_in_a_checkpoint_and_which_rules_match(checkpoint, command, capsys):
    assert command("ldm_audio.cli", "inspect", checkpoint, "raw", "rules") == 0
    said = capsys.readouterr().out
    for line in (
        "taken: the UNet's raw weights",
        "taken: heads [1, 2], the original's for 32 channels",
        f"latent_scale: {foreign.LATENT_SCALE}",
        "unet: 210 tensors, 1,058,276 numbers, float32",
        "becomes ldm_audio.models.unet.UNet: 210 tensors",
        "rules: 85 of 88 match",
        "2 x input_blocks.0.0.{kind:weight|bias} -> conv_in.{kind:weight|bias}",
        "dropped: 6 tensors",
    ):
        assert line in said, line


def test_inspect_shows_the_names_of_what_it_does_not_know(tmp_path, command, capsys):
    torch.save({"a.b.c": torch.zeros(2, 3), "a.b.d": torch.zeros(1)}, tmp_path / "odd.pt")
    assert command("ldm_audio.cli", "inspect", tmp_path / "odd.pt") == 0
    said = capsys.readouterr().out
    assert "a.b: 2, such as a.b.c [2, 3]" in said and "cannot be loaded: " in said


def test_inspect_says_what_does_not_fit(checkpoint, command, capsys):
    content = torch.load(checkpoint, weights_only=True)
    del content["state_dict"]["first_stage_model.decoder.conv_in.bias"]
    torch.save(content, checkpoint)
    assert command("ldm_audio.cli", "inspect", checkpoint) == 0
    assert "does not fit: " in (said := capsys.readouterr().out) and "decoder.conv_in.bias" in said


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("convert", "nothing.ckpt", "out"), "nothing.ckpt: no such file or folder"),
        (
            ("convert", "nothing.ckpt", "out", "tokeniser=x"),
            "tokeniser=x: not an option, expected tokenizer=",
        ),
        (("convert", "nothing.ckpt", "out", "raw", "ema"), "either ema or raw, not both"),
        (("inspect", "nothing.ckpt", "heads=7"), "heads=7: expected config or original"),
        (("export", "nothing", "out", "--to", "diffusers"), "nothing: is not ours; convert it first"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(command, capsys, tmp_path, monkeypatch, arguments, told):
    monkeypatch.chdir(tmp_path)
    assert command("ldm_audio.cli", *arguments) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1


def test_sample_takes_a_checkpoint_itself(checkpoint, tmp_path, command):
    settings = ["prompt=a dog barks", "duration=0.25", "num_steps=2", f"out={tmp_path / 'sounds'}"]
    weights = [f"weights={checkpoint}", f"tokenizer.path={tmp_path / 'words'}"]
    assert command("sample.py", *weights, *settings) == 0
    assert list((tmp_path / "sounds").glob("*.wav"))


TOY_UNET = [
    f"unet.{key}={value}" for key, value in foreign.UNET.items() if key not in ("_target_", "context_dim")
]
BRIEF = (
    "batch_size=2", "num_workers=0", "val_items=2", "trainer.log_every=1", "trainer.prepare_batches=1",
    "data=synthetic", "data.num_samples=10240", "data.train.size=6", "data.val.size=2",
)  # fmt: skip


def without_spaces(overrides: list[str]) -> list[str]:
    return [override.replace(" ", "") for override in overrides]


def test_training_begins_with_a_checkpoints_networks_average_and_scale(checkpoint, tmp_path, command, capsys):
    parts = [f"{part}.path={checkpoint}" for part in ("vae", "clap", "vocoder")]
    settings = (
        "objective=latent_diffusion", *without_spaces(TOY_UNET), *parts, *BRIEF,
        f"tokenizer.path={tmp_path / 'words'}", "conditioning=text", "audio.n_mels=16", f"runs={tmp_path}",
        "optimizer.lr=0",
    )  # fmt: skip
    assert command("train.py", *settings, f"init={checkpoint}", "run=fine", "trainer.max_steps=1") == 0
    state = load_checkpoint(tmp_path / "fine" / "checkpoints" / "last.pt")
    assert state["objective"]["latent_scale"] == foreign.LATENT_SCALE
    for name, tensor in foreign.networks()["unet"].state_dict().items():
        assert torch.equal(state["objective"][f"unet.{name}"], tensor)
        assert torch.allclose(state["ema"][f"unet.{name}"], tensor, atol=1e-6)
    system = pretrained.load_system(tmp_path / "fine" / "weights")
    assert system.latent_scale == foreign.LATENT_SCALE

    own = tmp_path / "fine" / "weights"
    assert command("train.py", *settings, f"init={own}", "run=again", "trainer.max_steps=1") == 0
    state = load_checkpoint(tmp_path / "again" / "checkpoints" / "last.pt")
    assert state["objective"]["latent_scale"] == foreign.LATENT_SCALE

    capsys.readouterr()
    other = [*settings, f"init={checkpoint}", "run=other", "unet.num_heads=[1,4]"]
    assert command("train.py", *other) == 2
    assert "its unet is another network (num_heads: [1, 2] -> [1, 4])" in capsys.readouterr().err
    assert command("train.py", *settings, f"init={tmp_path / 'fine/weights/vae.safetensors'}", "run=no") == 2
    assert "vae.safetensors: holds no weights of unet" in capsys.readouterr().err


def test_clap_begins_with_towers_that_were_trained_apart(tmp_path, command):
    import transformers

    tower = foreign.networks()["clap"].audio_tower
    state = invert_rules(laion.htsat_rules(), tower.state_dict())
    torch.save({"state_dict": foreign.with_prefix(state, "sed_model.")}, tmp_path / "HTSAT.ckpt")
    roberta = transformers.RobertaModel(
        transformers.RobertaConfig(
            vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=48,
            max_position_embeddings=80, layer_norm_eps=1e-5, type_vocab_size=1,
        )
    )  # fmt: skip
    foreign.randomise(roberta).save_pretrained(tmp_path / "roberta")
    foreign.save_tokenizer(tmp_path / "roberta")
    towers = [
        f"clap.{tower}.{key}={value}"
        for tower in ("audio_tower", "text_tower")
        for key, value in foreign.CLAP[tower].items()
        if key not in ("_target_", "fusion")
    ]
    settings = (
        "objective=contrastive", "clap=htsat_tiny", "clap.joint_dim=24", *without_spaces(towers),
        "tokenizer=file", f"tokenizer.path={tmp_path / 'roberta'}", *BRIEF, f"runs={tmp_path}", "run=clap",
        "optimizer.lr=0", "trainer.max_steps=1", f"init=[{tmp_path / 'HTSAT.ckpt'},{tmp_path / 'roberta'}]",
    )  # fmt: skip
    assert command("train.py", *settings) == 0
    network = pretrained.load_network(tmp_path / "clap" / "weights" / "clap.safetensors")
    for key, parameter in tower.named_parameters():
        assert torch.allclose(network.audio_tower.get_parameter(key), parameter, atol=1e-6), key
    tokens, mask = foreign.tokenizer()(foreign.CAPTIONS)
    with torch.no_grad(), warnings.catch_warnings():
        expected = roberta.eval()(tokens, mask).pooler_output
        assert (network.text_tower(tokens, mask)[1] - expected).abs().max() < 1e-5


def test_a_vocoder_begins_with_plain_weights_split_into_norm_and_direction(tmp_path, command):
    vocoder = foreign.networks()["vocoder"]
    torch.save({"generator": vocoder.state_dict()}, tmp_path / "g_1")
    (tmp_path / "config.json").write_text(json.dumps(foreign.VOCODER_JSON))
    toy = [f"vocoder.{key}={value}" for key, value in foreign.VOCODER.items() if key != "_target_"]
    settings = (
        "objective=vocoder", "vocoder=hifigan_16k", *without_spaces(toy), "audio.n_mels=16",
        "discriminator=wave_small", "discriminator.periods=[2]", "discriminator.period_channels=[2,4]",
        "discriminator.scale_channels=[]", "objective.segment_samples=3200", "optimizer=adam_gan",
        "optimizer.lr=0", *BRIEF, f"runs={tmp_path}", "run=vocoder", "trainer.max_steps=1",
        f"init={tmp_path / 'g_1'}",
    )  # fmt: skip
    assert command("train.py", *settings) == 0
    trained = pretrained.load_network(tmp_path / "vocoder" / "weights" / "vocoder.safetensors").state_dict()
    assert all(
        torch.allclose(trained[name], tensor, atol=1e-6) for name, tensor in vocoder.state_dict().items()
    )
