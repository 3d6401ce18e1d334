"""What a text-to-speech-tokens system is beside its networks: front end, tokenizer, how its sequences end."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ldm_audio.audio.speech_mel import SpeechMel
from ldm_audio.data.speech_tokenizer import SpeechTokenizer, load_speech_tokenizer
from ldm_audio.errors import InputError
from ldm_audio.pipelines.text_to_speech_tokens import TextToSpeechTokens

PIPELINE = "text_to_speech_tokens"
PARTS = ("speech_lm", "clvp")


def speech_pipeline(
    networks: Mapping[str, nn.Module], system: Mapping[str, Any], tokenizer: SpeechTokenizer
) -> TextToSpeechTokens:
    """The pipeline of a system's networks and settings."""
    return TextToSpeechTokens(
        speech_lm=networks["speech_lm"],
        clvp=networks["clvp"],
        tokenizer=tokenizer,
        mel=SpeechMel(**system["mel"]),
        ending=system["ending"],
    )


def speech_words(
    place: Path | None, path: Path, *, cleaner: str, recipe: Mapping[str, Any]
) -> SpeechTokenizer:
    """The tokenizer at `place`; InputError where there is none, or one with more tokens than the networks.

    recipe: of the `speech_lm` at `path`.
    """
    if place is None:
        raise InputError(f"{path}: holds no vocabulary; give tokenizer=FILE with TorToise's tokenizer.json")
    tokenizer = load_speech_tokenizer(place, cleaner=cleaner)
    if tokenizer.vocab_size > recipe["text_start"]:
        known = recipe["text_start"]
        raise InputError(f"{place}: {tokenizer.vocab_size} tokens, the networks of {path} know {known}")
    return tokenizer
