"""The filesystem that a path lies on: its type, and whether other machines can have the same files open.

SQLite's write-ahead log needs memory that all users of a database share, and locks that hold among them. Network
filesystems guarantee neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_MOUNT_TABLE = Path("/proc/self/mountinfo")
_ESCAPED = re.compile(r"\\([0-7]{3})")
_NETWORK = frozenset(
    {
        "9p", "acfs", "afs", "beegfs", "ceph", "cephfs", "cifs", "coda", "davfs", "gfs", "gfs2", "glusterfs", "gpfs",
        "juicefs", "kafs", "lustre", "mfs", "ncpfs", "nfs", "nfs3", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2",
        "quobyte", "smb2", "smb3", "smbfs", "sshfs", "virtiofs", "vboxsf", "wekafs",
    }
)  # fmt: skip
# Filesystems provided by programs are named after the program, e.g. ``fuse.sshfs``.
_NETWORK_PROGRAMS = frozenset(
    {
        "blobfuse", "blobfuse2", "curlftpfs", "dropbox", "gcsfuse", "geesefs", "goofys", "moosefs", "mount-s3",
        "mountpoint-s3", "rclone", "s3fs", "seaweedfs", "vmhgfs-fuse",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the mount table: filesystem ``kind``, seen at ``place``, mounted onto the mount ``parent``."""

    number: int
    parent: int
    place: PurePosixPath
    kind: str


def is_shared_over_network(kind: str | None) -> bool:
    """Whether a filesystem of this type reaches other machines; False where the type is not known."""
    if kind is None:
        return False
    name = kind.lower()
    for prefix in ("fuse.", "fuseblk."):
        if name.startswith(prefix):
            program = name.removeprefix(prefix)
            return program in _NETWORK_PROGRAMS or program in _NETWORK
    return name in _NETWORK


def mounted_kind(folder: Path) -> str | None:
    """Return the type of the filesystem that ``folder`` lies on; None where the system has no table of mounts."""
    try:
        # Names of mount points are bytes: a name that is not UTF-8 must neither fail nor equal another name.
        table = _MOUNT_TABLE.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    return kind_in(table, PurePosixPath(folder.resolve()))


def kind_in(table: str, path: PurePosixPath) -> str | None:
    """Return the type of the filesystem that ``path``, absolute and without links, lies on by a ``mountinfo`` table.

    Resolves the path as the system does: from the root down, into each mount on the way, and into mounts on top of it.
    So a hidden mount does not count. None when the table does not tell.
    """
    mounts = list(_mounts(table))
    numbers = {mount.number for mount in mounts}
    # Mounts of the root have a parent outside the table, or themselves.
    onto = [mount for mount in mounts if mount.parent not in numbers or mount.parent == mount.number]
    found: Mount | None = None
    while True:
        on_the_way = [mount for mount in onto if mount.place == path or mount.place in path.parents]
        if not on_the_way:
            return found.kind if found else None
        # The last of several mounts at one place lies on top.
        top = found = min(reversed(on_the_way), key=lambda mount: len(mount.place.parts))
        onto = [mount for mount in mounts if mount.parent == top.number and mount.number != top.number]


def _mounts(table: str) -> Iterator[Mount]:
    for line in table.split("\n"):
        before, dash, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if dash and len(fields) >= 6 and fields[0].isdigit() and fields[1].isdigit():
            yield Mount(int(fields[0]), int(fields[1]), PurePosixPath(_unescaped(fields[4])), _unescaped(kinds[0]))


def _unescaped(field: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), field)
