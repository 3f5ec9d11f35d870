"""What the Hub, or the way to it, answers when something goes wrong, as one line for a user."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from arriero.errors import ArrieroError, FormatError

# How the messages begin, after the name, that say that the Hub has given nothing of it.
NOT_FOUND = ("the Hub (", "there is no such model", "is not in the local cache")


@contextlib.contextmanager
def hub_errors(hub_id: str, doing: str, after: str) -> Iterator[None]:
    """Turn every failure of a Hub call in the block into a `FormatError` of one line.

    Args:
        hub_id: the repository `owner/name`.
        doing: what is tried, as a noun: download, upload.
        after: what to do about a failure that names no cause of its own, such as a broken transfer.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except ArrieroError:
        raise
    except errors.GatedRepoError as error:
        raise FormatError(
            f"{hub_id}: is gated; accept its licence at {constants.ENDPOINT}/{hub_id} and {_login()}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FormatError(f"{hub_id}: has no such revision (branch, tag or commit) on the Hub") from error
    except errors.RepositoryNotFoundError as error:
        raise FormatError(
            f"{hub_id}: there is no such model on the Hub, or it is private; check the name and {_login()}"
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise FormatError(
            f"{hub_id}: is not in the local cache and HF_HUB_OFFLINE forbids the {doing}; unset it, or give a local folder"
        ) from error
    except errors.HfHubHTTPError as error:
        reason = {401: f"does not accept the token; {_login()}", 403: "does not allow this to the token's account"}
        status = error.response.status_code
        if status not in reason:
            raise FormatError(f"{hub_id}: the {doing} failed ({_line(error)}); {after}") from error
        said = error.response.headers.get("X-Error-Message")
        raise FormatError(
            f"{hub_id}: the Hub {reason[status]}{f' ({_line(said)})' if said else ''}"
            + ("; give the token that right at " + constants.ENDPOINT + "/settings/tokens" if status == 403 else "")
        ) from error
    except Exception as error:
        # What a failing transfer raises (httpx, httpx2, requests, xet, the file system) differs between versions.
        if is_unreachable(error) or is_unreachable(error.__cause__):
            instead = ", or give a local folder" if doing == "download" else ""
            raise FormatError(
                f"{hub_id}: the Hub ({constants.ENDPOINT}) cannot be reached; check the network{instead}"
            ) from error
        raise FormatError(f"{hub_id}: the {doing} failed ({_line(error)}); {after}") from error


def is_unreachable(error: BaseException | None) -> bool:
    """Whether no connection was made at all, whichever HTTP library says so."""
    return type(error).__name__ in {"ConnectError", "ConnectTimeout", "ConnectionError", "ProxyError"}


def _login() -> str:
    """How to be let in: a token that is there has to be another one."""
    from huggingface_hub import get_token

    return "give another token by HF_TOKEN or `hf auth login`" if get_token() else "log in: HF_TOKEN or `hf auth login`"


def _line(said: object) -> str:
    return " ".join(str(said).split())[:200]
