"""Text for `benchmarks/quality.py`: source code and documentation of the packages that are installed here.

Every file counts once, whatever number of packages bring it. Whole packages are held out, and of those the files of
which more than half of the long lines are in the training text as well (copies of other packages' code) are left out.
"""

from __future__ import annotations

import hashlib
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_dmc.retrieval import ADJECTIVES, FILLER, NOUNS, QUESTION, STATEMENT

CODE = {".py", ".pyi", ".pyx", ".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".js", ".ts"}
DOCUMENTATION = {".md", ".rst", ".txt"}
SHORTEST, LONGEST = 200, 400_000
"""Characters of a file that is taken."""
HELD_OUT = 0.04
"""Share of the characters, about; no held-out package has more than half of that."""
RECALL = 0.02
"""Share of the training text that are made-up texts of the kind that the test of recall asks about."""
SAMPLE = 8
"""Percent of the training files that the tokenizer is trained on."""
LONG_LINE = 40


def write(folder: Path, limit: int | None = None, seed: int = 0) -> dict:
    """Write `train.jsonl` and `held-out.jsonl`, shuffled, and return what they hold.

    `sample.jsonl` has the beginning of `train.jsonl`, to train a tokenizer on.

    Args:
        limit: characters of code and documentation at most, for a trial.
    """
    packages: dict[str, list[str]] = {}
    seen: set[bytes] = set()
    characters = 0
    for package, text in _files(Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib"))):
        digest = hashlib.blake2b("".join(text.split()).encode(), digest_size=16).digest()
        if digest in seen:
            continue
        seen.add(digest)
        packages.setdefault(package, []).append(text)
        characters += len(text)
        if limit is not None and characters > limit:
            break
    held_out = _choose(packages)
    rng = random.Random(f"text {seed}")
    train = [text for package, texts in packages.items() if package not in held_out for text in texts]
    known = {hash(line) for text in train for line in _long_lines(text)}
    rest, copies = [], 0
    for package in held_out:
        for text in packages[package]:
            lines = _long_lines(text)
            if lines and sum(hash(line) in known for line in lines) > len(lines) / 2:
                copies += 1
            else:
                rest.append(text)
    made_up = []
    while sum(map(len, made_up)) < RECALL * sum(map(len, train)):
        made_up.append(recall_text(rng))
    train += made_up
    folder.mkdir(parents=True, exist_ok=True)
    about = dict(held_out_packages=held_out, held_out_copies=copies, recall_texts=len(made_up))
    rng.shuffle(train)
    rng.shuffle(rest)
    for name, texts in (("train", train), ("held-out", rest), ("sample", train[: 1 + SAMPLE * len(train) // 100])):
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        about[name] = dict(files=len(texts), characters=sum(map(len, texts)))
    return about


def recall_text(rng: random.Random) -> str:
    """Statements amid filler, then a question for each in another order, with its answer.

    The longest are longer than a context, so that questions reach as far back as those of the test.
    """
    names = rng.sample([f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS], rng.randint(1, 16))
    values = {name: rng.randrange(1_000_000, 10_000_000) for name in names}
    sentences = [rng.choice(FILLER) for _ in range(rng.randint(4, 160))]
    for name, value in values.items():
        sentences.insert(rng.randint(0, len(sentences)), STATEMENT.format(key=name, value=value))
    rng.shuffle(names)
    return " ".join([*sentences, *(f"{QUESTION.format(key=name)} {values[name]}." for name in names)])


def _files(*roots: Path) -> Iterator[tuple[str, str]]:
    """Package and text of each file, in a fixed order."""
    for root in roots:
        for path in sorted(root.rglob("*")):
            parts = path.relative_to(root).parts
            if path.suffix not in CODE | DOCUMENTATION or not path.is_file() or path.is_symlink():
                continue
            if root != roots[0] and "site-packages" in parts:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if SHORTEST <= len(text) <= LONGEST:
                # A package's own folder and its `…-1.2.dist-info` are one.
                yield parts[0].split("-")[0].removesuffix(".py").lower(), text


def _choose(packages: dict[str, list[str]]) -> list[str]:
    """Packages to hold out, in an order that depends on their names alone."""
    sizes = {package: sum(map(len, texts)) for package, texts in packages.items()}
    wanted = HELD_OUT * sum(sizes.values())
    chosen: list[str] = []
    for package in sorted(sizes, key=lambda name: hashlib.blake2b(name.encode()).digest()):
        if sum(sizes[name] for name in chosen) >= wanted:
            break
        if 20_000 < sizes[package] <= wanted / 2:
            chosen.append(package)
    return chosen


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE]
