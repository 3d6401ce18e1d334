"""Train, sample, evaluate and load CLAP, AudioLDM, MusicLDM and CLVP."""


def load(path: str, *, device: str = "cpu"):
    """A pipeline for a system's folder, a frozen network in eval mode for a weights file (see `pretrained`)."""
    from ldm_audio import pretrained

    return pretrained.load(path, device=device)
