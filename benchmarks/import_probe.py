"""Import transformers, and kvtier if asked, in a new interpreter; say what it took and what it changed.

    python -m benchmarks.import_probe [kvtier]

Nothing but the standard library is imported before the clock starts.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping


def probe(with_kvtier: bool) -> dict[str, object]:
    """Return the seconds of the imports; with kvtier, also what it replaced in transformers and started."""
    started = time.perf_counter()
    import transformers  # noqa: F401
    from transformers import DynamicCache, GenerationMixin, PreTrainedModel

    plain_seconds = time.perf_counter() - started
    if not with_kvtier:
        return {"seconds": plain_seconds}
    classes = (DynamicCache, GenerationMixin, PreTrainedModel)
    before, threads = [dict(vars(each)) for each in classes], threading.enumerate()
    resumed = time.perf_counter()
    from kvtier import TieredCache  # noqa: F401  # `import kvtier` alone imports next to nothing

    kvtier_seconds = time.perf_counter() - resumed
    return {
        "seconds": plain_seconds + kvtier_seconds,
        "kvtier_seconds": kvtier_seconds,
        "replaced": [name for old, each in zip(before, classes, strict=True) for name in replaced(old, each)],
        "threads_started": [thread.name for thread in threading.enumerate() if thread not in threads],
    }


def replaced(before: Mapping[str, object], owner: type) -> list[str]:
    """Return the attributes of ``owner`` that are new, gone or other objects than ``before``."""
    after = vars(owner)
    names = sorted(before.keys() | after.keys())
    missing = object()
    return [f"{owner.__name__}.{n}" for n in names if before.get(n, missing) is not after.get(n, missing)]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe("kvtier" in sys.argv[1:])))
