"""Output of ``--json``: stable keys, units in their names, times as Unix seconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kvtier.cli.store.roots import RootFile
from kvtier.store.manage.inventory import Chain, Forgotten
from kvtier.store.manage.stats import RootUsage
from kvtier.store.manage.verify import VerifyReport
from kvtier.store.names import NamedPrefix

Record = dict[str, Any]


def print_json(record: Mapping[str, Any]) -> None:
    """Print one object to standard output."""
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


def of_name(named: NamedPrefix) -> Record:
    """Return the record of a named prefix."""
    return {
        "name": named.name,
        "root": named.root,
        "tokens": named.tokens,
        "kept_tokens": named.kept_tokens,
        "bytes": named.nbytes,
        "own_bytes": named.own_bytes,
        "created_unix_seconds": named.created_at,
        "used_unix_seconds": named.used_at,
        "expires_unix_seconds": named.expires_at,
        "hits": named.hits,
        "pinned": named.pinned,
    }


def of_chain(chain: Chain) -> Record:
    """Return the record of a chain."""
    return {
        "key": chain.key,
        "root": chain.root,
        "tokens": chain.tokens,
        "bytes": chain.nbytes,
        "used_unix_seconds": chain.used_at,
        "hits": chain.hits,
        "names": list(chain.names),
    }


def of_root(usage: RootUsage, file: RootFile) -> Record:
    """Return the size of a root, and its model in a few words."""
    return {
        "root": usage.root,
        "title": file.title,
        "blocks": usage.blocks,
        "bytes": usage.nbytes,
        "named_bytes": usage.named_bytes,
    }


def of_removal(removed: Forgotten) -> Record:
    """Return the record of a removal."""
    return {"removed_blocks": removed.blocks, "removed_bytes": removed.nbytes}


def of_verification(report: VerifyReport) -> Record:
    """Return the record of a verification."""
    return {
        "ok": report.ok,
        "blocks": report.blocks,
        "bytes": report.nbytes,
        "seconds": report.seconds,
        "problems": [asdict(problem) for problem in report.problems],
    }
