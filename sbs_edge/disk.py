"""Tell a full disk from other failures, whatever library reports it. Imports no torch."""

from __future__ import annotations

import errno

__all__ = ["lacks_space"]

# A quota, and a limit on the size of a file, stop a write like a full disk.
_NUMBERS = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
# safetensors quotes the system's error and its number; PyTorch's writers only say that writing failed.
_WORDS = (
    "no space left on device",
    "disk quota exceeded",
    "file too large",
    *(f"os error {number}" for number in _NUMBERS),
    "pytorchstreamwriter failed writing",
    "unexpected pos",
)


def lacks_space(error: BaseException) -> bool:
    """Return whether ``error``, or an error that it was raised from, is a write that found no space."""
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
