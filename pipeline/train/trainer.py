"""The updates of a learner, step by step, and its state in checkpoints."""

import contextlib
import math
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from firstlight.pipeline.config.optim import build_optimizer, build_schedule
from firstlight.pipeline.errors import StopTraining
from firstlight.pipeline.files import write_atomically, write_json
from firstlight.pipeline.train.accelerator.fused_updates import adapt_optimizer_state, choose_fused
from firstlight.pipeline.train.backward_pass import BackwardPass
from firstlight.pipeline.train.checkpoint import OTHER_STATE_ADVICE, Checkpoint, Checkpoints, refuse_other_state
from firstlight.pipeline.train.metrics import DROPPED_IDS_FILE, METRICS_FILE, append_row
from firstlight.pipeline.train.selection import WeightSelection, best_folder
from firstlight.pipeline.train.training_job import TrainingJob
from firstlight.pipeline.train.update_guard import UpdateGuard
from firstlight.pipeline.train.weight_average import WeightAverage
from firstlight.tasks.collective import all_sum, broadcast_object, gather_objects, rank, world_size
from firstlight.tasks.device.timer import time_part
from firstlight.tasks.learner import Batch, Learner

MIN_CHECKPOINT_AGE_S = 20.0
# The images of a step whose loss is not finite.
NONFINITE_FILE = "nonfinite.json"
MAX_IDS_LISTED = 8


