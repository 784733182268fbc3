"""Bundles on a model hub: fetch one by name, and publish one.

``huggingface_hub`` is a dependency of the tokenizers package. It is imported only to fetch or publish a bundle, so
opening a local bundle does not wait for it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sbs_edge import files
from sbs_edge.errors import DataError, IntegrityError, SbsEdgeError, UsageError
from sbs_edge.runtime.cache import cache_directory
from sbs_edge.runtime.integrity import verify_files
from sbs_edge.runtime.manifest import DIGEST, MANIFEST, read_manifest, safe_member, safe_name

__all__ = ["copy_bundle", "fetch", "upload"]


def copy_bundle(root: Path, out: Path, *, within: Path | None = None) -> None:
    """Write the files that the manifest lists, the manifest and its digest to ``out``, in one step.

    The copy is checked before it takes its name, so a damaged bundle never replaces a good one.

    Args:
        root: the bundle.
        out: the new directory; an earlier bundle there is replaced.
        within: follow links that end in this directory; None: refuse links.

    Raises:
        UsageError: ``out`` exists and is not a bundle, or lies inside ``root`` or around it.
        IntegrityError: a file is missing or lacks its digest, or a name or link leaves the directory.
    """
    source, target = root.resolve(), out.resolve()
    if source != target and (source in target.parents or target in source.parents):
        raise UsageError(
            f"{out} and the bundle {root} are inside each other; choose a directory beside the bundle."
        )
    files.check_replaceable(out, [MANIFEST], "bundle")

    def copy(name: str, work: Path) -> None:
        source = root / name if within is None and name in (MANIFEST, DIGEST) else _source(root, name, within)
        target = work / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    with files.atomic_directory(out) as work:
        copy(MANIFEST, work)
        copy(DIGEST, work)
        for name in read_manifest(work)["files"]:
            copy(name, work)
        try:
            verify_files(work, read_manifest(work)["files"])
        except IntegrityError as error:
            raise IntegrityError(str(error).replace(str(work), str(root))) from error


def _source(root: Path, name: str, within: Path | None) -> Path:
    if within is None:
        return safe_member(root, name)
    path = (root / name).resolve()
    if not safe_name(name) or not path.is_relative_to(within.resolve()) or not path.is_file():
        raise IntegrityError(
            f"The bundle {root} lists {name!r}, but that file is not in it. Publish the bundle again."
        )
    return path


def _is_name(name: str) -> bool:
    """Return whether ``name`` is ``owner/repository`` by the hub's rules."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not re-exported

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def fetch(name: str, revision: str | None = None, token: str | None = None) -> Path:
    """Download a bundle once; return a directory with its files and nothing else.

    Args:
        name: ``owner/repository`` on the hub.
        revision: branch, tag or commit; None: the main branch.
        token: for private repositories; None: the token that ``huggingface_hub`` finds by itself.

    Raises:
        UsageError: ``name`` is neither a directory nor a name on a hub.
        IntegrityError: the downloaded bundle is damaged.
        SbsEdgeError: the hub does not have the bundle, or cannot be reached and nothing is cached.
    """
    if not _is_name(name):
        raise UsageError(
            f"There is no bundle {name!r}: it is neither a directory nor a hub name of the form 'owner/repository'. "
            "Check the path, or make a bundle with sbs-edge export."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(name, revision=revision, token=token))
    except LocalEntryNotFoundError as error:
        raise SbsEdgeError(
            f"There is no directory {name!r}, the hub cannot be reached, and no earlier download of {name} was found. "
            "Check the path or the connection (HF_HUB_OFFLINE=1 forbids downloads)."
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise SbsEdgeError(
            f"There is no directory {name!r}, and the hub answered {status} for {name}"
            f"{f' at {revision!r}' if revision else ''}. Check the name; a private repository needs a token."
        ) from error
    if not (snapshot / MANIFEST).is_file():
        raise DataError(f"{name} on the hub is not a bundle: it has no {MANIFEST}.")
    # The hub's cache contains links, which a bundle must not have. The copy is named by the commit.
    place = cache_directory("hub") / name.replace("/", "--") / snapshot.name
    if not place.is_dir():
        copy_bundle(snapshot, place, within=snapshot.parents[1])
    return place


def upload(
    root: Path, name: str, *, private: bool = False, token: str | None = None, message: str = "Add a bundle"
) -> str:
    """Publish a bundle as one commit and return its URL; see :meth:`Student.push_to_hub`."""
    if not _is_name(name):
        raise UsageError(f"{name!r} is not a hub name of the form 'owner/repository'.")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    listed = read_manifest(root)["files"]
    verify_files(root, listed)
    wanted = [*listed, MANIFEST, DIGEST]
    api = HfApi(token=token)
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=str(root), allow_patterns=wanted, commit_message=message
        )
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise SbsEdgeError(
            f"The hub answered {status} to publishing {name}. Log in with `hf auth login`, or pass a token that may write."
        ) from error
    except _network_errors() as error:
        raise SbsEdgeError(f"The hub cannot be reached to publish {name}.") from error
    return str(commit.commit_url)


def _network_errors() -> tuple[type[Exception], ...]:
    """Return the errors of a failed connection: huggingface_hub uses requests before 1.0 and httpx from 1.0 on."""
    httpx = sys.modules.get("httpx")
    return (OSError,) if httpx is None else (OSError, httpx.TransportError)
