"""How fast a network must be for training on many GPUs to stay efficient: arithmetic, nothing is run.

    python benchmarks/scaling.py --seconds 0.5 [--unet audioldm_s] [--gpus 8 64 512] [--efficiency 0.9]

--seconds: a step's time on one GPU, measured elsewhere (`benchmarks/train_step.py --device cuda`). Let n be
the network's parameters, b the bytes of a gradient and N the number of GPUs. Over a ring each GPU sends in a
step 2 (N - 1) / N n b with ddp, which averages gradients, and 3 (N - 1) / N n b with fsdp2, which gathers
parameters in forward and backward and spreads gradients. Where a share h of a step's T seconds hides
communication, an efficiency of E needs bytes / ((1 / E - 1 + h) T) a second from each GPU. Latencies are left
out. The last line is a JSON object.
"""

import argparse
import json
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ldm_audio.config import checkout

HIDDEN = {"none": 0.0, "backward": 2 / 3}  # the backward pass is about two thirds of a step
PASSES = {"ddp": 2, "fsdp2": 3}
BYTES = {"fp32": 4, "bf16": 2}


def parameters(unet: str) -> int:
    with torch.device("meta"):
        network = instantiate(OmegaConf.load(Path(checkout(), "configs", "unet", f"{unet}.yaml")))
    return sum(parameter.numel() for parameter in network.parameters())


def sent(count: int, passes: int, size: int, gpus: int) -> float:
    """Bytes that each GPU sends a step."""
    return passes * (gpus - 1) / gpus * count * size


def needed(sent_bytes: float, seconds: float, efficiency: float, hidden: float) -> float:
    """Bytes a second that each GPU must be able to send."""
    return sent_bytes / ((1 / efficiency - 1 + hidden) * seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, nargs="+", required=True)
    parser.add_argument("--unet", default="audioldm_s")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--efficiency", type=float, default=0.9)
    args = parser.parse_args()
    count = parameters(args.unet)
    rows = []
    for strategy, passes in PASSES.items():
        for precision, size in BYTES.items():
            for gpus in args.gpus:
                volume = sent(count, passes, size, gpus)
                for seconds in args.seconds:
                    rows.append(
                        {
                            "strategy": strategy,
                            "gradients": precision,
                            "gpus": gpus,
                            "step_seconds": seconds,
                            "gigabytes_a_step": round(1e-9 * volume, 3),
                            "gigabits_a_second": {
                                name: round(8e-9 * needed(volume, seconds, args.efficiency, share), 2)
                                for name, share in HIDDEN.items()
                            },
                        }
                    )
    print("| strategy | gradients | GPUs | s a step | GB sent | Gbit/s, nothing hidden | behind backward |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        *cells, rates = row.values()
        print("|", " | ".join(map(str, [*cells, *rates.values()])), "|")
    print(json.dumps({"unet": args.unet, "parameters": count, "efficiency": args.efficiency, "rows": rows}))


if __name__ == "__main__":
    main()
