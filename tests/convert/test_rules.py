import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.parametrizations import weight_norm

from ldm_audio.convert.rules import (
    Rule,
    apply_rules,
    cat_rows,
    drop,
    fold_weight_norm,
    invert_rules,
    iter_rules,
    prefixed,
    shapes_of,
    split_rows,
)
from ldm_audio.errors import InputError

QKV = Rule(
    tuple(f"layer.{{i}}.attention.{part}.{{kind:weight|bias}}" for part in ("query", "key", "value")),
    "blocks.{i}.qkv.{kind}",
    cat_rows,
    split_rows(3),
)
TABLE = [
    QKV,
    Rule("layer.{i}.norm.{kind:weight|bias}", "blocks.{i}.norm.{kind}"),
    Rule("layer.{i}.mlp.{j}.{rest:*}", "blocks.{i}.{j}.{rest}", optional=True),
    Rule("scale", "scale", lambda x: 2 * x, lambda x: x / 2),
    *drop("{path:*}.position_ids", "seen"),
]


def foreign_state(*, depth: int, dim: int, extra: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    state = {"scale": random()}
    for i in range(depth):
        for part in ("query", "key", "value"):
            state[f"layer.{i}.attention.{part}.weight"] = random(dim, dim)
            state[f"layer.{i}.attention.{part}.bias"] = random(dim)
        state[f"layer.{i}.norm.weight"] = random(dim)
        state[f"layer.{i}.norm.bias"] = random(dim)
        if extra:
            state[f"layer.{i}.mlp.3.deep.weight"] = random(dim, 1)
    return state


def own_shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in apply_rules(TABLE, state, None).items()}


