import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ldm_audio.errors import InputError
from ldm_audio.models.perceptual import LPIPS, MultiResolutionMel

CONVOLUTIONS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256)}
CONVOLUTIONS |= {14: (256, 256), 17: (256, 512), 19: (512, 512), 21: (512, 512)}
CONVOLUTIONS |= {24: (512, 512), 26: (512, 512), 28: (512, 512)}
POOLS = (4, 9, 16, 23)
TAPS = (3, 8, 15, 22, 29)
HEADS = (64, 128, 256, 512, 512)


def random_weights(*, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """VGG16 under torchvision's names and linear heads under LPIPS's, drawn so that no layer dies out."""
    generator = torch.Generator().manual_seed(seed)
    vgg = {"classifier.0.bias": torch.zeros(3)}
    for i, (wide_in, wide_out) in CONVOLUTIONS.items():
        weight = torch.randn(wide_out, wide_in, 3, 3, generator=generator)
        vgg[f"features.{i}.weight"] = weight * (2 / (9 * wide_in)) ** 0.5
        vgg[f"features.{i}.bias"] = 0.1 * torch.randn(wide_out, generator=generator)
    heads = {
        f"lin{i}.model.1.weight": 50 * torch.rand(1, width, 1, 1, generator=generator)
        for i, width in enumerate(HEADS)
    }
    return vgg, heads


@pytest.fixture(scope="module")
def weights():
    return random_weights(seed=0)


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpips")
    torch.save(weights[0], folder / "vgg16.pth")
    save_file(weights[1], folder / "lin.safetensors")
    return folder


@pytest.fixture(scope="module")
def lpips(folder):
    return LPIPS(path=folder)


def mels(*, seed: int, shape: tuple[int, ...] = (2, 16, 40)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mel = -6 + 2 * torch.randn(shape, generator=generator)
    return mel, mel + 0.5 * torch.randn(shape, generator=generator)


def reference(mel, target, vgg, heads) -> torch.Tensor:
    """LPIPS layer by layer from the two state dicts."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
    x, y = (((m.mT.unsqueeze(1).expand(-1, 3, -1, -1)) - shift) / scale for m in (mel, target))
    total = 0
    for i in range(30):
        if i in CONVOLUTIONS:
            x, y = (
                F.conv2d(z, vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"], padding=1) for z in (x, y)
            )
        elif i in POOLS:
            x, y = F.max_pool2d(x, 2, 2), F.max_pool2d(y, 2, 2)
        else:
            x, y = x.clamp(min=0), y.clamp(min=0)
        if i in TAPS:
            unit_x, unit_y = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
            head = heads[f"lin{TAPS.index(i)}.model.1.weight"].reshape(1, -1, 1, 1)
            total = total + (head * (unit_x - unit_y) ** 2).sum(1).mean((1, 2))
    return total


@torch.no_grad()
def test_lpips_equals_a_reference_written_from_its_definition(lpips, weights):
    mel, target = mels(seed=1)
    expected = reference(mel, target, *weights)
    assert expected.min() > 0.1
    assert (lpips(mel, target) - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_lpips_is_zero_for_equal_mels_symmetric_and_grows_with_the_noise(lpips):
    mel, target = mels(seed=2)
    assert lpips(mel, mel).tolist() == [0, 0]
    torch.testing.assert_close(lpips(mel, target), lpips(target, mel), rtol=0, atol=1e-6)
    assert (lpips(mel, target) > 1.2 * lpips(mel, mel + 0.3 * (target - mel))).all()


@torch.no_grad()
def test_rows_are_judged_apart(lpips):
    mel, target = mels(seed=3)
    both = lpips(mel, target)
    each = torch.cat([lpips(mel[i : i + 1], target[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(both, each, rtol=0, atol=1e-6)


def test_lpips_is_frozen_in_eval_mode_and_passes_gradients_to_the_mel(lpips):
    mel, target = mels(seed=4, shape=(1, 16, 16))
    mel.requires_grad_(True)
    holder = torch.nn.ModuleList([lpips]).train()
    assert not any(module.training for module in holder[0].modules())
    lpips(mel, target).sum().backward()
    assert mel.grad.isfinite().all() and mel.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in lpips.parameters())


def test_points_without_any_feature_have_a_finite_gradient(lpips):
    dead = copy.deepcopy(lpips)
    dead.features[28].bias.fill_(-100.0)
    mel, target = mels(seed=5, shape=(1, 16, 16))
    mel.requires_grad_(True)
    dead(mel, target).sum().backward()
    assert mel.grad.isfinite().all()


def test_a_first_call_in_inference_mode_does_not_spoil_later_training(folder):
    lpips = LPIPS(path=folder).double()
    mel, target = (m.double() for m in mels(seed=6, shape=(1, 16, 16)))
    with torch.inference_mode():
        lpips(mel, target)
    mel.requires_grad_(True)
    lpips(mel, target).sum().backward()
    assert mel.grad.abs().sum() > 0


def test_a_mel_that_four_poolings_would_empty_is_refused(lpips):
    with pytest.raises(InputError, match="at least 16 x 16"):
        lpips(torch.zeros(1, 8, 64), torch.zeros(1, 8, 64))


def test_one_file_with_everything_loads_as_well(weights, lpips, tmp_path):
    save_file(weights[0] | weights[1], tmp_path / "all.safetensors")
    state = LPIPS(path=tmp_path / "all.safetensors").state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in lpips.state_dict().items())


def test_a_vae_trains_under_lpips_from_local_files(folder, command, tmp_path):
    settings = (
        "objective=vae", "vae=small", "discriminator=patch_small", "perceptual=lpips",
        f"perceptual.path={folder}", "data=synthetic", "data.num_samples=10240", "data.train.size=2",
        "data.val.size=1", "batch_size=1", "num_workers=0", "val_items=1", "trainer.log_every=1",
        "trainer.max_steps=1", f"runs={tmp_path}", "run=vae",
    )  # fmt: skip
    assert command("train.py", *settings) == 0
    step = json.loads((tmp_path / "vae" / "metrics.jsonl").read_text().splitlines()[0])
    assert step["train/perceptual"] > 0
    assert [path.name for path in (tmp_path / "vae" / "weights").iterdir()] == ["vae.safetensors"]


class Stranger:
    """Something that a file of weights has no business to hold."""


def test_unusable_files_are_named(weights, folder, tmp_path):
    vgg, lin = folder / "vgg16.pth", folder / "lin.safetensors"
    with pytest.raises(InputError, match=r"nowhere\.pth: no weights file"):
        LPIPS(path=[vgg, tmp_path / "nowhere.pth"])
    with pytest.raises(InputError, match=r"no weights file"):
        LPIPS(path=tmp_path)
    with pytest.raises(
        InputError, match=r"vgg16\.pth: not LPIPS on VGG16, 5 names .* lin0\.model\.1\.weight is missing"
    ):
        LPIPS(path=str(vgg))
    with pytest.raises(InputError, match=r"more than one of these files holds classifier\.0\.bias"):
        LPIPS(path=[vgg, vgg, lin])

    extra, short = tmp_path / "extra.safetensors", tmp_path / "short.safetensors"
    save_file(weights[1] | {"lin5.model.1.weight": torch.zeros(1)}, extra)
    save_file(weights[1] | {"lin0.model.1.weight": torch.zeros(1, 3, 1, 1)}, short)
    with pytest.raises(InputError, match=r"lin5\.model\.1\.weight is extra"):
        LPIPS(path=[vgg, extra])
    with pytest.raises(
        InputError, match=r"lin0\.model\.1\.weight has shape \[1, 3, 1, 1\], expected \[1, 64, 1, 1\]"
    ):
        LPIPS(path=[vgg, short])

    for content in (b"", b"not a pickle", pickle.dumps({"a": Stranger()}, protocol=2)):
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.pth: not a readable pickle of tensors") as caught:
            LPIPS(path=[tmp_path / "bad.pth", lin])
        assert "\n" not in str(caught.value)
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(InputError, match=r"list\.pth: expected tensors by name"):
        LPIPS(path=[tmp_path / "list.pth", lin])
    (tmp_path / "bad.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"bad\.safetensors: not a readable safetensors file"):
        LPIPS(path=tmp_path / "bad.safetensors")


def test_multi_resolution_is_zero_for_equal_mels_symmetric_and_a_row_each():
    distance = MultiResolutionMel(scales=[1, 2, 4])
    mel, target = mels(seed=7)
    assert distance(mel, mel).tolist() == [0, 0]
    assert torch.equal(distance(mel, target), distance(target, mel))
    torch.testing.assert_close(distance(mel, target)[1:], distance(mel[1:], target[1:]))


def test_multi_resolution_is_what_it_says():
    mel, target = mels(seed=8, shape=(1, 6, 8))
    by_hand = 0
    for scale in (1, 2):
        pooled = [F.avg_pool2d(m.unsqueeze(1), scale).squeeze(1) for m in (mel, target)]
        by_hand += (pooled[0] - pooled[1]).abs().mean()
        for axis in (1, 2):
            by_hand += (pooled[0].diff(dim=axis) - pooled[1].diff(dim=axis)).abs().mean()
    torch.testing.assert_close(MultiResolutionMel(scales=[1, 2])(mel, target).squeeze(), by_hand / 2)


def test_multi_resolution_of_a_constant_shift_is_the_shift_at_any_scale():
    mel, _ = mels(seed=9, shape=(2, 8, 8))
    torch.testing.assert_close(MultiResolutionMel(scales=[1, 4, 8])(mel, mel - 0.25), torch.full((2,), 0.25))


def test_multi_resolution_passes_gradients_to_every_bin():
    mel, target = mels(seed=10, shape=(2, 8, 8))
    mel.requires_grad_(True)
    MultiResolutionMel(scales=[1, 2])(mel, target).sum().backward()
    assert mel.grad.isfinite().all() and (mel.grad.abs() > 0).float().mean() > 0.9


def test_a_scale_that_exceeds_the_mel_is_refused():
    with pytest.raises(InputError, match="scale 16 exceeds"):
        MultiResolutionMel(scales=[1, 16])(*mels(seed=11, shape=(1, 8, 40)))
