"""The one training loop: it runs every objective, and never loses work."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_audio.errors import InputError
from ldm_audio.objectives.base import Logs, Objective, check_players, to_device
from ldm_audio.training.checkpoint import load_checkpoint, save_checkpoint
from ldm_audio.training.ema import EMA
from ldm_audio.training.loggers import JSONLLogger, PreviewFiles


class Diverged(RuntimeError):
    """Raised after `max_bad_steps` steps in a row without a finite loss; the last checkpoint is untouched."""


class Trainer:
    """Trains an objective to `max_steps`; running it again in the same folder continues.

    optimizer: a partial of a torch optimiser over a player's parameters.
    lr_schedule: factor on the optimiser's learning rate, a function of the step.
    save_weights: `(objective, folder)`, writes the networks' own weights files, averaged weights swapped in.
    loggers: extra ones, beside `metrics.jsonl` and the files of the previews.
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
        self.stop_signal: int | None = None

    def fit(
        self, objective: Objective, train_batches: Callable[[int], Iterable], val_batches: Iterable
    ) -> float:
        """Trains from the last checkpoint, or from nothing, and returns the best monitored value.

        train_batches(step) yields the batches from that step on; with accumulation, `accumulate` of them
        make one step. Raises SystemExit(128 + its number) after a signal that stopped the run, and Diverged.
        """
        self._set_up(objective)
        if self.step >= self.max_steps:
            tqdm.write(f"{self.folder}: finished at step {self.step}; raise trainer.max_steps to go on")
            return self.best
        if self.step == 0:
            with self._autocast():
                objective.prepare(self._moved(islice(train_batches(0), self.prepare_batches)))
        self.metrics = JSONLLogger(self.folder / "metrics.jsonl", start_step=self.step)
        self.loggers = [self.metrics, PreviewFiles(self.folder / "previews"), *self.extra_loggers]
        try:
            with self._signals():
                self._run(train_batches, val_batches)
        finally:
            self.bar.close()
            for logger in self.loggers:
                logger.close()
        if self.stop_signal is not None and self.step < self.max_steps:
            raise SystemExit(128 + self.stop_signal)
        return self.best

    def _set_up(self, objective: Objective) -> None:
        check_players(objective)
        if self.accumulate > 1 and not objective.accumulable:
            raise InputError(f"trainer.accumulate={self.accumulate}: {type(objective).__name__} takes only 1")
        self.objective = objective.to(self.device).train()
        self.players = objective.players()
        self.optimizers = {name: self.optimizer(parameters) for name, parameters in self.players.items()}
        self.base_lr = {name: opt.param_groups[0]["lr"] for name, opt in self.optimizers.items()}
        self.ema = EMA(objective.averaged(), decay=self.ema_decay)
        for network in objective.networks().values():
            if self.activation_checkpointing and hasattr(network, "set_activation_checkpointing"):
                network.set_activation_checkpointing(True)
            if self.compile:
                network.compile()
        self.step, self.best, self.bad_steps = 0, math.inf, 0
        if self.last.exists():
            self._restore(load_checkpoint(self.last))
        self.logged_step = self.step

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.pt"

    def _run(self, train_batches: Callable[[int], Iterable], val_batches: Iterable) -> None:
        self.bar = tqdm(
            total=self.max_steps,
            initial=self.step,
            desc=self.folder.name,
            position=self.bar_position,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 20.0,  # a log file wants few lines
            smoothing=0.05,
        )
        batches = self._moved(train_batches(self.step * self.accumulate))
        since, waited = time.perf_counter(), 0.0
        while self.step < self.max_steps and self.stop_signal is None:
            before = time.perf_counter()
            micro_batches = list(islice(batches, self.accumulate))
            waited += time.perf_counter() - before
            logs = self._train_step(micro_batches)
            self.step += 1
            self.bar.update()
            if self.step % self.log_every == 0 or self.step == self.max_steps:
                elapsed = time.perf_counter() - since
                logs |= {
                    "items_per_second": self._items(micro_batches) * self._steps_since_log() / elapsed,
                    "waiting_share": waited / elapsed,
                }
                self._log(logs)
                since, waited = time.perf_counter(), 0.0
            if self.step % self.validate_every == 0 or self.step == self.max_steps:
                self._validate(val_batches)
                since = time.perf_counter()
            if self.step % self.save_every == 0:
                self._save()
        if self.step % self.save_every:
            self._save()
        if self.step < self.max_steps:
            tqdm.write(f"{self.folder}: stopped at step {self.step}; the same command continues")
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
            turns = self.objective.losses(batch, self.step)
            while (turn := self._next(turns)) is not None:
                player, loss, logs = turn
                if not torch.isfinite(loss):
                    return self._skip_step(player, logs)
                (loss / len(micro_batches)).backward()
                for key, value in logs.items():
                    sums[f"train/{key}"] = sums.get(f"train/{key}", 0.0) + value.detach() / len(micro_batches)
                if place == len(micro_batches):
                    norm = self._clip(player)
                    if not torch.isfinite(norm):
                        return self._skip_step(player, {"gradient": norm})
                    self.optimizers[player].step()
                    self.optimizers[player].zero_grad(set_to_none=True)
                    sums[f"grad_norm/{player}"] = norm
        self.bad_steps = 0
        ema_decay = self.ema.update()
        return sums | {"lr_factor": factor, "ema_decay": ema_decay}

    def _next(self, turns: Iterator) -> tuple[str, Tensor, Logs] | None:
        with self._autocast():
            return next(turns, None)

    def _clip(self, player: str) -> Tensor:
        """Scales the player's gradients to at most `clip_norm`; their norm before that."""
        limit = self.clip_norm if self.clip_norm is not None else math.inf
        return torch.nn.utils.clip_grad_norm_(self.players[player], limit)

    def _skip_step(self, player: str, terms: Logs) -> Logs:
        """Names the terms that are not finite and counts them; this player and those after it do not move."""
        self.bad_steps += 1
        bad = [name for name, value in terms.items() if not torch.isfinite(value)] or ["loss"]
        message = f"step {self.step}: {player}: {', '.join(bad)} not finite"
        if self.bad_steps >= self.max_bad_steps:
            raise Diverged(f"{message}, {self.bad_steps} steps in a row; last checkpoint: {self.last}")
        tqdm.write(f"{message}; step skipped")
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

    def _steps_since_log(self) -> int:
        return self.step - self.logged_step

    def _items(self, micro_batches: list[dict]) -> int:
        return sum(len(batch["item"]) for batch in micro_batches)

    @torch.no_grad()
    def _validate(self, val_batches: Iterable) -> None:
        self.objective.eval()
        sums: dict[str, float] = {}
        count, first = 0, None
        with self.ema.swapped(), self._autocast():
            for batch in self._moved(val_batches):
                first = first or batch
                rows = len(batch["item"])
                for key, value in self.objective.validate(batch).items():
                    sums[key] = sums.get(key, 0.0) + float(value) * rows
                count += rows
            previews = self.objective.preview(first) if first else {}
        self.objective.train()
        metrics = {f"val/{key}": total / count for key, total in sums.items()}
        previews = {name: detached(preview) for name, preview in previews.items()}
        for logger in self.loggers:
            logger.log(self.step, metrics)
            if previews:
                logger.preview(self.step, previews)
        value = metrics.get(self.objective.monitor, math.inf)
        if value < self.best:
            self.best = value
            self._write_weights("best")

    def _save(self) -> None:
        """Weights files first, then the state: killed in between, a run repeats steps and loses nothing.

        In a row of bad steps nothing is written, for the state may be what makes them bad.
        """
        if self.bad_steps:
            tqdm.write(f"{self.folder}: not saved at step {self.step}, which was bad")
            return
        self._write_weights("weights")
        state = {
            "step": self.step,
            "best": self.best,
            "objective": self.objective.learned_state(),
            "optimizers": {name: opt.state_dict() for name, opt in self.optimizers.items()},
            "ema": self.ema.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }
        save_checkpoint(self.last, state)

    def _write_weights(self, name: str) -> None:
        with self.ema.swapped():
            self.save_weights(self.objective, self.folder / name)

    def _restore(self, state: dict) -> None:
        self.objective.load_learned_state(state["objective"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.ema.load_state_dict(state["ema"])
        self.step, self.best = state["step"], state["best"]
        torch.set_rng_state(state["rng"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _moved(self, batches: Iterable[dict]) -> Iterator[dict]:
        return (to_device(batch, self.device) for batch in batches)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop the loop after the step in hand; a second one interrupts at once."""

        def ask(number, frame):
            if self.stop_signal is not None:
                raise KeyboardInterrupt
            self.stop_signal = number

        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def detached(preview):
    """The same preview in float32 on the CPU."""
    waveform = preview.waveform.detach().float().cpu() if preview.waveform is not None else None
    return type(preview)(preview.mel.detach().float().cpu(), waveform, preview.sample_rate)
