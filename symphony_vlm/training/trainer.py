"""Hugging Face's Trainer with learning rates by module, an order of samples and a log of every part of the loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from symphony_vlm.data.augmentation import Augmentation
from symphony_vlm.data.conversation import IGNORE_INDEX
from symphony_vlm.data.grouping import EpochSampler
from symphony_vlm.errors import InputError
from symphony_vlm.moe.statistics import sum_over_processes
from symphony_vlm.text import nearest
from symphony_vlm.training.averaging import WeightAverage
from symphony_vlm.training.checkpoints import Checkpoints
from symphony_vlm.training.consumption import NOTES, Consumption
from symphony_vlm.training.engine import opening_accelerate
from symphony_vlm.training.gathering import is_sharded
from symphony_vlm.training.interruption import StopOnSignal
from symphony_vlm.training.monitor import StageMonitor
from symphony_vlm.training.profiling import StageProfile
from symphony_vlm.training.streamed import StreamedConversations
from symphony_vlm.training.validation import undisturbed

__all__ = ["AugmentationEpochs", "EpochOrder", "StageTrainer", "freeze_except", "parameter_groups"]


def freeze_except(model: nn.Module, rates: Mapping[str, float]) -> None:
    """Lets exactly those parameters train whose name begins with a key of ``rates``; ``*`` stands for one part of it.

    Raises:
        InputError: a key is the prefix of no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for prefix in rates:
        if not any(_has_prefix(name, prefix) for name in names):
            modules = sorted({name.split(".")[0] for name in names})
            raise InputError(
                f"{prefix!r} is no module of the model{nearest(prefix, modules)}",
                where="stage.train",
                remedy=f"Modules: {', '.join(modules)}, or a longer prefix of a parameter's name.",
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_rate(name, rates) is not None)


def parameter_groups(model: nn.Module, rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups by learning rate; biases, norms and other vectors are not decayed."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = _rate(name, rates)
            assert rate is not None
            groups[(rate, weight_decay if parameter.dim() >= 2 else 0.0)].append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]


def _has_prefix(name: str, prefix: str) -> bool:
    asked, found = _parts(prefix), _parts(name)
    return len(asked) <= len(found) and all(a in ("*", b) for a, b in zip(asked, found, strict=False))


def _parts(name: str) -> list[str]:
    return name.split(".") if name else []


def _rate(name: str, rates: Mapping[str, float]) -> float | None:
    if name == "image_newline" and name not in rates:
        name = "projector"  # with which it is learnt in LLaVA-NeXT, unless it has a rate of its own
    matching = [prefix for prefix in rates if _has_prefix(name, prefix)]
    # The longest, and of equally long ones the one with fewer stars.
    return rates[max(matching, key=lambda p: (len(_parts(p)), -_parts(p).count("*")))] if matching else None


