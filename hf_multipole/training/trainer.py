"""Trainer for language models: contexts that grow, exact figures, checkpoints that are complete or do not count."""

import functools
import shutil
import statistics
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import EarlyStoppingCallback, EvalPrediction, TrainerCallback
from transformers.trainer_utils import HubStrategy, rotate_checkpoints

from . import checkpoints
from .arguments import RunArguments
from .batches import MaskingCollator, shorten, warm_length
from .errors import one_line
from .evaluation import by_position
from .hub import push
from .metrics import row_figures, summarise
from .private import HookedTrainer


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


class _MaskEachEpochAnew(TrainerCallback):
    def __init__(self, collator: MaskingCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **kwargs):
        # The epoch is a fraction in the middle of one, where a run goes on.
        self.collator.epoch = int((state.epoch or 0) + 1e-6)


class _Clock(TrainerCallback):
    """Seconds of each step of this process, and its processor seconds, without evaluations and checkpoints."""

    def __init__(self):
        self.seconds, self.start = [], (0.0, 0.0)

    def _now(self, device: torch.device) -> tuple[float, float]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter(), time.process_time()

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self._now(args.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(tuple(end - start for end, start in zip(self._now(args.device), self.start)))
        left = state.max_steps - state.global_step
        # The first steps make room for their memory.
        if len(self.seconds) == 5 and left >= 50 and state.is_world_process_zero:
            step = statistics.median(seconds for seconds, _ in self.seconds)
            minutes = max(1, round(left * step / 60))
            print(f"a step takes {step:.2g} s: about {minutes} minutes for the {left:,} that are left, and the evaluations")


class LanguageModelTrainer(HookedTrainer):
    """Trainer for packed rows of one length.

    ``step_seconds`` are those of the steps that this process took, on the clock and of the processor, ``loss_by_position`` is that of
    the last evaluation (:func:`.evaluation.by_position`).

    Takes the arguments of Trainer, and:
        run_args: length warm-up and retries of uploads.
        context_length: tokens of a training row.
        causal: whether the labels are next tokens or masked ones.
        eval_lengths: held-out rows by context length, measured besides ``eval_dataset``.
        eval_collator: makes the batches that figures are measured on; by default as in training.
    """

    def __init__(self, *, run_args: RunArguments, context_length: int, causal: bool, eval_lengths=None, eval_collator=None, **options):
        super().__init__(
            **options,
            preprocess_logits_for_metrics=lambda logits, labels: row_figures(_first(logits), labels, causal),
            compute_metrics=lambda output: self._figures(output),
        )
        self.run_args, self.context_length, self.causal = run_args, context_length, causal
        self.eval_lengths, self.eval_collator = eval_lengths or {}, eval_collator or self.data_collator
        self._token_bytes: Any = None
        self.loss_by_position: list[dict[str, float]] = []
        clock = _Clock()
        self.step_seconds = clock.seconds
        self.add_callback(clock)
        if isinstance(self.data_collator, MaskingCollator):
            self.add_callback(_MaskEachEpochAnew(self.data_collator))

    # Training

    def is_over(self):
        patience = (callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback))
        spent = any(callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in patience)
        return spent or self.state.global_step >= self.state.max_steps

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        run = self.run_args
        if self.state.global_step < run.length_warmup_steps:
            length = warm_length(self.state.global_step, run.length_warmup_steps, run.length_warmup_start, self.context_length)
            epoch_iterator = map(functools.partial(shorten, length=length), epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # Evaluation

    def get_eval_dataloader(self, eval_dataset=None):
        training = self.data_collator
        self.data_collator = self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    def evaluate(self, eval_dataset: Dataset | None = None, ignore_keys=None, metric_key_prefix="eval"):
        self._token_bytes = (eval_dataset or self.eval_dataset).with_format("numpy")["token_bytes"][:]
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if eval_dataset is None:
            for length, rows in self.eval_lengths.items():
                self._token_bytes = rows.with_format("numpy")["token_bytes"][:]
                loader = self.get_eval_dataloader(rows)
                output = self.evaluation_loop(loader, f"Evaluation at {length}", metric_key_prefix=f"{metric_key_prefix}_{length}")
                self.log(output.metrics)
                metrics |= output.metrics
        return metrics

    def evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"):
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        # Trainer's own is a mean over rows, which may have unlike numbers of labels.
        exact = output.metrics.pop(f"{metric_key_prefix}_mean_loss", None)
        if exact is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = exact
        return output

    def _figures(self, output: EvalPrediction) -> dict[str, float]:
        nats, predictions = output.predictions
        counted = output.label_ids != -100
        # Without a text before it, the first token is not predicted.
        counted[:, 0] &= not self.causal
        self.loss_by_position = by_position(nats.sum(0, dtype=np.float64), counted.sum(0))
        # An incomplete last batch may have been dropped.
        return summarise(nats, predictions, output.label_ids, self._token_bytes[: len(nats)], self.causal)

    # Checkpoints

    def write_checkpoint(self, folder, write):
        # Trainer removes old checkpoints before the new one is complete: that waits until it is.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.args.should_save:
                checkpoints.clear(folder)
            self.accelerator.wait_for_everyone()
            write()
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.mark(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            last = next(iter(checkpoints.complete(folder.parent)), None)
            rest = f"the newest complete one is {last}" if last else "there is no complete one yet"
            free = shutil.disk_usage(folder.parent).free / 1e6
            raise CheckpointError(f"{folder} could not be written, with {free:.0f} MB free: {one_line(error)}; {rest}") from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            # By step: the clock may have been ahead.
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint)

    def push_checkpoint(self, folder):
        if self.args.hub_strategy == HubStrategy.EVERY_SAVE:
            try:
                push(folder, self.args, f"Training, step {self.state.global_step}", self.run_args.hub_retries)
            except OSError as error:
                # Training goes on: the last upload, at the end, is the one that counts.
                print(f"the checkpoint of step {self.state.global_step} was not uploaded: {one_line(error)}")


def _first(logits) -> torch.Tensor:
    """The logits, where a model returns more than them."""
    # Models with experts give the loss of their routers first.
    return next(x for x in logits if isinstance(x, torch.Tensor) and x.dim() == 3) if isinstance(logits, tuple) else logits
