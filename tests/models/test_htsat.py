"""The audio tower's own properties; its parity with transformers is in test_clap.py."""

import pytest
import torch
from torch import nn

from ldm_audio.errors import InputError
from ldm_audio.models.htsat import (
    HTSAT,
    AttentionalFusion,
    DropPath,
    IterativeFusion,
    PatchEmbed,
    relative_position_index,
    shift_mask,
    stripes,
)

TOY = {
    "n_mels": 32,
    "spec_size": 64,
    "patch_size": 4,
    "patch_stride": 4,
    "dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 8,
    "mlp_ratio": 2.0,
    "qkv_bias": True,
    "dropout": 0.0,
    "drop_path": 0.0,
    "fusion": None,
    "spec_augment": False,
}
# Swin's parameters: mel norm, patches, stages, final norm; the same tensors as transformers' `audio_model`.
FULL_SIZES = {"tiny": (96, [2, 2, 6, 2]), "base": (128, [2, 2, 12, 2]), "large": (256, [2, 2, 12, 2])}
ENCODER_PARAMETERS = {"tiny": 27_534_488, "base": 67_824_408, "large": 270_851_992}
FUSION_PARAMETERS = {"tiny": 14_640, "base": 23_616, "large": 80_000}  # what aff_2d adds


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def toy(**changes) -> HTSAT:
    return HTSAT(**{**TOY, **changes})


def full(size: str, fusion: str | None) -> HTSAT:
    dim, depths = FULL_SIZES[size]
    with torch.device("meta"):
        return toy(
            n_mels=64,
            spec_size=256,
            dim=dim,
            depths=depths,
            num_heads=[4, 8, 16, 32],
            mlp_ratio=4.0,
            fusion=fusion,
        )


def mel_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * 20 - 40


def no_long(batch: int) -> torch.Tensor:
    return torch.zeros(batch, dtype=torch.bool)


@pytest.mark.parametrize("size", FULL_SIZES)
def test_full_sizes_have_the_released_number_of_parameters(size):
    plain, fused = full(size, None), full(size, "aff_2d")
    assert sum(p.numel() for p in plain.parameters()) == ENCODER_PARAMETERS[size]
    extra = sum(p.numel() for p in fused.parameters()) - ENCODER_PARAMETERS[size]
    assert extra == FUSION_PARAMETERS[size]
    assert plain.out_dim == 8 * FULL_SIZES[size][0]


@pytest.mark.parametrize("size", ["tiny", "large"])
def test_full_size_accepts_ten_seconds(size):
    tower = full(size, None).eval()
    embed = tower(torch.empty(2, 1, 1001, 64, device="meta"), no_long(2))
    assert embed.shape == (2, tower.out_dim)


def test_the_only_buffers_are_the_norms_statistics():
    buffers = {name.rsplit(".", 1)[1] for name, _ in full("tiny", "aff_2d").named_buffers()}
    assert buffers == {"running_mean", "running_var", "num_batches_tracked"}
    tower = full("tiny", "aff_2d")
    assert {name for name, _ in tower.named_buffers()} <= tower.state_dict().keys()


def test_folding_puts_lengths_of_time_under_each_other():
    tower = toy(n_mels=16, spec_size=64)
    mel = torch.arange(256.0)[:, None] * 100 + torch.arange(16.0)  # (n, f)
    image = tower.fold(mel[None, None])[0, 0]
    assert image.shape == (64, 64)
    for length in range(4):
        quarter = mel[64 * length : 64 * (length + 1)]
        assert torch.equal(image[16 * length : 16 * (length + 1)], quarter.T)


def test_relative_positions_of_a_window():
    window = 3
    index = relative_position_index(window, torch.device("cpu"))
    for query in range(9):
        for key in range(9):
            row_step = query // 3 - key // 3 + 2
            column_step = query % 3 - key % 3 + 2
            assert index[query, key] == row_step * 5 + column_step


def test_shifted_windows_see_only_neighbours():
    """A token attends to another exactly where both were in one window before the shift wrapped around."""
    grid, window, shift = 8, 4, 2
    mask = shift_mask(grid, window, shift, torch.device("cpu"))
    assert mask.shape == (4, 16, 16) and set(mask.unique().tolist()) == {-100.0, 0.0}
    for w in range(4):
        for p in range(16):
            for q in range(16):
                places = []
                for token in (p, q):
                    row = w // 2 * window + token // window
                    column = w % 2 * window + token % window
                    # A row or column at the far end came from the other side of the image.
                    places.append((row >= grid - shift, column >= grid - shift))
                assert (mask[w, p, q] == 0) == (places[0] == places[1])