def refused(*arguments, **keywords) -> str:
    with pytest.raises(InputError) as caught:
        apply_rules(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_several_sources_make_one_target_in_the_order_of_the_rule():
    state = foreign_state(depth=2, dim=3)
    reordered = dict(reversed(state.items()))
    ours = apply_rules(TABLE, reordered, None)
    parts = [state[f"layer.1.attention.{part}.weight"] for part in ("query", "key", "value")]
    assert torch.equal(ours["blocks.1.qkv.weight"], torch.cat(parts))
    assert ours["scale"] == 2 * state["scale"]


@settings(max_examples=40, deadline=None)
@given(
    depth=st.integers(1, 12),
    dim=st.integers(1, 4),
    extra=st.booleans(),
    dropped=st.booleans(),
    seed=st.integers(0),
)
def test_export_undoes_the_conversion_but_for_what_was_dropped(depth, dim, extra, dropped, seed):
    state = foreign_state(depth=depth, dim=dim, extra=extra, seed=seed % 2**32)
    noise = {"seen": torch.zeros(1), "layer.0.position_ids": torch.zeros(1)} if dropped else {}
    ours = apply_rules(TABLE, state | noise, own_shapes(state))
    back = invert_rules(TABLE, ours, {name: tensor.shape for name, tensor in state.items()})
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@settings(max_examples=20, deadline=None)
@given(
    names=st.lists(st.from_regex(r"[a-z]{1,6}(\.[0-9]{1,2})?\.w", fullmatch=True), unique=True, max_size=20),
    ours=st.from_regex(r"[a-z]{1,3}\.", fullmatch=True),
    theirs=st.from_regex(r"[a-z]{0,3}\.", fullmatch=True),
)
def test_prefixes_come_and_go_without_loss(names, ours, theirs):
    rules = prefixed([Rule("{name:*}.w", "{name}.weight", optional=True)], source=theirs, target=ours)
    state = {theirs + name: torch.tensor(float(i)) for i, name in enumerate(names)}
    converted = apply_rules(rules, state, None)
    assert set(converted) == {f"{ours}{name}eight" for name in names}
    assert invert_rules(rules, converted) == state


def test_the_first_rule_that_matches_in_full_wins():
    rules = [
        Rule(("a.weight_g", "a.weight_v"), "a.weight", fold_weight_norm, optional=True),
        Rule("a.{kind:weight_g|bias}", "b.{kind}", optional=True),
        Rule("a.{rest:*}", "c.{rest}", optional=True),
    ]
    state = {name: torch.ones(1, 1) for name in ("a.weight_g", "a.bias", "a.other")}
    assert set(apply_rules(rules, state, None)) == {"b.weight_g", "b.bias", "c.other"}
    state["a.weight_v"] = torch.ones(1, 1)
    assert set(apply_rules(rules, state, None)) == {"a.weight", "b.bias", "c.other"}


def test_numbers_words_and_text_match_nothing_else():
    rules = [Rule("x.{i}.{kind:a|b}.{i}", "y.{i}.{kind}")]
    assert list(apply_rules(rules, {"x.10.b.10": torch.ones(1)}, None)) == ["y.10.b"]
    for name in ("x.one.a.one", "x.1.c.1", "x.1.a.2", "x.1.a.1.more", "zx.1.a.1", "x-1.a.1"):
        assert name in refused(rules, {name: torch.ones(1)}, None)


def test_one_source_may_fill_several_targets():
    rules = [Rule("qkv", ("q", "k", "v"), split_rows(3), cat_rows)]
    state = {"qkv": torch.arange(6.0)}
    parts = apply_rules(rules, state, dict.fromkeys("qkv", (2,)))
    assert parts["k"].tolist() == [2, 3]
    assert parts["k"].untyped_storage().nbytes() == 8
    assert torch.equal(invert_rules(rules, parts)["qkv"], state["qkv"])


def test_constants_are_made_from_nothing_on_either_side():
    rules = [
        Rule((), "offset", lambda: torch.full((2,), 3.0)),
        Rule("mean", (), inverse=lambda: torch.zeros(4)),
        Rule("w", "w"),
    ]
    ours = apply_rules(rules, {"w": torch.ones(1)}, {"offset": (2,), "w": (1,)})
    assert ours["offset"].tolist() == [3, 3]
    assert set(apply_rules(rules, {"w": torch.ones(1), "mean": torch.ones(4)}, None)) == {"offset", "w"}
    assert {name: tuple(x.shape) for name, x in invert_rules(rules, ours).items()} == {
        "mean": (4,),
        "w": (1,),
    }


def test_an_export_writes_the_first_of_several_spellings():
    rules = [Rule("new.w", "w", optional=True), Rule("old.w", "w", optional=True)]
    assert list(apply_rules(rules, {"old.w": torch.ones(1)}, {"w": (1,)})) == ["w"]
    assert list(invert_rules(rules, {"w": torch.ones(1)})) == ["new.w"]


def test_weight_norm_folds_to_what_torch_computes():
    torch.manual_seed(0)
    layer = weight_norm(torch.nn.ConvTranspose1d(3, 2, 5))
    norm, direction = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    torch.nn.init.normal_(norm)
    torch.testing.assert_close(fold_weight_norm(norm, direction), layer.weight, rtol=0, atol=1e-6)


def test_meta_tensors_convert_to_the_right_shapes():
    state = {name: tensor.to("meta") for name, tensor in foreign_state(depth=2, dim=3).items()}
    ours = apply_rules(TABLE, state, own_shapes(foreign_state(depth=2, dim=3)))
    assert all(tensor.is_meta for tensor in ours.values())


class CountingState(dict):
    """Notes which tensors were read, as a lazily loaded file would load them."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read = []

    def __getitem__(self, name):
        self.read.append(name)
        return super().__getitem__(name)


def test_tensors_are_read_one_rule_at_a_time_and_dropped_ones_never():
    state = CountingState(foreign_state(depth=1, dim=2) | {"seen": torch.zeros(1)})
    first, _ = next(iter_rules(TABLE, state, None))
    assert first == "blocks.0.qkv.weight"
    assert state.read == [f"layer.0.attention.{part}.weight" for part in ("query", "key", "value")]
    state.read.clear()
    apply_rules(TABLE, state, None)
    assert sorted(state.read) == sorted(set(state) - {"seen"})


def test_names_are_settled_before_any_tensor_is_read():
    state = CountingState(foreign_state(depth=1, dim=2) | {"stranger": torch.zeros(1)})
    refused(TABLE, state, None)
    assert state.read == []


def test_a_source_without_a_rule_is_named():
    state = foreign_state(depth=1, dim=2) | {"stranger.weight": torch.zeros(1)}
    assert refused(TABLE, state, None, origin="model.ckpt") == "model.ckpt: no rule takes stranger.weight"


def test_a_source_whose_partner_is_missing_says_so():
    state = foreign_state(depth=1, dim=2)
    del state["layer.0.attention.key.weight"]
    message = refused(TABLE, state, None)
    assert (
        "layer.0.attention.query.weight "
        "(not without layer.0.attention.key.weight, layer.0.attention.value.weight)" in message
    )


def test_a_required_rule_that_matches_nothing_is_named():
    state = foreign_state(depth=1, dim=2)
    del state["scale"]
    assert "nothing matches the rule scale -> scale" in refused(TABLE, state, None)


def test_two_tensors_for_one_target_are_named():
    rules = [Rule("a", "w"), Rule("b", "w")]
    message = refused(rules, {"a": torch.ones(1), "b": torch.ones(1)}, None)
    assert message == "weights: more than one tensor for w from a and from b"


def test_unknown_and_unfilled_targets_are_named():
    state = foreign_state(depth=2, dim=2)
    shapes = own_shapes(foreign_state(depth=1, dim=2)) | {"head.weight": (2, 2)}
    message = refused(TABLE, state, shapes)
    assert "the network has no blocks.1.qkv.weight, blocks.1.qkv.bias" in message
    assert "nothing fills head.weight" in message


def test_a_wrong_shape_is_named_with_both_shapes():
    state = foreign_state(depth=1, dim=2)
    shapes = own_shapes(state) | {"blocks.0.norm.bias": (3,)}
    message = refused(TABLE, state, shapes)
    assert message == ("weights: wrong shape: blocks.0.norm.bias [2] from layer.0.norm.bias, expected [3]")


def test_only_the_first_few_names_are_listed():
    state = {f"x.{i}": torch.ones(1) for i in range(9)}
    assert refused([], state, None) == "weights: no rule takes x.0, x.1, x.2, x.3, x.4 and 4 more"


def test_tensors_that_a_rule_cannot_turn_are_named():
    state = foreign_state(depth=1, dim=2) | {"layer.0.attention.key.weight": torch.ones(3, 5)}
    assert "cannot convert layer.0.attention.query.weight + " in refused(TABLE, state, None)
    message = refused([Rule("qkv", ("q", "k", "v"), split_rows(3))], {"qkv": torch.ones(4)}, None)
    assert message == "weights: cannot convert qkv: shape [4] does not split into 3"


@pytest.mark.parametrize(
    "sources, targets, forward",
    [
        (("a", "b"), "c", None),
        ("a.{i}", "b", None),
        ("a.{i}", "b.{j}", None),
        ((), "a.{i}", lambda: torch.ones(1)),
    ],
)
def test_a_rule_that_cannot_work_is_refused_when_written(sources, targets, forward):
    with pytest.raises(ValueError, match=r"needs a forward|same placeholders"):
        Rule(sources, targets, forward)


def test_shapes_of_a_module_hold_its_buffers_too():
    assert {name: tuple(shape) for name, shape in shapes_of(torch.nn.BatchNorm1d(3)).items()} == {
        "weight": (3,),
        "bias": (3,),
        "running_mean": (3,),
        "running_var": (3,),
        "num_batches_tracked": (),
    }
