"""Speech tokens a second, ours and transformers' decoder side by side, full size, random weights.

    python benchmarks/speech_lm.py [--tokens 200] [--repeats 3] [--threads 1] [--clock wall|cpu]
        [--parts one many score]

A prefix of 60 text tokens, then speech tokens at 1 candidate (float32, and bfloat16 weights of ours against
their float32), and CLVP's scoring of 16 candidates: one process, the two in turn, medians. 16 candidates take
minutes: they are written once by each, in fresh processes, which tell seconds and peak memory. theirs is
called with the explicit mask that it needs; both have the same weights, the stop token never comes. `--clock
cpu` counts the seconds that the processor gave, for a machine with other work. The last line is one JSON
object of ratios, ours / theirs in seconds or bytes: less than 1 is better.
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ldm_audio.convert import clvp as table
from ldm_audio.convert.rules import apply_rules, shapes_of
from ldm_audio.layers import pack_linears
from ldm_audio.models.clvp import CLVP
from ldm_audio.models.speech_lm import SpeechLM
from ldm_audio.pipelines.token_generation import GREEDY, generate
from ldm_audio.pretrained import build
from ldm_audio.randomness import RowRandom

TEXT_TOKENS = 60
CANDIDATES = 16
NEVER = -1e4  # the stop token's bias
RECIPES = table.recipes_of({"speech_config": {"vocab_size": 8192}})


def their_decoder():
    from transformers import ClvpDecoderConfig, ClvpForCausalLM

    torch.manual_seed(0)
    peer = ClvpForCausalLM(ClvpDecoderConfig()).eval()
    peer.lm_head.bias.data[8193] = NEVER
    peer.generation_config.eos_token_id = None
    return peer.requires_grad_(False)


def our_decoder(peer=None, *, dtype: torch.dtype = torch.float32) -> SpeechLM:
    """With the weights of theirs, or random ones."""
    ours = build(RECIPES["speech_lm"], source="benchmark").to_empty(device="cpu").to(dtype)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    if peer is not None:
        state = {f"speech_decoder_model.{name}": tensor for name, tensor in peer.state_dict().items()}
        prefix = "speech_decoder_model."
        rules = [rule for rule in table.speech_lm_rules() if rule.sources[0].startswith(prefix)]
        names = {name: shape for name, shape in shapes_of(ours).items() if not name.startswith(OWN)}
        ours.load_state_dict(apply_rules(rules, state, names), strict=False)
    ours.speech_head.bias.data[ours.stop] = NEVER
    ours.requires_grad_(False).eval()
    pack_linears(ours)
    return ours


OWN = ("conditioning.", "text_embed.", "text_position_embed.")  # what their decoder alone has not


def prefix_of(dim: int = 1024) -> Tensor:
    return 0.05 * torch.randn(1, TEXT_TOKENS + 4, dim, generator=torch.Generator().manual_seed(1))


def write_theirs(peer, rows: int, tokens: int) -> Tensor:
    prefix = prefix_of().expand(rows, -1, -1)
    mask = torch.ones(rows, prefix.shape[1] + 1, dtype=torch.int64)
    written = peer.generate(
        conditioning_embeds=prefix, attention_mask=mask, do_sample=False, max_new_tokens=tokens,
        suppress_tokens=[8192], pad_token_id=8193,
    )  # fmt: skip
    return written[:, 1:]


def write_ours(ours: SpeechLM, rows: int, tokens: int) -> Tensor:
    streams = RowRandom([(0, row) for row in range(rows)])
    prefix = prefix_of().to(ours.norm.weight.dtype)
    return generate(ours, prefix, rows=streams, sampling=GREEDY, max_tokens=tokens, positions="released")


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(action: Callable[[], object], clock: str) -> tuple[float, object]:
    start = CLOCKS[clock]()
    result = action()
    return CLOCKS[clock]() - start, result


def in_turn(
    actions: dict[str, Callable[[], object]], repeats: int, clock: str
) -> tuple[dict[str, float], dict]:
    """Median seconds of each, the actions one after the other in every repeat, and their last results."""
    seconds, results = {name: [] for name in actions}, {}
    for _ in range(repeats):
        for name, action in actions.items():
            took, results[name] = timed(action, clock)
            seconds[name].append(took)
    print({name: [round(s, 3) for s in took] for name, took in seconds.items()}, flush=True)
    return {name: statistics.median(took) for name, took in seconds.items()}, results


@torch.inference_mode()
def one_candidate(tokens: int, repeats: int, clock: str) -> dict[str, float]:
    peer = their_decoder()
    half, ours = our_decoder(peer, dtype=torch.bfloat16), our_decoder(peer)
    for action in (write_ours, write_ours, write_theirs):  # warm up
        action(peer if action is write_theirs else ours, 1, 2)
    one, written = in_turn(
        {
            "theirs": lambda: write_theirs(peer, 1, tokens),
            "ours": lambda: write_ours(ours, 1, tokens),
            "ours_bf16": lambda: write_ours(half, 1, tokens),
        },
        repeats,
        clock,
    )
    same = {name: agreement(written[name], written["theirs"]) for name in ("ours", "ours_bf16")}
    for name, seconds in one.items():
        print(f"1 candidate, {name}: {tokens / seconds:.2f} tokens a second")
    print(f"greedy tokens equal to theirs before the first that differs: {same}", flush=True)
    return {"decode_1": one["ours"] / one["theirs"], "decode_1_bf16": one["ours_bf16"] / one["theirs"]}


def agreement(ours: Tensor, theirs: Tensor) -> str:
    """How many of the first tokens are the same."""
    length = min(ours.shape[1], theirs.shape[1])
    differing = (ours[0, :length] != theirs[0, :length]).nonzero()
    return f"{int(differing[0]) if len(differing) else length} of {length}"


@torch.inference_mode()
def scoring(tokens: int, repeats: int, clock: str) -> dict[str, float]:
    from transformers import ClvpEncoder, ClvpEncoderConfig

    peer = ClvpEncoder(ClvpEncoderConfig(vocab_size=8192)).eval()
    recipe: dict = RECIPES["clvp"]
    ours: CLVP = build(recipe, source="benchmark").to_empty(device="cpu").eval()
    state = peer.state_dict()
    rules = table.tower_rules(recipe["speech_tower"]["rotary_dim"])
    ours.speech_tower.load_state_dict(apply_rules(rules, state, shapes_of(ours.speech_tower)))
    ours.text_tower = None
    pack_linears(ours)
    speech = torch.randint(8192, (CANDIDATES, tokens), generator=torch.Generator().manual_seed(2))
    seconds, embeds = in_turn(
        {"theirs": lambda: peer(input_ids=speech).embeds, "ours": lambda: ours.speech_tower(speech)},
        repeats,
        clock,
    )
    print(f"largest difference of the embeddings: {(embeds['ours'] - embeds['theirs']).abs().max():.1e}")
    return {"score_16": seconds["ours"] / seconds["theirs"]}


@torch.inference_mode()
def child(whose: str, tokens: int, clock: str) -> None:
    """Writes 16 candidates; prints its seconds, without what comes before, and this process's peak memory."""
    if whose == "ours":
        ours = our_decoder()
        seconds, _ = timed(lambda: write_ours(ours, CANDIDATES, tokens), clock)
    else:
        theirs = their_decoder()
        seconds, _ = timed(lambda: write_theirs(theirs, CANDIDATES, tokens), clock)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def many_candidates(tokens: int, threads: int, clock: str) -> dict[str, float]:
    """Each in a process of its own, begun while this one is small: its peak starts at its parent's."""
    found = {}
    for whose in ("theirs", "ours"):
        command = [sys.executable, __file__, "--child", whose, "--tokens", tokens, "--threads", threads]
        command += ["--clock", clock]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
        found[whose] = json.loads(done.stdout.splitlines()[-1])
        rate = CANDIDATES * tokens / found[whose]["seconds"]
        memory = found[whose]["peak"] / 1e9
        print(
            f"{CANDIDATES} candidates, {whose}: {rate:.2f} tokens a second, peak {memory:.2f} GB", flush=True
        )
    ours, theirs = found["ours"], found["theirs"]
    return {
        "decode_16": ours["seconds"] / theirs["seconds"],
        "peak_memory": ours["peak"] / theirs["peak"],
    }


PARTS = ("one", "many", "score")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--child", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        child(args.child, args.tokens, args.clock)
        return
    ratios: dict[str, float] = {}
    if "many" in args.parts:
        ratios |= many_candidates(args.tokens, args.threads, args.clock)
    if "one" in args.parts:
        ratios |= one_candidate(args.tokens, args.repeats, args.clock)
        gc.collect()
    if "score" in args.parts:
        ratios |= scoring(args.tokens, args.repeats, args.clock)
    print(json.dumps({"ratios": {name: round(value, 3) for name, value in ratios.items()}}))


if __name__ == "__main__":
    main()