def test_a_stage_no_larger_than_the_window_is_not_shifted():
    tower = toy()
    shifts = [[block.shift for block in stage["blocks"]] for stage in tower.stages]
    assert shifts == [[0, 4], [0, 0]]
    smaller = toy(window_size=32)
    assert [block.window for stage in smaller.stages for block in stage["blocks"]] == [16, 16, 8, 8]
    assert smaller.eval()(mel_of(2, 1, 100, 32), no_long(2)).shape == (2, 32)


def test_small_sizes_work():
    tower = toy(n_mels=64, spec_size=128, dim=32, depths=[2, 2, 2], num_heads=[2, 4, 8], drop_path=0.1)
    assert tower(mel_of(2, 1, 201, 64), no_long(2)).shape == (2, 128)


@pytest.mark.parametrize("patch_size", [4, 8])
def test_overlapping_patches_work(patch_size):
    tower = toy(patch_size=patch_size, fusion="aff_2d").eval()
    is_longer = torch.tensor([True, False])
    assert tower(mel_of(2, 4, 128, 32), is_longer).isfinite().all()


@pytest.mark.parametrize("fusion", ["aff_2d", "iaff_2d", "daf_2d"])
def test_only_long_clips_are_fused(fusion):
    tower = toy(fusion=fusion).eval()
    mel = mel_of(3, 4, 120, 32)
    none = tower(mel, no_long(3))
    some = tower(mel, torch.tensor([True, False, True]))
    assert torch.allclose(none[1], some[1], atol=1e-6)
    assert (none[[0, 2]] - some[[0, 2]]).abs().amax(dim=1).min() > 1e-4
    changed = mel.clone()
    changed[:, 1:] = 0
    assert torch.equal(tower(changed, no_long(3)), none)


def test_channel_map_reads_all_channels_of_every_clip():
    tower = toy(fusion="channel_map").eval()
    mel = mel_of(2, 4, 120, 32)
    assert tower.patch_embed.proj.weight.shape[1] == 4 and tower.patch_embed.fuse is None
    for channel in range(4):
        changed = mel.clone()
        changed[:, channel] += 10
        assert not torch.equal(tower(changed, no_long(2)), tower(mel, no_long(2)))


def test_chunks_lie_side_by_side_and_zeros_fill_the_rest():
    embed = PatchEmbed(dim=16, patch_size=4, patch_stride=4, fusion="daf_2d")
    chunks = torch.randn(2, 3, 64, 64)
    local = embed.embed_chunks(chunks, 16)
    assert local.shape == (2, 16, 16, 16)
    for k in range(3):
        assert torch.allclose(
            local[..., 5 * k : 5 * k + 5], embed.local_proj(chunks[:, k : k + 1]), atol=1e-6
        )
    assert not local[..., 15:].any()


def test_fusion_of_equal_inputs_doubles_them_only_in_aff():
    x = torch.randn(2, 16, 4, 4)
    assert torch.allclose(AttentionalFusion(dim=16)(x, x), 2 * x, atol=1e-6)
    assert torch.allclose(IterativeFusion(dim=16)(x, x), x, atol=1e-6)


def test_iterative_fusion_uses_the_first_global_attention_twice():
    fuse = IterativeFusion(dim=16).eval()
    x, y = torch.randn(2, 2, 16, 4, 4)
    local, pooled = fuse.local_attention(x + y), (x + y).mean((2, 3), keepdim=True)
    weight = torch.sigmoid(local + fuse.global_attention(pooled))
    mixed = x * weight + y * (1 - weight)
    local, pooled = fuse.local_attention2(mixed), mixed.mean((2, 3), keepdim=True)
    weight = torch.sigmoid(local + fuse.global_attention(pooled))
    assert torch.allclose(fuse(x, y), x * weight + y * (1 - weight), atol=1e-6)


@pytest.mark.parametrize("fusion", ["aff_2d", "iaff_2d"])
@pytest.mark.parametrize("long", [[False, False, False], [False, True, False], [True, True, True]])
def test_training_reaches_every_parameter(fusion, long):
    """With one long clip, which batch norm could not take alone, and with none as well."""
    tower = toy(fusion=fusion).train()
    is_longer = torch.tensor(long)
    tower(mel_of(3, 4, 120, 32), is_longer).square().sum().backward()
    assert not [name for name, p in tower.named_parameters() if p.grad is None]
    assert is_longer.tolist() == long  # the caller's tensor is left alone


def test_one_long_clip_is_fused_as_two_equal_ones_in_training():
    embed = PatchEmbed(dim=16, patch_size=4, patch_stride=4, fusion="aff_2d").train()
    image = torch.randn(2, 4, 64, 64)
    one = embed(image, torch.tensor([False, True]))
    two = embed(image[[0, 1, 1]], torch.tensor([False, True, True]))
    assert torch.allclose(one, two[:2], atol=1e-6)


