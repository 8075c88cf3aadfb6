"""The filesystem of a path, read from the mount table."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from kvtier.platform import mounts
from kvtier.platform.mounts import is_shared_over_network, kind_in, mounted_kind

PLAIN = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
30 27 0:40 / /home rw shared:2 master:1 - nfs4 server:/export rw,vers=4.2
31 30 0:41 / /home/ann/cache rw - tmpfs tmpfs rw,size=1k
32 27 0:42 / /media/my\\040drive\\011two rw,nosuid - fuse.sshfs ann@host:/ rw
33 27 254:0 /srv/real /bound rw - ext4 /dev/vda rw
34 27 0:43 / /back\\134slash rw - cifs //server/share rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/var/lib", "ext4"),
        ("/home", "nfs4"),
        ("/home/ann", "nfs4"),
        ("/home/ann/cache", "tmpfs"),
        ("/home/ann/cache/kvtier/blocks", "tmpfs"),
        ("/home/ann/cached", "nfs4"),
        ("/homes/ann", "ext4"),
        ("/media/my drive\ttwo/store", "fuse.sshfs"),
        ("/bound/store", "ext4"),
        ("/back\\slash/store", "cifs"),
        ("/proc/self", "proc"),
    ],
)
def test_filesystem_kind_is_that_of_the_innermost_mount(path, kind):
    assert kind_in(PLAIN, PurePosixPath(path)) == kind


def test_last_of_several_mounts_at_one_place_counts():
    table = (
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:5 / /mnt rw - nfs server:/ rw\n3 2 0:6 / /mnt rw - tmpfs tmpfs rw\n"
    )
    assert kind_in(table, PurePosixPath("/mnt/store")) == "tmpfs"
    beside = table.replace("3 2", "3 1")
    assert kind_in(beside, PurePosixPath("/mnt/store")) == "tmpfs"


def test_hidden_mount_does_not_count():
    table = (
        "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n"
        "2 1 0:5 / /mnt/deep rw - nfs server:/ rw\n"
        "3 1 0:6 / /mnt rw - xfs /dev/sdb1 rw\n"
    )
    assert kind_in(table, PurePosixPath("/mnt/deep/store")) == "xfs"


def test_bind_mount_has_the_kind_of_its_source():
    table = "1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:5 /export/ann /data rw shared:7 - nfs4 server:/export rw\n"
    assert kind_in(table, PurePosixPath("/data/store")) == "nfs4"


@pytest.mark.parametrize("table", ["", "nonsense\n", "1 0 8:1 / / rw\n", "1 0 8:1 / /else rw - ext4 /dev/sda1 rw\n"])
def test_filesystem_kind_is_none_for_an_unusable_mount_table(table):
    assert kind_in(table, PurePosixPath("/store")) is None


def test_mounted_kind_of_a_missing_path_is_that_of_its_parent(tmp_path):
    kind = mounted_kind(tmp_path)
    assert kind is None if not Path("/proc/self/mountinfo").exists() else kind
    assert mounted_kind(tmp_path / "not" / "there" / "yet") == kind


def test_mounted_kind_follows_symbolic_links(tmp_path, monkeypatch):
    table = tmp_path / "mountinfo"
    monkeypatch.setattr(mounts, "_MOUNT_TABLE", table)
    place = (tmp_path / "drive").resolve()
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    table.write_text(f"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:5 / {place} rw - nfs4 server:/ rw\n")
    assert mounted_kind(tmp_path / "link" / "store") == "nfs4"
    table.unlink()
    assert mounted_kind(tmp_path) is None


@pytest.mark.parametrize(
    "kind", ["nfs", "nfs4", "cifs", "smb3", "9p", "sshfs", "fuse.sshfs", "afs", "ceph", "lustre", "gpfs", "FUSE.rclone"]
)
def test_network_filesystems_are_recognized(kind):
    assert is_shared_over_network(kind)


@pytest.mark.parametrize("kind", [None, "", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs", "fuse", "fuse.ntfs-3g"])
def test_local_filesystems_are_not_taken_for_network_filesystems(kind):
    assert not is_shared_over_network(kind)
