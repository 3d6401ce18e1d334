import torch
from safetensors.torch import save_file

from ldm_audio.convert.stored import open_safetensors


def test_tensors_are_those_of_the_file_wherever_they_lie_in_it(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "words": torch.arange(7),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "beyond_a_page": torch.randn(3, 701, generator=generator),
        "last": torch.randn(2, 2, dtype=torch.float64, generator=generator),
    }
    save_file(state, tmp_path / "a.safetensors", metadata={"licence": "free"})
    header, tensors = open_safetensors(tmp_path / "a.safetensors")
    assert header == {"licence": "free"} and set(tensors) == set(state)
    for name, expected in state.items():
        found = tensors[name]
        assert found.dtype == expected.dtype and found.shape == expected.shape == tensors.shapes[name]
        assert torch.equal(found, expected)


def test_what_is_done_to_a_tensor_stays_out_of_its_file(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    _, tensors = open_safetensors(tmp_path / "a.safetensors")
    kept = tensors["a"].zero_()
    assert torch.equal(kept, torch.zeros(3)) and torch.equal(tensors["a"], torch.ones(3))