def test_spec_augment_hides_stripes_in_training_only():
    tower = toy(spec_augment=True)
    mel = mel_of(4, 1, 120, 32)
    assert torch.equal(tower.eval()(mel, no_long(4)), tower(mel, no_long(4)))
    hidden = tower.hide_stripes(torch.ones(64, 2, 120, 32))
    assert torch.equal(hidden[:, 0], hidden[:, 1])
    assert set(hidden.unique().tolist()) == {0.0, 1.0}
    frames = (hidden == 0).all(dim=3)[:, 0]  # (b, n)
    bins = (hidden == 0).all(dim=2)[:, 0]  # (b, f)
    assert frames.sum(dim=1).max() <= 2 * 7 and bins.sum(dim=1).max() <= 2 * 3
    # Nothing but whole frames and whole bins is hidden.
    assert torch.equal(hidden[:, 0] == 0, frames[:, :, None] | bins[:, None, :])


def test_stripes_have_the_released_widths_and_places():
    keep = stripes(20000, 1001, 64, torch.device("cpu"))
    hidden = (~keep).sum(dim=1)
    assert hidden.max() <= 2 * 63 and hidden.min() == 0
    assert abs(hidden.float().mean() - 2 * 31.5) < 2  # two widths uniform over 0..63, rarely overlapping
    assert (~keep)[:, 0].any() and (~keep)[:, -2].any()


def test_drop_path_drops_whole_items_and_keeps_the_mean():
    drop = DropPath(rate=0.25).train()
    out = drop(torch.ones(20000, 2, 3))
    assert set(out.unique().tolist()) <= {0.0, out.max().item()}
    assert (out.flatten(1) == out[:, :1, 0]).all()
    assert abs(out.mean() - 1) < 0.02
    assert torch.equal(drop.eval()(out), out)


def test_drop_path_rises_linearly_over_all_blocks():
    tower = toy(depths=[2, 3], drop_path=0.1)
    rates = [block.drop_path.rate for stage in tower.stages for block in stage["blocks"]]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])


def test_training_follows_inference_mode():
    """The cached tables made under inference mode must not be inference tensors."""
    relative_position_index.cache_clear()
    shift_mask.cache_clear()
    tower = toy()
    with torch.inference_mode():
        tower(mel_of(2, 1, 128, 32), no_long(2))
    tower(mel_of(2, 1, 128, 32), no_long(2)).sum().backward()


def test_activation_checkpointing_changes_no_gradient():
    tower = toy(fusion="aff_2d", dropout=0.1, drop_path=0.2, spec_augment=True).train()
    mel, is_longer = mel_of(2, 4, 120, 32), torch.tensor([True, True])
    gradients = []
    for enabled in (False, True):
        tower.set_activation_checkpointing(enabled)
        tower.zero_grad()
        torch.manual_seed(1)
        tower(mel, is_longer).square().sum().backward()
        gradients.append([p.grad.clone() for p in tower.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_bfloat16_autocast_stays_close():
    tower = toy(fusion="aff_2d").eval()
    mel, is_longer = mel_of(2, 4, 120, 32), torch.tensor([True, False])
    exact = tower(mel, is_longer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (tower(mel, is_longer) - exact).abs().max() < 0.05 * exact.abs().max()


def test_linear_layers_start_small():
    tower = toy(dim=64, depths=[2, 2])
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"spec_size": 80}, "spec_size=80: expected a multiple of n_mels=32"),
        ({"spec_size": 96, "window_size": 7}, "24 patches do not divide into windows of 7"),
        ({"patch_stride": 3, "patch_size": 3}, "spec_size=64: expected a multiple of patch_stride=3"),
        ({"patch_size": 2}, "patch_size=2"),
        ({"window_size": 5}, "16 patches do not divide into windows of 5"),
        ({"depths": [1] * 6, "num_heads": [2] * 6}, "a grid of 1 patches"),
        ({"num_heads": [2]}, "num_heads=\\[2\\]"),
        ({"num_heads": [3, 4]}, "width 16 is not divisible by 3 heads"),
        ({"fusion": "aff_1d"}, "fusion='aff_1d'"),
    ],
)
def test_impossible_sizes_are_refused_with_the_numbers(change, told):
    with pytest.raises(InputError, match=told):
        toy(**change)


@pytest.mark.parametrize("shape", [(2, 1, 129, 32), (2, 1, 100, 31), (2, 4, 100, 32), (2, 100, 32)])
def test_wrong_mels_are_refused(shape):
    with pytest.raises(InputError, match="mel"):
        toy()(torch.zeros(shape), no_long(2))
    with pytest.raises(InputError, match="is_longer"):
        toy()(torch.zeros(2, 1, 100, 32), torch.zeros(2, 1, dtype=torch.bool))
