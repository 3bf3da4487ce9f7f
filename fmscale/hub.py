"""An export on its way to the Hugging Face hub, where a person asks for that."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fmscale.errors import OutageError, UserError
from fmscale.log import get_logger

log = get_logger(__name__)
TOKEN = "HF_TOKEN"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check_repository(name: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        UserError: says what is one.
    """
    if not REPOSITORY.fullmatch(name):
        raise UserError(f"--push: {name!r} is no repository on the hub; give OWNER/NAME")


def hub_token() -> str:
    """The token that the environment has; files of other programs are not looked at.

    Raises:
        UserError: it has none.
    """
    if not (token := os.environ.get(TOKEN, "")):
        raise UserError(f"--push: set {TOKEN} to a token of the Hugging Face hub that may write")
    return token


def push(folder: Path, repository: str, token: str) -> None:
    """Upload a folder to a model repository, which is made, and private, where there is none.

    Raises:
        OutageError: it did not get there; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Weights, exported by fmscale")
    except Exception as error:  # its client meets networks with many exceptions
        said = str(error).strip().split("\n")[0].replace(token, "…")
        raise OutageError(
            f"--push: {folder} is whole, but it did not get to {repository} ({said}); try again with: "
            f"hf upload {repository} {folder}"
        ) from None
    log.info("uploaded %s to %s", folder, repository)
