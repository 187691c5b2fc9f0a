"""A model of Hugging Face's hub by its name: huggingface_hub downloads it into the cache that it
shares with transformers.

The environment variables of huggingface_hub hold here too: HF_ENDPOINT, HF_TOKEN, HF_HOME,
HF_HUB_CACHE, HF_HUB_OFFLINE, … Files that are in the cache are not downloaded again, and without a
network the cache is enough.
"""

import glob
import http.client
from collections.abc import Sequence
from pathlib import Path


def snapshot(name: str, files: Sequence[str], revision: str = "main") -> Path:
    """The folder of the cache that has those of `files` that the repository has.

    `name` is "owner/repo", `revision` a branch, a tag or a commit; the folder's name is the commit.
    If this fails, raises ValueError, which says what happened and what to do about it.
    """
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise ValueError(
            f"there is no folder {name}, and a download by name needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from error
    patterns = [glob.escape(file) for file in files]  # names in an index may have a *
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise ValueError(
            f"{name!r} is neither a folder nor a repository: name a folder that exists, or "
            "owner/repo of letters, digits, '_', single '.' and '-'"
        ) from None
    except Exception as error:  # its own, the system's, those of httpx or (older) of requests
        reason, remedy = explain(error, constants.HF_HUB_OFFLINE)
        raise ValueError(
            f"cannot download {name} ({reason}): {remedy}, or name a folder that has its files"
        ) from error


def explain(error: Exception, offline: bool) -> tuple[str, str]:
    """(what happened, what to do about it) for an error of huggingface_hub."""
    chain = [error]
    while chain[-1].__cause__:
        chain.append(chain[-1].__cause__)
    response = next((e.response for e in chain if getattr(e, "response", None) is not None), None)
    if response is not None:
        code = response.status_code
        reason = f"the server answered {code} {http.client.responses.get(code, '')}".rstrip()
        if response.headers.get("X-Error-Code") == "GatedRepo":
            return reason, "accept its conditions on its page and set HF_TOKEN"
        if code in (401, 403, 404):
            return reason, "check the name, set HF_TOKEN if it is private"
        return reason, "try again later"
    if offline:
        return "HF_HUB_OFFLINE is set, and the cache does not have it", "unset HF_HUB_OFFLINE"
    reason = " ".join(str(chain[-1]).split())[:300] or type(chain[-1]).__name__
    if getattr(error, "errno", None) is not None:  # the disk's: network errors have none here
        return reason, "make space, or set HF_HOME to a folder that can be written to"
    return reason, "check the network, and HF_ENDPOINT if it is set"