def _share_of_step(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """How much of the optimizer step's supervised tokens a micro-batch has, see `model.loss.training_loss`."""
    return 1.0 if num_items_in_batch is None else (labels[:, 1:] != IGNORE_INDEX).sum() / num_items_in_batch


def _checkpoint_bytes(model: nn.Module) -> int:
    """Of the weights, and of AdamW's two moments of those that train. ZeRO-3 has the numbers elsewhere."""
    return sum(
        getattr(weight, "ds_numel", weight.numel()) * weight.element_size() * (3 if weight.requires_grad else 1)
        for weight in model.parameters()
    )


class EpochOrder(TrainerCallback):
    """Tells a sampler, or what changes pictures, which epoch begins.

    The data loader tells it too, but in a continued run with several processes its words stop at the wrapper that
    skips the batches already seen.
    """

    def __init__(self, sampler: EpochSampler | Augmentation) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """A continued epoch has a fraction."""
        self._sampler.set_epoch(int(state.epoch or 0))


class AugmentationEpochs(EpochOrder):
    """The same for what changes pictures; a class of its own, as a trainer takes one callback of each."""


class StageTrainer(Trainer):
    """Trainer of one stage.

    Args:
        rates: learning rate by module prefix; the empty prefix matches everything.
        sampler: the order of the training samples; None: at random.
        consumption: counts the records that are trained on.
        average: of the weights, which validation then uses.
        monitor: watches speed and finiteness.
        profiled: profiles some steps.
        checkpoints: saves them; None: as the Trainer does.
        callbacks: what happens beside.
    """

    control: TrainerControl

    def __init__(
        self,
        *args: Any,
        rates: Mapping[str, float],
        sampler: EpochSampler | None = None,
        consumption: Consumption | None = None,
        average: WeightAverage | None = None,
        monitor: StageMonitor | None = None,
        profiled: StageProfile | None = None,
        checkpoints: Checkpoints | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        self.optimizer: torch.optim.Optimizer | None = None
        self.checkpoints = checkpoints
        self.stop = StopOnSignal()
        super().__init__(*args, callbacks=[self.stop, *callbacks], **kwargs)
        self._rates = rates
        self._sampler = sampler
        if sampler is not None:
            self.add_callback(EpochOrder(sampler))
        self.consumption = consumption
        self.average = average
        self.monitor = monitor
        self._profiled = profiled
        # By name the weighted sum and the sum of weights: a micro-batch without images has no losses of layers there.
        self._parts: dict[str, Tensor] = {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with one group per learning rate."""
        if self.optimizer is None:
            groups = parameter_groups(model or self.model, self._rates, self.args.weight_decay)
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(
                groups, lr=self.args.learning_rate, betas=betas, eps=self.args.adam_epsilon, fused=True
            )
        return self.optimizer

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers, and what accelerate must be told about the engine."""
        with opening_accelerate(self.args):
            super().create_accelerator_and_postprocess()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The weights of a checkpoint; DeepSpeed and FSDP2 write theirs with the optimizer, once is enough."""
        if not is_sharded(self):
            super().save_model(output_dir, _internal_call)

    def open_finished(self, checkpoint: Path, max_steps: int) -> None:
        """Puts a finished stage's last checkpoint into the model. `train` would go on with one more step."""
        if is_sharded(self):
            self._prepare_for_training(max_steps, self.get_train_dataloader(), str(checkpoint))
        else:
            self._load_from_checkpoint(str(checkpoint))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return super()._get_train_sampler(train_dataset) if self._sampler is None else self._sampler

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A stream shards itself; anything else is sharded by accelerate."""
        if not isinstance(self.train_dataset, StreamedConversations):
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            # Its own, as a loader draws a number when it starts: a restart must not change the model's random state.
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of a step. One of placeholders only has no supervised token; its share is 0 and not 0/0."""
        profiled = nullcontext() if self._profiled is None else self._profiled.loading()
        with profiled, nullcontext() if self.monitor is None else self.monitor.throughput.loading():
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.monitor is not None:
            self.monitor.throughput.take([batch[NOTES]["sizes"] for batch in batches])
        if self.consumption is not None:
            self.consumption.take(batches, self.state.global_step + 1)
        # A whole number: FSDP2 casts every floating-point input of a model to 16 bits.
        return batches, num_items.long().clamp(min=1) if isinstance(num_items, Tensor) else num_items

    def _get_output_dir(self, trial: Any) -> str:
        """Where the Trainer writes its checkpoints."""
        return super()._get_output_dir(trial) if self.checkpoints is None else str(self.checkpoints.staging)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As in the Trainer, but a checkpoint is complete when the callbacks have added to it, or it is left out."""
        is_due = self.control.should_save and self.checkpoints is not None
        if is_due:
            self.control.should_save = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if is_due:
            assert self.checkpoints is not None
            size = _checkpoint_bytes(self.model)
            together = self._saves_together()
            self.checkpoints.save(self.state.global_step, self._write_checkpoint, size=size, collective=together)

    def _saves_together(self) -> bool:
        """Whether the processes wait for each other while they save."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _write_checkpoint(self) -> None:
        self._save_checkpoint(self.model, None)
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared: dict[str, Any] = super()._prepare_inputs({k: v for k, v in inputs.items() if k != NOTES})
        return prepared

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss; its parts are added up for the log."""
        watch = self.monitor.divergence if self.monitor is not None and model.training else None
        # FSDP2 gives blocks their weights in 16 bits, but leaves alone what a model does between them.
        autocast = torch.autocast(
            self.args.device.type, torch.bfloat16, enabled=self.is_fsdp_enabled and self.args.bf16
        )
        with nullcontext() if watch is None else watch.forward(self.state.global_step + 1), autocast:
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        parts = getattr(outputs, "loss_parts", None)
        if watch is not None:
            watch.note(loss, parts)
        if parts and model.training:
            # A micro-batch weighs in the parts as in the loss. Sums stay on the device; the log step reads them.
            share = _share_of_step(inputs["labels"], num_items_in_batch)
            for name, value in parts.items():
                new = torch.stack([share * value, torch.as_tensor(share, device=value.device, dtype=value.dtype)])
                self._parts[name] = self._parts[name] + new if name in self._parts else new
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss on the validation data. What trains is afterwards as it was, random states included."""
        average = nullcontext() if self.average is None else self.average.in_place(self.model)
        with undisturbed(self.model), average:
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint has every weight, or with adapters every one that trains; the Trainer would only warn."""
        needed = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        missing = [name for name in load_result.missing_keys if name in needed]
        if missing or load_result.unexpected_keys:
            names = ", ".join([*missing, *load_result.unexpected_keys][:3])
            raise InputError(
                f"the checkpoint does not fit the model: {len(missing)} weights missing, "
                f"{len(load_result.unexpected_keys)} unexpected ({names})",
                where=str(self.args.output_dir),
                remedy="Give another --output to begin anew.",
            )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The last moment before the optimizer moves."""
        norm = self._clip(model)
        if self.monitor is not None:
            self.monitor.divergence.check(model, norm, self.state.global_step + 1, is_taken=self.is_deepspeed_enabled)
        return norm

    def _clip(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the loss parts since the last log."""
        if "loss" in logs:
            # Of all processes, as the loss itself.
            sums = sum_over_processes({name: total_and_weight.cpu() for name, total_and_weight in self._parts.items()})
            self._parts = {}
            for name, (total, weight) in sums.items():
                if weight:
                    logs[name] = round(float(total / weight), 6)
            if self.consumption is not None:
                logs.update(self.consumption.log_entries())
            logs.update(self._rates_by_module(logs.get("learning_rate")))
            if self.monitor is not None:
                logs.update(self.monitor.log_entries(self.state.global_step))
        if isinstance(self.train_dataset, StreamedConversations):
            # A stream has no epochs; the share of the steps done is the same after a restart.
            self.state.epoch = self.state.global_step / self.state.max_steps
        super().log(logs, start_time)

    def _rates_by_module(self, rate: float | None) -> dict[str, float]:
        """Learning rates now, where there are several; the schedule multiplies all by the same factor."""
        if rate is None or len(self._rates) < 2 or self.optimizer is None:
            return {}
        group = self.optimizer.param_groups[0]
        peak = group.get("initial_lr", group["lr"])
        return {f"learning_rate/{name}": rate * own / peak for name, own in self._rates.items()} if peak else {}
