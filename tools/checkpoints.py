"""Send every architecture of transformers, tiny, through files, and say how many come out as with transformers, bit by bit.

    python tools/checkpoints.py --out life.jsonl                   # all of them, two ranks; about 40 minutes
    python tools/checkpoints.py --out life.jsonl --only llama t5   # some

Each line of the output file is one model type: seconds, and what was not as with transformers (`tests/support/lifecycle.py`: written by
transformers, loaded by autotp, saved, cut ahead, loaded from that, turned back). Types that the file has are skipped unless `--again`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

#: Errors of planning, which come before a file is read.
PLANNING = ("TraceError", "InputError", "PlanError")


def kind(found: list[str]) -> str:
    """What a result is."""
    if not found:
        return "equal"
    text = found[0]
    if not text.startswith("ERROR"):
        return "different"
    if "Traceback" not in text:
        return "no result in time"
    if any(word in text for word in PLANNING):
        return "not planned without inputs"
    own = text.partition("Traceback")[2]
    return "failed" if "/autotp/checkpoint/" in own else "not built, or not loaded by transformers either"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--summary", action="store_true", help="only count what the file holds")
    options = parser.parse_args()

    import transformers

    from tests.support.lifecycle import life
    from tests.support.ranks import Pool

    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done: dict[str, list[str]] = {name: found for name, _, found in map(json.loads, lines)}
    types = options.only or sorted(transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES)
    pool = Pool(timeout=options.timeout)
    for name in [] if options.summary else [t for t in types if options.again or t not in done]:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = [text for rank in pool.run(life, name, folder, world=options.tp) for text in rank]
            except Exception as error:  # the next type must have its turn
                found = [f"ERROR {error}"]
        done[name] = found
        with options.out.open("a") as out:
            out.write(json.dumps([name, round(time.perf_counter() - start, 2), found]) + "\n")
        print(f"{name}: {kind(found)}", flush=True)
    pool.stop()
    for word, count in Counter(map(kind, done.values())).most_common():
        names = sorted(n for n, found in done.items() if kind(found) == word)
        print(f"{count:4d} {word}" + ("" if word == "equal" else f": {', '.join(names)}"))


if __name__ == "__main__":
    main()
