"""The state of the training on one rank: everything that a checkpoint saves."""

import torch

from app.data.sequences import BatchPlan
from app.distributed.world import World
from app.hardware.device import Device
from app.model.architectures import build_config, build_model
from app.runs.checkpoint_state import CheckpointState, PendingWork
from app.runs.code import code_hashes, source
from app.runs.provenance import versions
from app.settings.settings import Settings
from app.train.loss_scale import LossScale
from app.train.lr_schedule import LRSchedule
from app.train.optimizer import build_optimizers
from app.train.start import Start
from app.train.time_limit import planned_steps


class TrainingState:
    """The model, its optimizers, and how far the run has come.

    Attributes:
        plan: how a step's sequences are divided
        model, optimizers: loaded from the checkpoint from which the run continues, if there is one
        loss_scale: None without loss scaling, which only fp16 needs
        schedule: the learning rate, and with it the number of steps
        planned_steps: steps of the whole run, if a time limit has decided them
        steps_completed: 0, or the checkpoint's, until the first step of this start is done
        val_loss: held-out loss of these weights; None if it was not measured
        val_tokens: on how many tokens it was measured
        pending: work of the last step that a stop has left
        origin, initial_weights: see CheckpointState
    """

    def __init__(
        self,
        settings: Settings,
        start: Start,
        plan: BatchPlan,
        device: Device,
        world: World,
    ) -> None:
        cfg = settings.train
        self._settings, self._identity, self._versions = settings, start.identity, versions()
        self.plan = plan
        torch.manual_seed(cfg.seed)
        self.model = build_model(
            build_config(settings.model.shape()),
            bf16_residual=cfg.residual == "bf16",
            zero_init=cfg.zero_init,
        ).to(device.torch_device)
        self.model.recompute = cfg.recompute == "true"
        self.optimizers = build_optimizers(self.model, cfg, device.dtype)
        if cfg.shard_optimizer and world.size > 1:
            from app.train.sharded_optimizer import ShardedOptimizers

            self.optimizers = ShardedOptimizers(self.optimizers)
        if start.checkpoint:
            start.checkpoint.load(self.model, self.optimizers)
        elif start.weights and world.is_rank_zero:
            # Before the first step, DataParallelLoss broadcasts them to the other ranks.
            start.weights.load(self.model)
        before = start.checkpoint.state if start.checkpoint else None
        self.planned_steps = planned_steps(settings, before)
        self.schedule = LRSchedule.from_settings(
            cfg, before.warmup_steps if before else None, self.planned_steps
        )
        self.loss_scale = LossScale() if device.precision == "fp16" else None
        if self.loss_scale and before and before.loss_scale:
            self.loss_scale = LossScale(before.loss_scale, before.loss_scale_updates)
        self.steps_completed = before.step if before else 0
        self.val_loss = before.val_loss if before else None
        self.val_tokens = before.val_tokens if before else None
        self.pending = before.pending if before else PendingWork()
        self.origin = before.origin if before else None
        self.initial_weights = before.initial_weights if before else None
        if start.weights:
            self.initial_weights = start.weights.name

    @property
    def is_last(self) -> bool:
        """Return True if the run has no step left."""
        return self.steps_completed >= self.schedule.max_steps

    def is_due(self, interval: int) -> bool:
        """Return True at multiples of an interval and after the last step; never for 0."""
        return bool(interval) and (self.is_last or self.steps_completed % interval == 0)

    def replan(self, steps: int) -> None:
        """Change the number of steps of the whole run."""
        cfg = self._settings.train
        self.schedule = self.schedule.replanned(cfg, self.steps_completed, steps)
        self.planned_steps = steps

    def for_checkpoint(self) -> CheckpointState:
        """Return the content of state.json, without the lengths of metrics and samples."""
        settings = self._settings
        return CheckpointState(
            step=self.steps_completed,
            micro_batch_size=self.plan.micro_batch_size,
            model=settings.model.shape(),
            settings=settings.public(),
            identity=self._identity.to_json(),
            versions=self._versions,
            source=source(),
            code_hashes=code_hashes(),
            sequences_consumed=self.steps_completed * self.plan.sequences_per_step,
            val_loss=self.val_loss,
            val_tokens=None if self.val_loss is None else self.val_tokens,
            pending=self.pending,
            warmup_steps=self.schedule.warmup_steps,
            cooldown_start=self.schedule.cooldown_start,
            planned_steps=self.planned_steps,
            loss_scale=self.loss_scale.factor if self.loss_scale else None,
            loss_scale_updates=self.loss_scale.updates if self.loss_scale else 0,
            origin=self.origin,
            initial_weights=self.initial_weights,
        )
