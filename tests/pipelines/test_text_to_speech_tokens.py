"""Text and a voice to ranked tokens: the ranking, the endings, batches, and what is refused."""

import math

import pytest
import speech_toys as toys
import torch
from torch.nn import functional as F

from ldm_audio.audio.speech_mel import SpeechMel
from ldm_audio.data.speech_tokenizer import train_speech_bpe
from ldm_audio.errors import InputError
from ldm_audio.layers import PackedLinear
from ldm_audio.pipelines.text_to_speech_tokens import TextToSpeechTokens, fix_speech_tokens
from ldm_audio.pipelines.token_generation import Sampling

MEL = SpeechMel(
    sample_rate=22050, n_fft=1024, hop_length=256, n_mels=80, fmin=0, fmax=8000, reference_samples=6000,
    norms=None,
)  # fmt: skip
FREE = Sampling(temperature=1.0, top_k=None, top_p=1.0, repetition_penalty=1.0)
SETTINGS = {
    "sample_rate": 22050, "num_candidates": 5, "batch_size": 5, "sampling": FREE, "max_tokens": 12, "seed": 0,
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:.*did not stop")


def clip(num_samples: int = 7000, hertz: float = 300.0) -> torch.Tensor:
    return 0.3 * torch.sin(2 * math.pi * hertz * torch.arange(num_samples) / 22050)


def pipeline(ending=None, **changes) -> TextToSpeechTokens:
    parts = {
        "speech_lm": toys.network(toys.SPEECH_LM_RECIPE), "clvp": toys.network(toys.CLVP_RECIPE),
        "tokenizer": train_speech_bpe(["seven eight"], vocab_size=40), "mel": MEL, "ending": ending,
    }  # fmt: skip
    return TextToSpeechTokens(**parts | changes)


@pytest.fixture(scope="module")
def speak() -> TextToSpeechTokens:
    return pipeline()


def test_candidates_come_best_first_with_the_scores_of_clvp(speak):
    made = speak("seven", [clip()], **SETTINGS)
    assert made.text == "seven" and len(made.tokens) == 5 and len(made.latents) == 1
    assert made.scores.tolist() == sorted(made.scores.tolist(), reverse=True)
    text = F.pad(speak.tokenizer(["seven"])[0], (0, 1))
    for tokens, score in zip(made.tokens, made.scores):
        heard = tokens[None] if len(tokens) else torch.zeros(1, 1, dtype=torch.int64)
        assert torch.allclose(speak.clvp.scores(text, heard)[0, 0], score, atol=1e-5)
        assert (tokens < 30).all()
    assert made.latents[0].shape == (len(made.tokens[0]), 64)


def test_latents_are_the_states_that_the_tokens_came_from(speak):
    made = speak("seven", [clip()], **SETTINGS)
    tokens = made.tokens[0]
    given = F.pad(tokens[None, :-1], (1, 0), value=30)
    wrapped = speak.speech_lm.wrap_text(speak.tokenizer(["seven"])[0], num_stops=2)
    expected = speak.speech_lm(speak.embed_voice([clip()], sample_rate=22050), wrapped, given).speech
    assert torch.allclose(speak.speech_lm.speech_head(made.latents[0]), expected[0], atol=1e-5)


def test_a_candidate_depends_on_seed_and_number_alone(speak):
    whole = speak("seven", [clip()], **SETTINGS)
    parts = speak("seven", [clip()], **SETTINGS | {"batch_size": 2})
    assert all(torch.equal(a, b) for a, b in zip(whole.tokens, parts.tokens, strict=True))
    other = speak("seven", [clip()], **SETTINGS | {"seed": 1})
    assert any(not torch.equal(a, b) for a, b in zip(whole.tokens, other.tokens))


def test_several_clips_of_a_voice_are_averaged(speak):
    clips = [clip(), clip(9000, 500.0)]
    each = [speak.embed_voice([c], sample_rate=22050) for c in clips]
    together = speak.embed_voice(clips, sample_rate=22050)
    assert torch.allclose(together, (each[0] + each[1]) / 2, atol=1e-5)
    assert not torch.allclose(each[0], each[1], atol=1e-3)


def test_sequences_end_as_released_ones_do():
    ending, stop = (83, 45, 45, 248), 8193
    row = torch.tensor([1, 2, 3, 4, 5, 6, 7, stop])
    assert fix_speech_tokens(row, 8, stop=stop, ending=ending).tolist() == [1, 2, 3, 4, 5, 45, 45, 248]
    assert fix_speech_tokens(row[3:], 8, stop=stop, ending=ending).tolist() == [4, 5, 6, 7, 83, 45, 45, 248]
    free = torch.tensor([1, 2, 3, 4])
    assert fix_speech_tokens(free, 4, stop=stop, ending=ending).tolist() == [1, 2, 3, 4]
    assert fix_speech_tokens(torch.tensor([stop]), 1, stop=stop, ending=ending).tolist() == [248]


def test_endings_equal_those_of_transformers():
    import transformers

    config = toys.their_config()
    config.decoder_config.decoder_fixing_codes = [9, 4, 4, 7]
    peer = transformers.ClvpModelForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(30, (6, 12), generator=generator)
    for i, place in enumerate((0, 3, 9, 10, 11)):
        rows[i, place:] = 31
    expected = peer.fix_speech_decoder_output(F.pad(rows, (1, 0), value=30))
    ours = [fix_speech_tokens(row, 12, stop=31, ending=(9, 4, 4, 7)) for row in rows]
    assert torch.stack(ours).tolist() == expected.tolist()


def test_padding_before_scoring_reaches_the_length_asked_for():
    speak = pipeline(ending=(9, 4, 4, 7))
    made = speak("seven", [clip()], **SETTINGS, pad_to=20)
    assert {len(tokens) for tokens in made.tokens} == {20}
    assert all(tokens[-3:].tolist() == [4, 4, 7] for tokens in made.tokens)
    assert made.latents[0].shape == (20, 64)


def test_candidates_that_do_not_stop_are_bounded_and_told():
    speak = pipeline()
    speak.speech_lm.speech_head.bias.data[31] = -100.0
    with pytest.warns(UserWarning, match="2 of 2 candidates did not stop within max_tokens=6"):
        made = speak("seven", [clip()], **SETTINGS | {"num_candidates": 2, "max_tokens": 6})
    assert made.stopped == [False, False] and {len(t) for t in made.tokens} == {6}


def test_a_candidate_of_nothing_is_scored_and_has_no_latents():
    speak = pipeline()
    speak.speech_lm.speech_head.bias.data[31] = 100.0
    made = speak("seven", [clip()], **SETTINGS)
    assert {len(t) for t in made.tokens} == {0} and made.scores.isfinite().all()
    assert made.latents[0].shape == (0, 64) and all(made.stopped)


def test_packed_networks_say_the_same():
    plain, packed = pipeline(), pipeline().pack()
    assert any(isinstance(module, PackedLinear) for module in packed.speech_lm.modules())
    one, other = (speak("eight", [clip()], **SETTINGS) for speak in (plain, packed))
    assert all(torch.equal(a, b) for a, b in zip(one.tokens, other.tokens, strict=True))
    assert torch.allclose(one.scores, other.scores, atol=1e-5)
    assert torch.allclose(one.latents[0], other.latents[0], atol=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": ""}, "empty, expected something to say"),
        ({"text": "seven " * 12}, "text of .* tokens: expected at most 21; data.english.split_text"),
        ({"references": []}, "references is empty"),
        ({"references": [torch.zeros(7000)]}, r"references\[0\]: silent, expected a voice"),
        ({"references": [clip(), clip(512)]}, r"references\[1\] \(512,\): expected \(s,\), s >= 513"),
        ({"references": [clip()[None]]}, r"references\[0\] \(1, 7000\)"),
        ({"references": [clip() * math.nan]}, r"references\[0\]: holds NaN"),
        ({"sample_rate": 16000}, "references at 16000 Hz: expected 22050"),
        ({"num_candidates": 0}, "num_candidates=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_latents": 6}, "num_latents=6: expected 0 to num_candidates=5"),
        ({"max_tokens": 33}, "max_tokens=33: expected 1 to 32"),
    ],
)
def test_what_cannot_be_said_is_refused(speak, change, message):
    given = {"text": "seven", "references": [clip()], **SETTINGS, **change}
    with pytest.raises(InputError, match=message):
        speak(given.pop("text"), given.pop("references"), **given)


def test_parts_that_do_not_fit_are_refused():
    small = {**toys.CLVP_RECIPE, "speech_tower": {**toys.TOWER, "vocab_size": 20}}
    with pytest.raises(InputError, match="CLVP knows 20 speech tokens, expected 30"):
        pipeline(clvp=toys.network(small))
    with pytest.raises(InputError, match="mels have 64 bins, the front end's 80"):
        pipeline(speech_lm=toys.network({**toys.SPEECH_LM_RECIPE, "n_mels": 64}))
    for ending in ((1, 2, 3), (1, 2, 3, 30)):
        with pytest.raises(InputError, match="expected four speech tokens, or none"):
            pipeline(ending=ending)
