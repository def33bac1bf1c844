"""The hub's interface, and what it refuses said in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bonetune.errors import BonetuneError, InputError, RunError, first_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
# By status: what went wrong, and what to do.
_BY_STATUS = {
    401: f"asks who you are, or does not know your token: {_LOG_IN}",
    402: "asks for a paid plan",
    403: f"does not let you do that: {_LOG_IN} to a token that may write there",
    413: "finds a file too large",
    429: "has had too many requests from you: wait a while",
}


@contextmanager
def connected(repo: str, endpoint: str | None = None) -> Iterator["HfApi"]:
    """Yield the hub's interface; what goes wrong with it inside the block becomes one clear error.

    Args:
        repo: the repository that is spoken of.
        endpoint: the hub's address; None: $HF_ENDPOINT, or huggingface.co.

    Raises:
        InputError: a repository that does not exist or is closed, a token that is missing or too weak, no connection, or
            answers that are not a hub's.
        RunError: a file that cannot be read or written on the way.
    """
    from huggingface_hub import HfApi, errors

    try:
        yield HfApi(endpoint=endpoint, library_name="bonetune")
    except BonetuneError:
        raise
    except (OSError, errors.HTTPError, ValueError, LookupError, TypeError, AssertionError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise RunError(f"Repository {repo!r}: {error.strerror} ({error.filename}).") from error
        raise InputError(f"Repository {repo!r}: {_what_went_wrong(error)}.") from error


def _what_went_wrong(error: Exception) -> str:
    from huggingface_hub import errors

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:  # uploads wrap what happened to them
        causes.append(cause)
    for known in causes:
        match known:
            case errors.HFValidationError():
                return f"that is no name of a repository ({first_line(known)})"
            case errors.OfflineModeIsEnabled():
                return "HF_HUB_OFFLINE is set: unset it"
            case errors.GatedRepoError():
                return f"it is gated: ask for access on its page, then {_LOG_IN}"
            case errors.RevisionNotFoundError():
                return "it has no such revision"
            case errors.RepositoryNotFoundError():
                return f"there is none of that name, or it is private: {_LOG_IN}, if it is yours"
            case errors.HfHubHTTPError():
                status = known.response.status_code
                return f"the hub {_BY_STATUS.get(status, f'answered {status} ({first_line(known)})')}"
            case errors.HTTPError():  # of the library that huggingface_hub speaks HTTP with
                return f"the hub cannot be reached ({first_line(known)}): check the connection and HF_ENDPOINT"
    return f"the hub's answer is none that huggingface_hub understands ({first_line(error)})"
