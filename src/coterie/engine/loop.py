"""The loop that trains any task: steps, evaluations, checkpoints, and going on where a run stopped.

Everything that happens is a function of (configuration, step): the order and the augmentation of the pictures (see
the loader), random draws (`seed_step`), the learning rate. So the weights, the optimizer's moments, the moving average
and the step are all that a checkpoint needs for a killed run to end with the very weights of the unbroken one.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save as tensors_to_bytes
from torch import nn

from coterie.attention import MovingCentroids, follow_learning_rate, initialize_centroids
from coterie.data.packing import TokenLoader
from coterie.engine import checkpoint
from coterie.engine.batches import rows, split, to_device
from coterie.engine.config import RunConfig, check, settled, with_task_defaults
from coterie.engine.distributed import (
    any_rank,
    make_accelerator,
    on_main,
    seed_step,
    synchronize_batch_norm,
)
from coterie.engine.evaluation import Evaluation, evaluate_split
from coterie.engine.files import atomic_write
from coterie.engine.inputs import build_loader, monitored_split, open_source, settle_config, source_info
from coterie.engine.interrupt import Interrupt
from coterie.engine.logs import Logs, read_events
from coterie.engine.optim import build_optimizer, learning_rate, set_learning_rate
from coterie.engine.progress import Progress
from coterie.engine.runs import (
    create_run,
    make_task,
    resolve_run,
    run_tokenizer,
    write_environment,
    write_source,
)
from coterie.engine.window import NonFiniteLoss, NonFiniteStep, Window
from coterie.tasks import Batch

BEFORE_TRAINING = 2**31 - 1  # the step under which initial weights are drawn; no run gets there


@dataclass
class RunResult:
    """What a run came to.

    Attributes:
        run_dir: The run folder.
        step: Optimizer steps done.
        metrics: Figures of the test split at the end; empty when interrupted.
        seconds: Wall time of this start.
        interrupted: Whether the run was stopped by Ctrl-C, after a checkpoint.
        main: Whether this process is the one that writes and prints.
    """

    run_dir: Path
    step: int
    metrics: dict[str, float]
    seconds: float
    interrupted: bool = False
    main: bool = True


def train(config: RunConfig, *, resume: bool = False, show: Callable[[RunConfig], str] | None = None) -> RunResult:
    """Train as `config` says, into its run folder.

    Args:
        config: The run. With `resume`, fields left at their defaults are taken from the run folder.
        resume: Go on from the latest whole checkpoint of the run folder (from the beginning if there is none yet).
        show: Makes the text that is printed first, once, of the configuration that is trained with.

    Raises:
        ValueError, FileNotFoundError: the configuration or the data cannot be used; nothing has been written.
        StorageError: the disk refused; earlier checkpoints are intact.
        NonFiniteLoss: training diverged.
    """
    check(config)
    accelerator = make_accelerator(config.train)
    config = with_task_defaults(on_main(accelerator, lambda: resolve_run(config, resume)))
    trainer = Trainer(config, accelerator, resume)
    on_main(accelerator, lambda: create_run(trainer.config, resume))
    if show and accelerator.is_main_process:
        print(show(trainer.config))
    return trainer.run(resume)


class Trainer:
    """One run in progress. Building it opens the data and the model, and writes nothing."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, resume: bool = False) -> None:
        self.accelerator = accelerator
        self.run_dir, self.checkpoints = config.run_dir, config.run_dir / "checkpoints"
        self.source = open_source(config, run_tokenizer(self.run_dir) if resume else None)
        self.config = config = settle_config(config, self.source)
        self.info = source_info(self.source, config)
        self.task = make_task(config, self.info)
        self.epochs = settled(config.train.epochs, "train.epochs")
        self.batch_size = settled(config.train.batch_size, "train.batch_size")
        self.peak_rate = settled(config.optim.lr, "optim.lr")
        self.monitored = monitored_split(self.source)
        self.loader = build_loader(self.source, "train", self.info, config, accelerator)
        self.test_loaders = {
            split: build_loader(self.source, split, self.info, config, accelerator, train=False)
            for split in {self.monitored, "test"}
        }
        self.epoch_steps = self.loader.num_batches()
        self.steps = self.epochs * self.epoch_steps
        self.eval_steps = max(round(config.output.eval_every * self.epoch_steps), 1)
        self._build_model()
        self.step = 0
        self.best: dict[str, Any] | None = None  # step and figure of the best evaluation
        self.final: Evaluation | None = None  # of the last epoch
        self.unit, self.units = self.task.unit, self.batch_size * self._units_per_row()
        self.window = Window(accelerator, self.unit)

    def _build_model(self) -> None:
        config, accelerator = self.config, self.accelerator
        seed_step(config.train.seed, BEFORE_TRAINING, 0)  # the same weights on every rank
        model = self.task.build_model(config.model, self.info).to(accelerator.device)
        has_centroids = any(isinstance(module, MovingCentroids) for module in model.modules())
        if has_centroids and config.model.centroid_init == "data":
            # The first global batch, whole, on every rank: all start from the same centroids.
            first = next(build_loader(self.source, "train", self.info, config).batches(0, 0, train=True))
            first = to_device(first, accelerator.device)
            masks: Any = {"mask": first["mask"]} if "mask" in first else {}
            initialize_centroids(getattr(model, "backbone", model), first["image"], **masks)
        if accelerator.num_processes > 1:
            model = synchronize_batch_norm(model, accelerator.device)
        self.average = None
        if config.optim.ema_decay:
            from timm.utils import ModelEmaV3

            # Warm-up: a young average follows the weights closely; its decay is a function of the step.
            self.average = ModelEmaV3(model, decay=config.optim.ema_decay, use_warmup=True)
        self.plain_optimizer = build_optimizer(model, config.optim)
        if has_centroids:
            follow_learning_rate(model, self.plain_optimizer)
        self.plain_model = model.train()
        self.model, self.optimizer = accelerator.prepare(model, self.plain_optimizer)

    @property
    def answering_model(self) -> nn.Module:
        """The model that is evaluated and kept: the moving average where there is one."""
        return self.plain_model if self.average is None else self.average.module

    # The course of a run

    def run(self, resume: bool) -> RunResult:
        """Train to the end, or to a Ctrl-C."""
        start = time.monotonic()
        if resume:
            self._restore()
        main = self.accelerator.is_main_process
        if main:
            write_source(self.run_dir, self.info)
            write_environment(self.run_dir, self.accelerator.device, self.accelerator.num_processes)
        self.progress = Progress(self.steps, self.step, unit=self.unit, visible=main)
        self.logs = Logs(self.run_dir, self.step) if main else None
        self._announce()
        try:
            with Interrupt() as self.interrupt, self.progress:
                interrupted = self._train()
            metrics = {} if interrupted else self._finish()
        finally:
            if self.logs:
                self.logs.close()
            for loader in (self.loader, *self.test_loaders.values()):
                loader.close()
        return RunResult(self.run_dir, self.step, metrics, time.monotonic() - start, interrupted, main)

    def _announce(self) -> None:
        parameters = sum(parameter.numel() for parameter in self.plain_model.parameters())
        self.progress.line(self.source.describe())
        where = f"{self.accelerator.num_processes} x {self.accelerator.device.type}"
        steps = f"{self.steps} steps of {self.units} {self.unit} on {where}"
        self.progress.line(f"{self.config.model.name}: {parameters:,} parameters, {steps}")
        facts = self.task.facts(self.plain_model)
        if facts:
            shown = (f"{name.replace('_', ' ')} {value:,}" for name, value in facts.items() if name != "parameters")
            self.progress.line("  ".join(shown))
            if self.logs and not self.step:
                self.logs.write("model", 0, 0, **facts)
        self.progress.line(f"run folder: {self.run_dir}")
        if self.step:
            self.progress.line(f"going on from step {self.step}")

    def _train(self) -> bool:
        """Train from `self.step` to the end; True when interrupted."""
        output = self.config.output
        while self.step < self.steps:
            epoch, start = divmod(self.step, self.epoch_steps)
            for batch in self.loader.batches(epoch, start, train=True):
                self._train_step(batch)
                self.progress.step(self.step, epoch, self.epochs)
                epoch_ends = self.step % self.epoch_steps == 0
                evaluating = self.step % self.eval_steps == 0 or self.step == self.steps
                logging = epoch_ends or evaluating or self.step % output.log_every == 0
                saving = output.checkpoint_every and self.step % output.checkpoint_every == 0
                if logging:  # finds a loss that is not finite, before anything is evaluated or kept
                    self._log_training(epoch)
                with self.window.pause():
                    if evaluating:
                        self._evaluate_monitored()
                    if epoch_ends or evaluating or saving:
                        self._save_checkpoint()
                # Ranks may see the signal at different steps, so they ask one another; not at every step, it costs.
                alone = self.accelerator.num_processes == 1
                if (alone or logging) and any_rank(self.accelerator, self.interrupt.requested):
                    self._save_checkpoint()
                    return self.step < self.steps
        return False

    def _train_step(self, batch: Batch) -> None:
        """One optimizer step on this rank's share of a global batch, in `accumulate` parts."""
        config, accelerator = self.config, self.accelerator
        seed_step(config.train.seed, self.step, accelerator.process_index)
        batch = self.task.prepare_batch(to_device(batch, accelerator.device))
        set_learning_rate(self.plain_optimizer, self._learning_rate())
        parts = split(batch, min(config.train.accumulate, rows(batch)))
        total = torch.zeros((), device=accelerator.device)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    loss = self.task.loss(self.model, part)["loss"]
                loss = loss * (rows(part) / rows(batch))
                accelerator.backward(loss)
            total = total + loss.detach()
        norm = accelerator.clip_grad_norm_(self.model.parameters(), config.optim.clip_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average is not None:
            self.average.update(self.plain_model, step=self.step)
        self.window.add(total, norm)

    def _learning_rate(self) -> float:
        schedule = self.config.schedule
        warmup = round(settled(schedule.warmup_epochs, "schedule.warmup_epochs") * self.epoch_steps)
        return learning_rate(self.step, self.steps, warmup, self.peak_rate, schedule)

    def _evaluate_monitored(self) -> None:
        """Evaluate, log what came out and a sample of what the model makes, and keep track of the best."""
        self.final = self._evaluate(self.monitored, collect=self.step == self.steps)
        figures, name = self.final.figures, self.task.summary
        if self.best is None or self._is_better(figures[name], self.best[name]):
            self.best = {"step": self.step, name: figures[name]}
        done, sample = round(self.step / self.epoch_steps, 4), None
        if self.logs:
            sample = self.task.sample(self.answering_model, self.config.train.seed)
            made = {} if sample is None else {"sample": sample}
            self.logs.write("eval", self.step, done, split=self.monitored, **figures, **made)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in figures.items())
        self.progress.line(f"epoch {done:g}/{self.epochs}  {self.monitored}: {shown}")
        if sample is not None:
            self.progress.line(indent(sample, "    "))

    def _is_better(self, figure: float, than: float) -> bool:
        return figure > than if self.task.larger_is_better else figure < than

    def _units_per_row(self) -> int:
        return self.loader.length if isinstance(self.loader, TokenLoader) else 1

    def _evaluate(self, split: str, *, collect: bool) -> Evaluation:
        batches = self.test_loaders[split].batches(0, 0, train=False)
        return evaluate_split(self.task, self.answering_model, batches, self.accelerator, collect=collect)

    def _finish(self) -> dict[str, float]:
        """Write what a finished run leaves: weights, and what the model says about each sample of the test split."""
        done = self.final
        if done is None or self.monitored != "test":
            done = self._evaluate("test", collect=True)
        if self.logs:
            bad = {
                name: reason
                for loader in (self.loader, *self.test_loaders.values())
                for name, reason in loader.bad.items()
            }
            if bad:
                self.logs.write("data", self.step, self.epochs, bad_samples=bad)
            if self.monitored != "test" and not any(event["event"] == "test" for event in read_events(self.run_dir)):
                self.logs.write("test", self.step, self.epochs, split="test", **done.figures)
            weights = checkpoint.storable(self.answering_model.state_dict())
            atomic_write(self.run_dir / "model.safetensors", tensors_to_bytes(weights))
            buffer = io.BytesIO()
            np.savez_compressed(buffer, allow_pickle=False, **done.samples)
            atomic_write(self.run_dir / "predictions.npz", buffer.getvalue())
        self.accelerator.wait_for_everyone()
        return done.figures

    def _log_training(self, epoch: int) -> None:
        try:
            values = self.window.close(self.units)
        except NonFiniteStep as found:
            raise self._divergence(found) from None
        values["lr"] = self.plain_optimizer.param_groups[0]["lr"]
        if self.logs:
            self.logs.write("train", self.step, round(self.step / self.epoch_steps, 4), **values)
        self.progress.status(self.step, epoch, self.epochs, values)

    def _divergence(self, found: NonFiniteStep) -> NonFiniteLoss:
        config, last = self.config, checkpoint.latest(self.checkpoints)
        hints = [f"lower optim.lr (now {self.peak_rate:g})"]
        if not config.optim.clip_norm:
            hints.append("clip gradients (optim.clip_norm 1)")
        if config.train.precision != "no":
            hints.append(f"train without {config.train.precision}")
        if (config.schedule.warmup_epochs or 0) < 1:
            hints.append("warm up longer")
        return NonFiniteLoss(
            f"the {found.what} became {found.value} at step {self.step - found.back} of {self.steps}; "
            f"last good checkpoint: {last or 'none yet'}; {', or '.join(hints)}, in a new run"
        )

    # Checkpoints

    def _save_checkpoint(self) -> None:
        try:
            unlogged = self.window.fetch()
        except NonFiniteStep as found:
            raise self._divergence(found) from None
        if self.accelerator.is_main_process:
            tensors = {
                "model": self.plain_model.state_dict(),
                "optimizer": checkpoint.optimizer_tensors(self.plain_model, self.plain_optimizer),
            }
            if self.average is not None:
                tensors["average"] = self.average.module.state_dict()
            scaler = self.accelerator.scaler
            state = {"best": self.best, "unlogged": unlogged, "scaler": scaler.state_dict() if scaler else None}
            checkpoint.save(self.checkpoints, self.step, tensors, state)
            checkpoint.prune(self.checkpoints, self.config.output.keep, self.best["step"] if self.best else None)
        self.accelerator.wait_for_everyone()

    def _restore(self) -> None:
        """Go back to the latest whole checkpoint; without one, stay at the beginning."""
        path = checkpoint.latest(self.checkpoints)
        state = checkpoint.read_state(path) if path else None
        if path is None or state is None:
            return
        checkpoint.load_weights(self.plain_model, checkpoint.read_tensors(path, "model") or {}, path)
        if self.average is not None:
            checkpoint.load_weights(self.average.module, checkpoint.read_tensors(path, "average") or {}, path)
        optimizer = checkpoint.read_tensors(path, "optimizer") or {}
        checkpoint.restore_optimizer(self.plain_model, self.plain_optimizer, optimizer)
        if state["scaler"] and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.best = state["step"], state["best"]
        self.window.restore(state["unlogged"])
        set_learning_rate(self.plain_optimizer, self._learning_rate())
