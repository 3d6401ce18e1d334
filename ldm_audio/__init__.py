"""Train, sample, evaluate and load CLAP, AudioLDM, MusicLDM and CLVP."""


def load(path, *, device="cpu", tokenizer=None, ema=True, heads="config"):
    """A pipeline for a system, a network for a weights file, our own or published (see `pretrained.load`)."""
    from ldm_audio import pretrained

    return pretrained.load(path, device=device, tokenizer=tokenizer, ema=ema, heads=heads)