class Trainer:
    """A learner with its optimiser, schedule and checkpoints."""

    def __init__(self, job: TrainingJob, learner: Learner) -> None:
        self.job, self.learner = job, learner
        learner.move_to_device(job.device)
        if job.training.channels_last:
            learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        learner.train()
        if job.training.compile:
            learner.compile_networks()
        training, groups, exempt = job.training, learner.parameter_groups(), learner.list_undecayed_parameters()
        spec = choose_fused(training.optimizer, job.device)
        self.optimizer = build_optimizer(spec, groups, training.learning_rate, exempt)
        # The weight decay of each group at the start. Groups without one are exempt.
        self.first_decays = [float(group.get("weight_decay", 0.0)) for group in self.optimizer.param_groups]
        self.per_epoch = training.schedule is not None and training.schedule.interval == "epoch"
        length, epoch_length = (job.num_epochs, 1) if self.per_epoch else (job.total_steps, job.plan.steps)
        self.schedule = build_schedule(training.schedule, self.optimizer, length, epoch_length)
        self.average = WeightAverage(learner, training.ema) if training.ema is not None else None
        self.selection = WeightSelection(job.selection) if job.selection is not None else None
        self.backward = BackwardPass(job, learner, self._judge_loss)
        # () float64 on the device: that of the last step, and the sum over the steps of the epoch so far.
        self.step_loss, self.epoch_loss = torch.zeros(2, dtype=torch.float64, device=job.device).unbind()
        self.guard = UpdateGuard(
            learner,
            self.optimizer,
            lambda: self.average.list_values() if self.average is not None else [],
            job.device,
            # A scaled loss has a verdict of its own.
            is_fused=not self.backward.scaler.is_enabled() and all(g.get("fused") for g in self.optimizer.param_groups),
        )
        self.checkpoints = Checkpoints(job.folder / "checkpoints")
        self.saved_at = time.monotonic()
        # Number of steps.
        self.num_done = 0

    @property
    def num_rows(self) -> int:
        """Returns the number of images of a global batch that this worker gets."""
        return self.job.plan.batch_size // world_size()

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Makes one update, and returns the losses. `step` counts from 0 over the whole training.

        On a GPU the host does not look at the loss: see `stop_unless_finite`.

        Raises:
            StopTraining: on all ranks, before the update: the loss of one rank is not finite, on a CPU.
        """
        self.guard.begin_step()
        self.optimizer.zero_grad(set_to_none=True)
        self.learner.begin_step(step)
        losses, scaler = self.backward.compute_gradients(batch, step), self.backward.scaler
        with time_part("optimizer"):
            if self.job.training.clip_norm is not None:
                scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.learner.parameters(), self.job.training.clip_norm)
            self._set_weight_decay(step)
            scaler.step(self.optimizer)
            scaler.update()
            self._advance_schedule(step + 1)
            if self.average is not None:
                self.average.update(step)
        self.learner.end_step()
        self.guard.end_step()
        self.num_done = step + 1
        return losses

    def _set_weight_decay(self, step: int) -> None:
        """Moves the weight decay from its first value to `weight_decay_end` by half a cosine (DINO, appendix A)."""
        end = self.job.training.optimizer.weight_decay_end
        if end is None:
            return
        passed = (1.0 - math.cos(math.pi * step / self.job.total_steps)) / 2.0
        for group, first in zip(self.optimizer.param_groups, self.first_decays, strict=True):
            if first:
                group["weight_decay"] = first + (end - first) * passed

    def _advance_schedule(self, done: int) -> None:
        ends_epoch = done % self.job.plan.steps == 0
        if isinstance(self.schedule, ReduceLROnPlateau):
            # The host must know the loss to choose a rate.
            if not self.per_epoch:
                self.stop_unless_finite()
                self.schedule.step(float(self.step_loss))
            elif ends_epoch:
                self.stop_unless_finite()
                self.schedule.step(float(self.epoch_loss) / self.job.plan.steps)
        elif ends_epoch or not self.per_epoch:
            self.schedule.step()
        if ends_epoch:
            self.epoch_loss.zero_()

    def _judge_loss(self, loss: Tensor, batch: Batch, step: int) -> None:
        """Judges the loss of all ranks, and keeps its average, by which all detect a plateau at once. It is collective.

        Raises:
            StopTraining: as `step`.
        """
        broken = ~torch.isfinite(loss.detach())
        mean, broken_somewhere = (
            all_sum(torch.stack((loss.detach().double(), broken.double()))) / world_size()
        ).unbind()
        self.guard.judge_losses(broken_somewhere > 0, broken, batch.ids, step)
        self.step_loss.copy_(mean)
        self.epoch_loss += mean
        if self.guard.sees_break:
            self.guard.undo_step()
            self.stop_unless_finite()

    def stop_unless_finite(self) -> None:
        """Reads whether a loss was not finite so far. It is collective.

        From such a step on nothing has changed: weights, teachers, averages, running statistics and tables are those
        from before it. On a GPU this waits for the device: the loop calls it where it reads from there anyway, and it
        is called before every checkpoint.

        Raises:
            StopTraining: on all ranks: the loss of one rank was not finite; names the step, and its images on that
                rank.
        """
        found = self.guard.read_verdict()
        # The verdict is the same on all ranks.
        if found is None:
            return
        step, own_ids = found
        self.num_done = step
        ids = sorted(i for part in gather_objects(own_ids) for i in part)
        file = self.job.folder / NONFINITE_FILE
        if rank() == 0:
            write_json(file, {"step": step, "ids": ids})
        listing = ", ".join(map(str, ids[:MAX_IDS_LISTED])) + (", ..." if len(ids) > MAX_IDS_LISTED else "")
        raise StopTraining(
            f"{self.job.folder.name}: the loss of step {step} is not finite; nothing was updated by it. "
            f"Its {len(ids)} image ids: {listing} (all in {file}). A lower optimizer.lr is the usual remedy"
        )

    def is_checkpoint_due(self, step: int) -> bool:
        """Returns True if a checkpoint is due after `step` steps, the same on all workers. It changes no result.

        It is due every `checkpoint_every` steps; if that is 0, at the end of an epoch if the last one is old enough.
        """
        if self.job.training.checkpoint_every:
            return step % self.job.training.checkpoint_every == 0
        return step % self.job.plan.steps == 0 and bool(
            broadcast_object(time.monotonic() - self.saved_at > MIN_CHECKPOINT_AGE_S)
        )

    @time_part("checkpoint")
    def save_checkpoint(self, step: int) -> None:
        """Writes a checkpoint. It is collective."""
        self._write_checkpoint(self.checkpoints, step)
        self.saved_at = time.monotonic()

    @time_part("checkpoint")
    def save_best(self, step: int) -> None:
        """Writes the checkpoint of the best weights so far, and deletes that of the best before. It is collective."""
        self._write_checkpoint(self.best_checkpoints, step)

    def _write_checkpoint(self, checkpoints: Checkpoints, step: int) -> None:
        self.stop_unless_finite()
        shared = {
            "model": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch_loss": float(self.epoch_loss),
        }
        shared |= {name: part.state_dict() for name, part in self._list_parts().items()}
        shard = {name: table.state_dict() for name, table in self.learner.tables.items()}
        versions = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        for line in checkpoints.save(step, shared, shard, {"plan": self.job.plan.key, **versions}):
            append_row(self.job.folder, {"note": line})

    def _list_parts(self) -> dict[str, Any]:
        """Returns what only some trainings have, and keep in their checkpoints, by its name there."""
        parts: dict[str, Any] = {"scaler": self.backward.scaler, "average": self.average, "selection": self.selection}
        return {name: part for name, part in parts.items() if part is not None and part.state_dict()}

    @property
    def best_checkpoints(self) -> Checkpoints:
        """The checkpoint of the best weights so far."""
        return Checkpoints(best_folder(self.job.folder), keep=1)

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Returns a block in which the learner has the averaged weights, if the training keeps an average."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def load_final_weights(self) -> None:
        """Gives the learner the weights to hand on: the best or the last, averaged or not. It is collective.

        Raises:
            StopTraining: the checkpoint of the best weights is lost.
        """
        if self.selection is not None and self.selection.options.keeps_best:
            found, _ = self.best_checkpoints.read_newest()
            if found is None or found.step != self.selection.best_step:
                raise StopTraining(
                    f"{best_folder(self.job.folder)}: the best weights, of step {self.selection.best_step}, are not "
                    f"there; delete {self.job.folder} to train from the beginning"
                )
            self._load_state(found)
        if self.average is not None:
            self.average.exchange_weights()

    def resume_training(self) -> tuple[int, list[str]]:
        """Loads the newest checkpoint. Returns the number of steps done, and notes for the user. It is collective."""
        found, damage = self.checkpoints.read_newest()
        notes = [f"skipped a damaged checkpoint: {line}" for line in damage]
        if found is None:
            return self._warm_start(self.job.warm_start) if self.job.warm_start else (0, notes)
        self._check_plan(found, self.job.folder)
        self._load_state(found)
        self.num_done = found.step
        if (
            found.meta.get("threads") != torch.get_num_threads()
            or found.meta.get("torch") != torch.__version__
            or found.meta["world"] != world_size()
        ):
            change = "continued with another number of workers, threads or version of torch"
            notes.append(f"{change}: the result is not bit-identical to an uninterrupted training")
        if found.step < self.job.total_steps:
            notes.append(f"continued from the checkpoint of step {found.step} of {self.job.total_steps}")
        return found.step, notes

    def _check_plan(self, found: Checkpoint, folder: Path) -> None:
        if found.meta.get("plan") != self.job.plan.key:
            raise StopTraining(
                f"{folder}: its checkpoint was made with other images or another order; "
                "delete the folder to train from the beginning"
            )
        if found.step > self.job.total_steps:
            raise StopTraining(f"{found.folder}: the training has {self.job.total_steps} steps; {OTHER_STATE_ADVICE}")

    def _warm_start(self, other: Path) -> tuple[int, list[str]]:
        """Continues another training with the settings of this one. Returns the same as `resume_training`.

        The learning rate is that of this training's schedule at the step of the other one.
        """
        found, damage = Checkpoints(other / "checkpoints").read_newest()
        if found is None:
            raise StopTraining(f"{other}: has no checkpoint to continue from")
        self._check_plan(found, other)
        options = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        schedule = self.schedule.state_dict()
        self._load_state(found)
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        self.schedule.load_state_dict(schedule)
        # torch warns of steps of the schedule without steps of the optimiser.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(found.step // self.job.plan.steps if self.per_epoch else found.step):
                self.schedule.step()
        if rank() == 0:
            for name in (METRICS_FILE, DROPPED_IDS_FILE):
                if (other / name).exists():
                    write_atomically(self.job.folder / name, (other / name).read_bytes())
            if best_folder(other).exists():
                shutil.copytree(best_folder(other), best_folder(self.job.folder), dirs_exist_ok=True)
        note = f"continues another training at step {found.step} of {self.job.total_steps}, with other settings"
        return found.step, [*(f"skipped a damaged checkpoint: {line}" for line in damage), note]

    def _load_state(self, found: Checkpoint) -> None:
        with refuse_other_state(found):
            self.learner.load_state_dict(found.shared["model"])
            self.optimizer.load_state_dict(adapt_optimizer_state(found.shared["optimizer"], self.optimizer))
            self.schedule.load_state_dict(found.shared["schedule"])
            self.epoch_loss.fill_(float(found.shared["epoch_loss"]))
            for name, part in self._list_parts().items():
                part.load_state_dict(found.shared[name])
            for name, table in self.learner.tables.items():
                table.load_state_dicts([shard[name] for shard in found.shards])
