"""The arguments of training runs, beyond Transformers' TrainingArguments. Light to import: their words are the help of the commands."""

import dataclasses
from dataclasses import dataclass, field

import yaml

from ..modeling.options import nearest

# What Transformers' example scripts call it.
_OTHER_NAMES = {
    "block_size": "context_length",
    "max_seq_length": "context_length",
    "overwrite_output_dir": "resume_from_checkpoint",
    "use_auth_token": "hub_token",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
}


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "checkpoint to start from; a new model by default"})
    model_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a checkpoint on the Hub"})
    model_type: str = field(default="multipole", metadata={"help": "kind of a new model, as Transformers names it: multipole, llama, bert"})
    config_overrides: dict | str | None = field(
        default=None, metadata={"help": "fields of a new model's configuration, a YAML mapping such as '{hidden_size: 128}'"}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "tokenizer folder or Hub name; by default the checkpoint's, and bytes (ByT5) for a new model"}
    )
    new_tokenizer_size: int | None = field(
        default=None,
        metadata={"help": "tokens of a new model's tokenizer, a byte-level BPE that is learned from the start of the training text"},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "attention of Transformers' interface: multipole, sdpa, eager; the model's own by default"}
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of the parameters: float32, bfloat16 or auto (the checkpoint's)"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the code that a checkpoint brings"})
    convert: dict | str | None = field(
        default=None,
        metadata={
            "help": "turns a checkpoint's attention into another kind: {kind: multipole, block_size: 64, rank: 4}, or adds to it: "
            "{kind: tensor, tensor_window: [32, 512]}"
        },
    )

    def __post_init__(self):
        from transformers import CONFIG_MAPPING  # seconds

        self.config_overrides = mapping(self.config_overrides, "config_overrides", "{hidden_size: 128}")
        self.convert = mapping(self.convert, "convert", "{kind: multipole, block_size: 64}")
        if self.model_type not in CONFIG_MAPPING:
            raise ValueError(f"model_type {self.model_type!r} is unknown{suggestion(self.model_type, CONFIG_MAPPING)}")
        known = {f.name for f in dataclasses.fields(CONFIG_MAPPING[self.model_type])}
        check_names(self.config_overrides, known, "config_overrides")
        if self.dtype not in ("float32", "bfloat16", "auto"):
            raise ValueError(f"dtype is {self.dtype!r}, but must be float32, bfloat16 or auto")
        if self.new_tokenizer_size is not None:
            # All bytes, and what is no text: padding, end of text, mask.
            check_integers(self, 259, "new_tokenizer_size")
            for other in ("tokenizer_name", "model_name_or_path"):
                if getattr(self, other):
                    raise ValueError(f"new_tokenizer_size makes a tokenizer, but {other} names one: give one of the two")
        if self.model_name_or_path and self.config_overrides:
            raise ValueError("config_overrides describe a new model, but model_name_or_path names a checkpoint: give one of the two")


@dataclass
class DataArguments:
    """What it is trained on: a dataset of the Hub, local files, or a folder of Python source text."""

    dataset_name: str | None = field(default=None, metadata={"help": "dataset on the Hub, or a folder that load_dataset reads"})
    dataset_config_name: str | None = field(default=None, metadata={"help": "configuration of the dataset"})
    dataset_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the dataset"})
    train_split_name: str = field(default="train", metadata={"help": "split to train on; slices such as 'train[:90%%]' are allowed"})
    validation_split_name: str | None = field(
        default=None,
        metadata={"help": "split to measure on; 'validation' by default, and where there is none a share of the training text"},
    )
    streaming: bool = field(default=False, metadata={"help": "read the training text while training; needs max_steps"})
    train_file: list[str] | None = field(default=None, metadata={"help": "text, JSON, CSV or Parquet files to train on"})
    validation_file: list[str] | None = field(default=None, metadata={"help": "files of the same kind to measure on"})
    train_folder: str | None = field(
        default=None, metadata={"help": "folder of Python source text; 'stdlib' is the standard library of this interpreter"}
    )
    text_column: str = field(default="text", metadata={"help": "column or field that holds the text"})
    sample_by: str = field(default="document", metadata={"help": "a row of a text file is a document (the whole file), paragraph or line"})
    rows_are_documents: bool = field(
        default=True, metadata={"help": "each row is a document and gets an end-of-text token; otherwise rows are pieces of one text"}
    )
    document_boundaries: bool = field(default=False, metadata={"help": "no attention across the documents of a block"})
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "share of the training text that is held out, at its end, where there is no validation split"}
    )
    context_length: int = field(default=4096, metadata={"help": "tokens in a row (block)"})
    eval_rows: int = field(default=16, metadata={"help": "held-out rows that the curve is measured on"})
    test_rows: int = field(default=64, metadata={"help": "held-out rows that the final figure is measured on, besides those of the curve"})
    eval_context_lengths: list[int] | None = field(
        default=None, metadata={"help": "further context lengths to measure the held-out text at"}
    )

    def __post_init__(self):
        check_integers(self, 2, "context_length")
        check_integers(self, 1, "eval_rows", "test_rows")
        if isinstance(self.eval_context_lengths, int):
            self.eval_context_lengths = [self.eval_context_lengths]
        for length in self.eval_context_lengths or ():
            if not isinstance(length, int) or length < 2:
                raise ValueError(f"eval_context_lengths has {length!r}, but lengths are integers of at least 2")
        for name in ("train_file", "validation_file"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        sources = [name for name in ("dataset_name", "train_file", "train_folder") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(f"{' and '.join(sources)} are given, but the training text has one source: give one of them")
        if not sources:
            raise ValueError("there is no training text: give dataset_name, train_file or train_folder (stdlib for Python's own source)")
        if self.validation_file and not self.train_file:
            raise ValueError("validation_file goes with train_file; with dataset_name, give validation_split_name")
        if self.sample_by not in ("document", "paragraph", "line"):
            raise ValueError(f"sample_by is {self.sample_by!r}, but must be document, paragraph or line")
        if self.document_boundaries and not self.rows_are_documents:
            raise ValueError("document_boundaries needs documents, but rows_are_documents is false")
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(f"validation_split_percentage is {self.validation_split_percentage}, but must lie between 0 and 100")


@dataclass
class RunArguments:
    """How it is trained, beyond TrainingArguments."""

    length_warmup_steps: int = field(
        default=0, metadata={"help": "steps with shorter contexts at the start, which double up to context_length; as many tokens a step"}
    )
    length_warmup_start: int = field(
        default=256, metadata={"help": "context of the first step of the length warm-up: context_length, halved a few times"}
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "stop after so many evaluations without a better metric_for_best_model"}
    )
    hub_retries: int = field(default=3, metadata={"help": "how often an upload is tried again after a failure of the network"})

    def __post_init__(self):
        check_integers(self, 0, "length_warmup_steps", "hub_retries")
        check_integers(self, 2, "length_warmup_start")
        if self.early_stopping_patience is not None:
            check_integers(self, 1, "early_stopping_patience")


@dataclass
class MaskingArguments:
    """What is masked in masked language modelling."""

    mlm_probability: float = field(default=0.15, metadata={"help": "share of the tokens that are to be predicted"})

    def __post_init__(self):
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability is {self.mlm_probability}, but must lie between 0 and 1")


def mapping(value: dict | str | None, name: str, example: str) -> dict:
    """A mapping, from YAML text where it comes from the command line."""
    try:
        value = (yaml.safe_load(value) if isinstance(value, str) else value) or {}
    except yaml.YAMLError:
        pass  # told below
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a YAML mapping such as '{example}', but is {value!r}")
    return value


def check_integers(arguments, least: int, *names: str) -> None:
    """Raises ValueError for a field that is no integer of at least ``least``."""
    for name in names:
        value = getattr(arguments, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}, but must be " + {0: "0 or more", 1: "positive"}.get(least, f"at least {least}"))


def suggestion(name: str, known) -> str:
    """What to add to a message about an unknown name: the nearest known one, or what it is called here."""
    other = _OTHER_NAMES.get(name)
    return f"; did you mean {other!r}?" if other in known else nearest(name, known)


def check_names(given, known, where: str) -> None:
    """Raises ValueError for the first unknown name, with the nearest known one."""
    for name in given:
        if name not in known:
            raise ValueError(f"{where} has an unknown key {name!r}{suggestion(name, known)}")
