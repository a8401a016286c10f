"""Uploads to the Hub."""

import time
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import TrainingArguments

# Of the library that huggingface_hub speaks HTTP with: what goes wrong on the way to the server.
NETWORK_ERRORS = (OSError, *HfHubHTTPError.__bases__)
# Pickles, and what only training needs.
_STAYS_HERE = [
    "*.bin",
    "*.pt",
    "*.pth",
    "checkpoint-*",
    "_*",
    "*.part",
    "run.json",
    "complete.json",
    "trainer_state.json",
    "runs/*",
    "events.*",
]


def push(folder: Path, args: TrainingArguments, message: str, retries: int, wait: float = 1.0) -> str:
    """Uploads a checkpoint folder, in safetensors, to ``args.hub_model_id`` (by default its output folder's name).

    retries: how often it is tried again when the network or the Hub's server fails, each time after twice as many seconds.
    Returns the address of the commit. Raises OSError when it fails for good.
    """
    api = HfApi(token=args.hub_token)
    for left in range(retries, -1, -1):
        try:
            repo = api.create_repo(args.hub_model_id or Path(args.output_dir).absolute().name, private=args.hub_private_repo, exist_ok=True)
            if args.hub_revision:
                api.create_branch(repo.repo_id, branch=args.hub_revision, exist_ok=True)
            options = {"revision": args.hub_revision, "commit_message": message, "ignore_patterns": _STAYS_HERE}
            return api.upload_folder(repo_id=repo.repo_id, folder_path=folder, **options).commit_url
        except NETWORK_ERRORS as error:
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else 500
            # What the server refuses, it will refuse again.
            if left == 0 or (status < 500 and status != 429):
                raise OSError(f"the upload to the Hub failed: {error}") from error
            time.sleep(wait)
            wait *= 2
    raise AssertionError
