"""What is used of Trainer's inside, which Transformers may change: each by a name of our own, and checked with versions 5.23 and 5.24."""

from pathlib import Path

from transformers import PreTrainedModel, Trainer

# What Trainer calls inside itself, and with which arguments; a test compares them with the Transformers that is installed.
CHECKED = {
    "_run_epoch": None,  # passed on, whatever they are
    "_save_checkpoint": ["self", "model", "trial"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_issue_warnings_after_load": ["self", "load_result"],
    "_get_output_dir": ["self", "trial"],
    "save_model": ["self", "output_dir", "_internal_call"],
}


class HookedTrainer(Trainer):
    """Trainer with hooks for subclasses: ``is_over``, ``write_checkpoint``, ``push_checkpoint``."""

    def is_over(self) -> bool:
        """Whether there is no step left to take at the start of an epoch."""
        return False

    def write_checkpoint(self, folder: Path, write) -> None:
        """Writes a checkpoint into ``folder`` by ``write()``."""
        write()

    def push_checkpoint(self, folder: Path) -> None:
        """Uploads a checkpoint, where that was asked for; on the first process."""

    def save_final(self) -> None:
        """Saves the model into output_dir, without an upload."""
        self.save_model(_internal_call=True)

    def _run_epoch(self, *arguments, **options):
        if self.is_over():
            # Interrupted after its last step: Trainer would take one more.
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*arguments, **options)

    def _save_checkpoint(self, model, trial):
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        write = super()._save_checkpoint
        self.write_checkpoint(folder, lambda: write(model, trial))

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.is_world_process_zero():
            self.push_checkpoint(Path(checkpoint_folder))

    def _issue_warnings_after_load(self, load_result):
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, PreTrainedModel):
            # One tensor under two names is saved under one.
            tied = set(model.all_tied_weights_keys)
            load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)
