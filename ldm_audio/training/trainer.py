"""The one training loop: it runs every objective, in one process or in many, and never loses work."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch._functorch.config as functorch_config
from torch import Tensor
from tqdm import tqdm

from ldm_audio import distributed
from ldm_audio.errors import InputError, RunError
from ldm_audio.files import remove_leftovers
from ldm_audio.objectives.base import Logs, Objective, check_players, to_device
from ldm_audio.randomness import generator_for
from ldm_audio.training.checkpoint import (
    FORMAT,
    load_checkpoint,
    load_optimizer_state,
    optimizer_state,
    rng_state,
    save_checkpoint,
    save_sharded,
    set_rng_state,
)
from ldm_audio.training.ema import EMA
from ldm_audio.training.loggers import JSONLLogger, PreviewFiles
from ldm_audio.training.stopping import Interrupted, StopSignal
from ldm_audio.training.validation import validate


class Diverged(RunError):
    """Raised after `max_bad_steps` steps in a row without a finite loss; the last checkpoint is untouched."""


class Trainer:
    """Trains an objective to `max_steps`; running it again in the same folder continues.

    optimizer: a partial of a torch optimiser over a player's parameters.
    lr_schedule: factor on the optimiser's learning rate, a function of the step.
    save_weights: `(objective, folder)`, writes the networks' own weights files, averaged weights swapped in.
    loggers: extra ones, beside `metrics.jsonl` and the files of the previews.
    strategy: none, or how the processes of `distributed.process_group` share the work; ddp gives each its
    own networks, fsdp2 splits them, for objectives with one player.
    """

    def __init__(
        self,
        *,
        folder: str,
        max_steps: int,
        optimizer: Callable[[list], torch.optim.Optimizer],
        lr_schedule: Callable[[int], float],
        save_weights: Callable[[Objective, Path], None],
        loggers: list,
        device: str,
        strategy: str,
        precision: str,
        compile: bool,
        activation_checkpointing: bool,
        accumulate: int,
        clip_norm: float | None,
        ema_decay: float,
        log_every: int,
        validate_every: int,
        save_every: int,
        prepare_batches: int,
        max_bad_steps: int,
        bar_position: int,
    ):
        if precision not in ("fp32", "bf16"):
            raise InputError(f"trainer.precision={precision}: expected fp32 or bf16")
        self.folder = Path(folder)
        self.max_steps = max_steps
        self.optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.save_weights = save_weights
        self.extra_loggers = loggers
        self.device = torch.device(device)
        self.strategy = strategy
        self.precision = precision
        self.compile = compile
        self.activation_checkpointing = activation_checkpointing
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.ema_decay = ema_decay
        self.log_every = log_every
        self.validate_every = validate_every
        self.save_every = save_every
        self.prepare_batches = prepare_batches
        self.max_bad_steps = max_bad_steps
        self.bar_position = bar_position
        self.stop = StopSignal()

    def fit(
        self, objective: Objective, train_batches: Callable[[int], Iterable], val_batches: Iterable
    ) -> float:
        """Trains from the last checkpoint, or from nothing, and returns the best monitored value.

        train_batches(step) yields the batches from that step on; with accumulation, `accumulate` of them
        make one step. Of items numbered below 0, which fill up a rank's validation, nothing is counted.

        Raises SystemExit(128 + its number) after a signal that stopped the run, Diverged, and RunError where
        the disk is full; the last checkpoint is whole then.
        """
        self._set_up(objective)
        if self.step >= self.max_steps and not self.validation_due:
            self._tell(f"{self.folder}: finished at step {self.step}; raise trainer.max_steps to go on")
            return self.best
        if self.step == 0:
            with self._autocast():
                objective.prepare(self._moved(islice(train_batches(0), self.prepare_batches)))
        self.loggers = []
        if distributed.is_main():
            remove_leftovers(self.folder)
            self.metrics = JSONLLogger(self.folder / "metrics.jsonl", num_rows=self.num_rows)
            self.loggers = [self.metrics, PreviewFiles(self.folder / "previews"), *self.extra_loggers]
        self.bar = tqdm(
            total=self.max_steps,
            initial=self.step,
            desc=self.folder.name,
            position=self.bar_position,
            disable=not distributed.is_main(),
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,  # a log file wants few lines
            smoothing=0.05,
        )
        try:
            with self.stop.caught():
                self._run(train_batches, val_batches)
        finally:
            self.bar.close()
            for logger in self.loggers:
                logger.close()
        if self.stop.number and (self.step < self.max_steps or self.validation_due):
            raise SystemExit(128 + self.stop.number)
        return self.best

    def _set_up(self, objective: Objective) -> None:
        check_players(objective)
        if self.accumulate > 1 and not objective.accumulable:
            raise InputError(f"trainer.accumulate={self.accumulate}: {type(objective).__name__} takes only 1")
        if self.strategy not in ("none", *objective.strategies):
            known = ", ".join(("none", *objective.strategies))
            name = type(objective).__name__
            raise InputError(f"trainer.strategy={self.strategy}: {name} can be trained by {known}")
        self.objective = objective.to(self.device).train()
        for network in objective.networks().values():
            if self.activation_checkpointing and hasattr(network, "set_activation_checkpointing"):
                network.set_activation_checkpointing(True)
            if self.compile:
                functorch_config.donated_buffer = not objective.retains_graph
                network.compile()
        self.learning = [n for n in objective.children() if any(p.requires_grad for p in n.parameters())]
        if self.strategy == "ddp":
            objective.wrapped = {network: distributed.replicate(network) for network in self.learning}
        if self.strategy == "fsdp2":
            for network in self.learning:
                distributed.shard(network)
        self.players = objective.players()
        self.names = {p: name for name, p in objective.named_parameters() if p.requires_grad}
        self.optimizers = {
            name: self.optimizer([{"params": kind} for kind in distributed.kinds(parameters)])
            for name, parameters in self.players.items()
        }
        self.base_lr = {name: opt.param_groups[0]["lr"] for name, opt in self.optimizers.items()}
        self.ema = EMA(objective.averaged(), decay=self.ema_decay)
        self.step, self.best, self.bad_steps, self.skipped, self.num_rows = 0, math.inf, 0, 0, 0
        self.replaced, self.validation_due = 0, False
        self._seed_rank()
        if self.last.exists():
            self._restore(load_checkpoint(self.last, self.objective.learned_state()))
        self.logged_step = self.step

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.pt"

    def _run(self, train_batches: Callable[[int], Iterable], val_batches: Iterable) -> None:
        batches = self._moved(train_batches(self.step * self.accumulate))
        if self.validation_due:
            self._validate(val_batches)
            self._save()
        since, waited = time.perf_counter(), 0.0
        while self.step < self.max_steps and not self.stop.has_come():
            before = time.perf_counter()
            micro_batches = list(islice(batches, self.accumulate))
            waited += time.perf_counter() - before
            self.replaced += sum(batch.get("replaced", 0) for batch in micro_batches)
            logs = self._train_step(micro_batches)
            self.step += 1
            self.bar.update()
            if self.step % self.log_every == 0 or self.step == self.max_steps:
                elapsed = time.perf_counter() - since
                logs |= {
                    "items_per_second": self._items(micro_batches) * self._steps_since_log() / elapsed,
                    "waiting_share": waited / elapsed,
                    "peak_memory_gb": peak_memory(self.device),
                    "skipped_steps": self.skipped,
                    "replaced_clips": self._replaced_everywhere(),
                }
                self._log(logs)
                since, waited = time.perf_counter(), 0.0
            pause = time.perf_counter()
            self.validation_due = self.step % self.validate_every == 0 or self.step == self.max_steps
            if self.validation_due:
                self._validate(val_batches)
            if self.step % self.save_every == 0:
                self._save()
            since += time.perf_counter() - pause
        if self.step % self.save_every:
            self._save()
        if self.step < self.max_steps or self.validation_due:
            self._tell(f"{self.folder}: stopped at step {self.step}; the same command continues")
        elif self.bad_steps:
            raise Diverged(f"the last {self.bad_steps} steps were bad; last checkpoint: {self.last}")

    def _train_step(self, micro_batches: list[dict]) -> Logs:
        """One optimiser step of every player that the objective names; scalars to log."""
        factor = self.lr_schedule(self.step)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.base_lr[name] * factor
            optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for place, batch in enumerate(micro_batches, start=1):
            is_last = place == len(micro_batches)
            distributed.synchronise_gradients([*self.learning, *self.objective.wrapped.values()], is_last)
            turns = self.objective.losses(batch, self.step)
            while (turn := self._next(turns)) is not None:
                player, loss, logs = turn
                loss_everywhere, logs = self._over_ranks(loss, logs)
                if not torch.isfinite(loss_everywhere):
                    return self._skip_step(player, logs)
                (loss / len(micro_batches)).backward()
                for key, value in logs.items():
                    sums[f"train/{key}"] = sums.get(f"train/{key}", 0.0) + value / len(micro_batches)
                if is_last:
                    limit = self.clip_norm if self.clip_norm is not None else math.inf
                    norm = distributed.clip_gradients(self.players[player], limit)
                    if not torch.isfinite(norm):
                        return self._skip_step(player, {"gradient": norm})
                    self.optimizers[player].step()
                    self.optimizers[player].zero_grad(set_to_none=True)
                    sums[f"grad_norm/{player}"] = norm
        self.bad_steps = 0
        rates = {f"lr/{name}": base * factor for name, base in self.base_lr.items()}
        return sums | rates | {"ema_decay": self.ema.update()}

    def _over_ranks(self, loss: Tensor, logs: Logs) -> tuple[Tensor, Logs]:
        """Averages of the loss and of what is logged; one that is not finite somewhere is so everywhere."""
        logs = {name: value.detach() for name, value in logs.items()}
        if distributed.world_size() == 1:
            return loss.detach(), logs
        values = torch.stack([value.double() for value in (loss.detach(), *logs.values())])
        averages = distributed.mean_over_ranks(values).unbind()
        return averages[0], dict(zip(logs, averages[1:]))

    def _next(self, turns: Iterator) -> tuple[str, Tensor, Logs] | None:
        with self._autocast():
            return next(turns, None)

    def _skip_step(self, player: str, terms: Logs) -> Logs:
        """Names the terms that are not finite and counts them; this player and those after it do not move."""
        self.bad_steps += 1
        self.skipped += 1
        bad = [name for name, value in terms.items() if not torch.isfinite(value)] or ["loss"]
        message = f"step {self.step}: {player}: {', '.join(bad)} not finite"
        if self.bad_steps >= self.max_bad_steps:
            raise Diverged(f"{message}, {self.bad_steps} steps in a row; last checkpoint: {self.last}")
        self._tell(f"{message}; step skipped")
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        return {"bad_steps": float(self.bad_steps)}

    def _log(self, metrics: Logs) -> None:
        metrics = {name: float(value) for name, value in metrics.items()}
        for logger in self.loggers:
            logger.log(self.step, metrics)
        shown = {k.removeprefix("train/"): f"{v:.4g}" for k, v in metrics.items() if k.startswith("train/")}
        self.bar.set_postfix(dict(islice(shown.items(), 4)), refresh=False)
        self.logged_step = self.step

    def _replaced_everywhere(self) -> int:
        """Items so far, over all ranks, whose own clip could not be read."""
        replaced = torch.tensor(float(self.replaced), dtype=torch.float64)
        return round(float(distributed.mean_over_ranks(replaced)) * distributed.world_size())

    def _steps_since_log(self) -> int:
        return self.step - self.logged_step

    def _items(self, micro_batches: list[dict]) -> int:
        return sum(len(batch["item"]) for batch in micro_batches) * distributed.world_size()

    def _validate(self, val_batches: Iterable) -> None:
        """Metrics and previews of the averaged weights; a signal leaves it due for the next session."""
        self.objective.eval()
        try:
            with self.ema.swapped(), self._autocast():
                metrics, previews = validate(self.objective, self._moved(val_batches), self.stop)
        except Interrupted:
            return
        finally:
            self.objective.train()
        for logger in self.loggers:
            logger.log(self.step, metrics)
            if previews:
                logger.preview(self.step, previews)
        self.validation_due = False
        value = metrics.get(self.objective.monitor, math.inf)
        if value < self.best:
            self.best = value
            self._write_weights("best")

    def _save(self) -> None:
        """Weights files first, then the state: killed in between, a run repeats steps and loses nothing.

        In a row of bad steps nothing is written, for the state may be what makes them bad.
        """
        if self.bad_steps:
            self._tell(f"{self.folder}: not saved at step {self.step}, which was bad")
            return
        self._write_weights("weights")
        for logger in self.loggers[:1]:
            logger.sync()
        state = {
            "format": FORMAT,
            "step": self.step,
            "best": self.best,
            "skipped": self.skipped,
            "replaced": self._replaced_everywhere(),
            "validation_due": self.validation_due,
            "num_rows": self.metrics.num_rows if distributed.is_main() else 0,
            "ema_updates": self.ema.updates,
            "rng": distributed.gather_objects(rng_state(self.device)),
        }
        tensors = {
            "objective": self.objective.learned_state(),
            "optimizers": {name: optimizer_state(o, self.names) for name, o in self.optimizers.items()},
            "ema": self.ema.shadow,
        }
        if self.strategy == "fsdp2":
            save_sharded(self.last, state, tensors)
        elif distributed.is_main():
            save_checkpoint(self.last, state | tensors)

    def _write_weights(self, name: str) -> None:
        with self.ema.swapped():
            self.save_weights(self.objective, self.folder / name)

    def _restore(self, state: dict) -> None:
        if state.get("format") != FORMAT:
            raise InputError(f"{self.last}: format {state.get('format')}, expected {FORMAT}")
        own = self.objective.learned_state()
        learned = {key: distributed.split_as(v, own.get(key, v)) for key, v in state["objective"].items()}
        self.objective.load_learned_state(learned)
        for name, optimizer in self.optimizers.items():
            load_optimizer_state(optimizer, self.names, state["optimizers"].get(name, {}))
        self.ema.load_state_dict({"updates": state["ema_updates"], "shadow": state.get("ema", {})})
        self.step, self.best, self.skipped = state["step"], state["best"], state["skipped"]
        self.validation_due, self.num_rows = state["validation_due"], state["num_rows"]
        self.replaced = state["replaced"] if distributed.is_main() else 0
        if len(state["rng"]) == distributed.world_size():
            set_rng_state(state["rng"][distributed.rank()], self.device)
        else:
            self._tell(f"{self.folder}: {len(state['rng'])} processes before, now {distributed.world_size()}")

    def _seed_rank(self) -> None:
        """Dropout differs between ranks, which were all seeded alike to build the same networks."""
        if distributed.rank():
            torch.manual_seed(generator_for(torch.initial_seed(), distributed.rank()).initial_seed())

    def _tell(self, message: str) -> None:
        if distributed.is_main():
            tqdm.write(message)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _moved(self, batches: Iterable[dict]) -> Iterator[dict]:
        return (to_device(batch, self.device) for batch in batches)


def peak_memory(device: torch.device) -> float:
    """The most that was held at once so far, in GB: tensors on a GPU, else the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
