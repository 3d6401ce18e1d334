from functools import partial

import numpy as np
import pytest
import torch
import toys

from ldm_audio.diffusion.samplers import ddim
from ldm_audio.errors import InputError
from ldm_audio.pipelines import samples
from ldm_audio.pipelines.requests import (
    Request,
    between,
    conditions,
    in_batches,
    read_embeds,
    read_requests,
    sample_requests,
    text_embeds,
)
from ldm_audio.pipelines.samples import SampleFolder

DEFAULT = Request(
    prompt="",
    negative_prompt="hiss",
    audio_prompt=None,
    seed=3,
    duration=0.2,
    num_steps=2,
    guidance_scale=2.5,
    num_waveforms_per_prompt=1,
)


def csv_of(tmp_path, text):
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    return tmp_path / "list.csv"


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    (tmp_path / "list.txt").write_text("\ufeffrain, heavy\n\n  a dog \n", encoding="utf-8")
    requests = read_requests(tmp_path / "list.txt", DEFAULT)
    assert [request.prompt for request in requests] == ["rain, heavy", "a dog"]
    assert {request.seed for request in requests} == {3}


def test_a_table_sets_what_it_has_and_leaves_the_rest(tmp_path):
    path = csv_of(tmp_path, 'prompt,seed,duration,guidance_scale\n"rain, heavy",7,1.5,\na dog,,,4\n')
    rain, dog = read_requests(path, DEFAULT)
    assert (rain.prompt, rain.seed, rain.duration, rain.guidance_scale) == ("rain, heavy", 7, 1.5, 2.5)
    assert (dog.prompt, dog.seed, dog.duration, dog.guidance_scale) == ("a dog", 3, 0.2, 4.0)
    assert rain.negative_prompt == dog.negative_prompt == "hiss"


