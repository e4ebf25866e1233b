"""Bounded reading of zip archives, the containers of .npz and PyTorch files."""

import io
from typing import Any
import zipfile

from taskexpert_jax.errors import UserError

# Weights hardly compress. A file that expands further was made to fill the memory, or holds constants only.
_EXPANSION, _ALLOWANCE = 16, 32 * 2**20


class Archive:
    """Members of a zip archive by name; their sizes are checked before anything is decompressed."""

    def __init__(self, data: bytes, *, stored: bool) -> None:
        """Checks the directory of the archive.

        Args:
          data: the file.
          stored: whether members must be uncompressed.

        Raises:
          UserError: members of equal names, encrypted, compressed by another method than deflate, or too large.
        """
        self._archive = zipfile.ZipFile(io.BytesIO(data))
        members = self._archive.infolist()
        self._members = {member.filename: member for member in members}
        if len(self._members) < len(members):
            raise UserError("two of its members have the same name; save it again")
        methods = {zipfile.ZIP_STORED} if stored else {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
        if any(member.flag_bits & 1 or member.compress_type not in methods for member in members):
            wanted = "uncompressed" if stored else "without a password, uncompressed or by numpy.savez_compressed"
            raise UserError(f"encrypted, or compressed by another method than expected; save it again {wanted}")
        size = sum(member.file_size for member in members)
        if size > _EXPANSION * len(data) + _ALLOWANCE:
            raise UserError(
                f"expands from {len(data) / 2**20:.1f} MiB to {size / 2**20:.0f} MiB, which weights do not; if you "
                "trust the file, save it again without compression (numpy.savez, torch.save)"
            )

    @property
    def names(self) -> list[str]:
        """Names of the members, in the order of the archive."""
        return list(self._members)

    def read(self, name: str) -> bytes:
        """A member's content; never more than the directory states, whatever its data expand to."""
        member = self._members[name]
        with self._archive.open(member) as file:
            content = file.read(member.file_size)  # unlike read(), decompresses no further
        if len(content) < member.file_size:
            raise ValueError("a member is cut short")
        return content

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *_: Any) -> None:
        self._archive.close()
