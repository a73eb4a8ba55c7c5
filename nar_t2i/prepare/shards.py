"""Writing shards: whole or not at all, and the same shards from the same input."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from nar_t2i.data.shard_index import Row, index_path, open_index, write_index
from nar_t2i.errors import UserError
from nar_t2i.files import sync_folder, temporary_name


class ShardFile:
    """One tar of captioned images with its index. Nothing bears its name before `finish`, which leaving a `with` calls.

    path: of the tar; keys must be unique within it and hold no dot.
    """

    def __init__(self, path: Path):
        self._path = path
        self._temporary = temporary_name(path)
        self._file = open(self._temporary, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._rows: list[Row] = []

    def add(self, key: str, image: bytes, suffix: str, captions: Sequence[str], scalars: dict[str, float], name: str = "") -> None:
        """Append a sample.

        image: encoded bytes; suffix: "jpg", "png" or "webp". scalars: numbers such as original_width.
        name: what the sample was called where it came from, for people.
        """
        captions = [" ".join(caption.split()) for caption in captions]  # as reading does, so that both indices agree
        fields = {"key": key, "name": name, "caption": captions[0], "captions": captions, **scalars}
        offset = self._member(f"{key}.{suffix}", image)
        self._member(f"{key}.txt", captions[0].encode())
        self._member(f"{key}.json", json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        self._rows.append(Row(key, offset, len(image), captions, scalars))

    def finish(self) -> None:
        """Close the tar, bring it to disk and give it its name; then write the index."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index_path(self._path).unlink(missing_ok=True)  # of an older tar with this name
        os.replace(self._temporary, self._path)
        sync_folder(self._path.parent)
        write_index(self._path, self._rows, [])

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.finish()
        else:
            self.abandon()

    def abandon(self) -> None:
        """Throw away what was written."""
        try:
            self._file.close()  # which may still have to write
        finally:
            self._temporary.unlink(missing_ok=True)

    def _member(self, name: str, data: bytes) -> int:
        """Append a file; returns the offset of its bytes."""
        member = tarfile.TarInfo(name)  # its time is 0, so that the same input gives the same bytes
        member.size = len(data)
        offset = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(member, io.BytesIO(data))
        return offset


def is_finished(path: Path) -> bool:
    """Whether a tar and its index are there and belong together."""
    try:
        if not (path.exists() and index_path(path).exists()):
            return False
        open_index(path)
    except UserError:
        return False
    return True
