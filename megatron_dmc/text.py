"""Documents from text files, JSON lines and folders of either."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_dmc.config import DMCError


def find_files(inputs: Iterable[Path], pattern: str = "*") -> list[Path]:
    """The files that the inputs name, those of a folder sorted, each with `pattern`."""
    files = []
    for path in inputs:
        if path.is_dir():
            found = sorted(f for f in path.rglob(pattern) if f.is_file())
            if not found:
                raise DMCError(f"--input {path} has no file that matches {pattern!r}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DMCError(f"--input {path} is neither a file nor a folder")
    return files


def read_documents(files: Iterable[Path], json_key: str = "text") -> Iterator[str]:
    """The texts of the files, in order; files that are not UTF-8 are named and passed over."""
    for path in files:
        try:
            if path.suffix != ".jsonl":
                text = path.read_text(encoding="utf-8")
                if text.strip():
                    yield text
                continue
            with open(path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _json_text(line, json_key, f"{path}:{number}")
        except UnicodeDecodeError:
            print(f"not UTF-8, passed over: {path}", file=sys.stderr)


def _json_text(line: str, key: str, where: str) -> str:
    try:
        document = json.loads(line)
    except json.JSONDecodeError as error:
        raise DMCError(f"{where} is not JSON: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get(key), str):
        raise DMCError(f"{where} has no text under {key!r}; name its key with --json-key")
    return document[key]
