"""Telling a disk that is full from other failures, whatever library met it. No torch here."""

from __future__ import annotations

import errno

__all__ = ["lacks_space"]

# A quota and a limit on the size of a file end a write as a full disk does.
_NUMBERS = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
# safetensors quotes the system's error and its number; PyTorch's writers say no more than that writing failed.
_WORDS = (
    "no space left on device",
    "disk quota exceeded",
    "file too large",
    *(f"os error {number}" for number in _NUMBERS),
    "pytorchstreamwriter failed writing",
    "unexpected pos",
)


def lacks_space(error: BaseException) -> bool:
    """Tell whether ``error``, or what it was raised from, is a write for which there was no room."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        if isinstance(at, OSError) and at.errno in _NUMBERS:
            return True
        if any(word in str(at).lower() for word in _WORDS):
            return True
        at = at.__cause__ or at.__context__
    return False
