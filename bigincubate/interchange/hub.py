"""Push an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ConfigError, HubError
from ..storage.run_directory import EXPORTED_FILES

MAX_REASON = 300  # characters of the hub's message that are shown


def check_repository(name: str) -> None:
    """Check the name of a repository.

    Raises:
        ConfigError: The hub has no repositories of such a name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ConfigError(f"--push-to-hub {name}: expected OWNER/NAME, of letters, digits, single '-' and '.', and '_'")


def check_license(name: str) -> None:
    """Check the name of a license. The hub has a list of them, which it checks itself.

    Raises:
        ConfigError: It cannot be in that list.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise ConfigError(f"--license {name}: expected a name that the hub knows, such as apache-2.0, mit or cc-by-4.0")


def push_folder(folder: Path, name: str, *, private: bool = False) -> str:
    """Push the files of an exported model to a repository in one commit. A missing repository is created.

    Other files in the folder are not pushed, and other files in the repository stay as they are.

    Args:
        folder: The exported folder.
        name: Name of the repository, ``OWNER/NAME``.
        private: Whether the repository is private.

    Returns:
        The URL of the commit.

    Raises:
        ConfigError: The repository exists and is public instead of private, or the other way around.
        HubError: There is no token, or the hub cannot be reached or refuses the request.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    from .. import __version__

    if get_token() is None:
        raise HubError(f"{name} was not pushed: no token of the hub; set HF_TOKEN, or log in with: hf auth login")
    api, failed = HfApi(library_name="bigincubate", library_version=__version__), f"{name} was not pushed"
    try:
        try:
            found = bool(api.model_info(name).private)
        except RepositoryNotFoundError:
            # None: what the organization has chosen, which is public unless it says otherwise
            api.create_repo(name, private=private or None, exist_ok=True)
            failed += ", but its repository was created"
        else:
            _check_visibility(name, found=found, private=private)
        files = list(EXPORTED_FILES)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=f"Export of bigincubate {__version__}",
            allow_patterns=files,
            delete_patterns=files,  # those of an earlier export that this one does not have
        )
    except ConfigError:
        raise
    except HfHubHTTPError as error:
        raise HubError(f"{failed}: {_describe_refusal(error)}") from None
    except Exception as error:  # of the library for HTTP, which depends on the version of huggingface_hub
        raise HubError(f"{failed}: {api.endpoint}: {_describe_failure(error)}") from None
    return str(commit.commit_url)


def _check_visibility(name: str, *, found: bool, private: bool) -> None:
    if private and not found:
        raise ConfigError(f"{name} was not pushed: it exists and is public; change that on the hub, or omit --private")
    if found and not private:
        raise ConfigError(f"{name} was not pushed: it exists and is private; add --private, or change that on the hub")


def _describe_refusal(error: Exception) -> str:
    """Return what a response of the hub with an error means, and what to do."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    message = getattr(error, "server_message", None) or error
    hints = {401: "; check the token with: hf auth whoami", 403: "; use a token that may write to this repository"}
    return f"the hub answers {status}: {_one_line(message)}{hints.get(status or 0, '')}"


def _describe_failure(error: BaseException) -> str:
    """Return the first cause of an error, such as ``Connection refused``."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return _one_line(getattr(error, "strerror", None) or error)


def _one_line(message: object) -> str:
    text = " ".join(str(message).split())
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}…"