@pytest.mark.parametrize(
    "text, message",
    [
        ("prompt,volume\na,1\n", "column 'volume', expected some of prompt, negative_prompt"),
        ("prompt,seed\na,1\nb,x\n", r"list\.csv:3: seed='x', expected a number"),
        ("prompt,seed\na, b,1\n", r"list\.csv:2: more or fewer cells"),
        ("seed\n1\n", "neither prompt nor audio_prompt"),
        ("prompt\n", "expected one prompt a line, found none"),
        ("", "found none"),
    ],
)
def test_tables_that_cannot_be_read_are_named(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read_requests(csv_of(tmp_path, text), DEFAULT)


def test_batches_hold_requests_of_equal_settings_in_order():
    requests = [
        DEFAULT,
        Request(**vars(DEFAULT) | {"seed": 9}),
        Request(**vars(DEFAULT) | {"duration": 1.0}),
        DEFAULT,
        Request(**vars(DEFAULT) | {"num_waveforms_per_prompt": 5}),
    ]
    assert list(in_batches(requests, 2, range(5))) == [[0, 1], [2], [3], [4]]
    assert list(in_batches(requests, 8, range(5))) == [[0, 1, 3], [2], [4]]
    assert list(in_batches(requests, 8, range(1, 5, 2))) == [[1, 3]]


def test_embeddings_in_between_lie_evenly_on_the_great_circle():
    embeds = torch.eye(3)[:2]
    requests, path = between([Request(**vars(DEFAULT) | {"prompt": p}) for p in ("rain", "dog")], embeds, 2)
    degrees = torch.rad2deg(torch.atan2(path[:, 1], path[:, 0]))
    assert torch.allclose(degrees, torch.tensor([0.0, 30.0, 60.0, 90.0]), atol=1e-4)
    assert [request.prompt for request in requests] == [
        "rain",
        "rain (2/3), dog (1/3)",
        "rain (1/3), dog (2/3)",
        "dog",
    ]
    with pytest.raises(InputError, match="two or more"):
        between([DEFAULT], embeds[:1], 1)
    same = between([DEFAULT, DEFAULT], torch.cat([embeds[:1]] * 2), 1)[1]
    assert torch.allclose(same, embeds[:1].expand(3, -1))


def test_an_audio_prompt_is_embedded_by_the_audio_tower(tmp_path):
    from ldm_audio.audio.io import write_wav

    pipeline, waveform = toys.pipeline(), toys.waveforms(torch.tensor([1]))
    write_wav(tmp_path / "a.wav", waveform[0], toys.RATE, subtype="FLOAT")
    heard = Request(**vars(DEFAULT) | {"audio_prompt": str(tmp_path / "a.wav")})
    embeds = conditions(pipeline, [DEFAULT, heard], 2)
    assert torch.allclose(embeds[1], pipeline.embed_audio(waveform, toys.RATE)[0].float(), atol=1e-6)
    assert torch.allclose(embeds[0], pipeline.embed([""], 1)[0].float(), atol=1e-6)
    with pytest.raises(InputError, match=r"b\.wav: no such file"):
        conditions(pipeline, [Request(**vars(DEFAULT) | {"audio_prompt": "b.wav"})], 2)


def test_saved_embeddings_are_read_or_refused_by_name(tmp_path):
    np.save(tmp_path / "good.npy", np.ones((2, 12)))
    assert read_embeds(tmp_path / "good.npy").dtype == torch.float32
    np.save(tmp_path / "flat.npy", np.ones(12))
    (tmp_path / "text.npy").write_text("x")
    for name in ("flat", "text", "none"):
        with pytest.raises(InputError, match=rf"prompt_embeds=.*{name}\.npy"):
            read_embeds(tmp_path / f"{name}.npy")


def test_a_list_makes_the_sounds_that_each_request_makes_alone(tmp_path, monkeypatch):
    """And they are written in the order of the list, each with its own settings, its best first."""
    monkeypatch.setattr(samples, "mel_sheet", lambda path, *_, **__: path.write_bytes(b"png"))
    pipeline = toys.pipeline()
    requests = [
        Request(**vars(DEFAULT) | change)
        for change in (
            {"prompt": "a low hum", "num_waveforms_per_prompt": 2},
            {"prompt": "a dog barks", "seed": 9},
            {"prompt": "rain", "duration": 0.3},
            {"prompt": "a bell", "negative_prompt": "noise"},
        )
    ]
    embeds, told = conditions(pipeline, requests, 4), []
    negatives = text_embeds(pipeline, [request.negative_prompt for request in requests], 4)
    pipeline.forget_text()  # the embeddings are all that is needed of it
    settings = {"sampler": partial(ddim, eta=1.0), "spacing": "leading"}
    for rank in (0, 1):  # two shares of one list
        sample_requests(
            pipeline,
            requests,
            embeds,
            negatives,
            SampleFolder(tmp_path, mel=pipeline.mel, total=4, rank=rank, world_size=2),
            batch_size=4,
            settings=settings,
            record={"spacing": "leading"},
            progress=lambda *state: told.append(state),
        )
    rows = SampleFolder(tmp_path, mel=pipeline.mel, total=4, overwrite=True).records()
    assert [(row["index"], row["rank"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]
    assert rows[0]["score"] >= rows[1]["score"] and rows[4]["negative_prompt"] == "noise"
    assert rows[2]["seed"] == 9 and rows[3]["duration"] == 0.3 and rows[0]["spacing"] == "leading"
    assert told[-1][0] == told[-1][1] and all(done <= total for done, total, _ in told)

    from ldm_audio.audio.io import read_audio

    pipeline = toys.pipeline()
    for row, request in ((rows[2], requests[1]), (rows[3], requests[2]), (rows[4], requests[3])):
        alone = pipeline(
            [request.prompt],
            negative_prompts=[request.negative_prompt],
            seed=request.seed,
            duration=request.duration,
            num_steps=2,
            guidance_scale=2.5,
            batch_size=1,
            **settings,
        )
        written, _ = read_audio(tmp_path / row["file"])
        assert np.abs(written[0] - alone.waveforms[0].numpy()).max() < 1e-4  # 16 bits
