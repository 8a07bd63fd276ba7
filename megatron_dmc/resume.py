"""Which checkpoint a run goes on from: the latest one that is whole.

Megatron names a checkpoint in `latest_checkpointed_iteration.txt` once all its files are written, so a process that is
killed within a save leaves the one before in place. A machine that loses power, or a file system that is full or
unreachable, can still leave files cut off behind a name. Those are recognised by what they say of their own lengths.
Megatron's `--save-retain-interval` deletes the checkpoint before as soon as the next is named; in a stage of DMC, the
last two that are whole stay (`superseded`).
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from megatron_dmc.config import DMCError

TRACKER = "latest_checkpointed_iteration.txt"


def damage(folder: Path) -> str | None:
    """What shows that a checkpoint (`iter_…`) is not whole, or `None`.

    Only Megatron's format `torch_dist` and torch's own can tell; the format of old (`mp_rank_…`) is taken as it is.
    """
    from torch.distributed.checkpoint import FileSystemReader

    if not folder.is_dir():
        return "it does not exist"
    if any(folder.glob("mp_rank_0*")):
        return None
    try:
        if (note := folder / "metadata.json").exists():
            json.loads(note.read_text())
        if (common := folder / "common.pt").exists() and not zipfile.is_zipfile(common):  # before Megatron 0.19
            return "common.pt is cut off"
        ends: dict[str, int] = {}
        for place in FileSystemReader(folder).read_metadata().storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            if (have := (folder / name).stat().st_size) < end:
                return f"{name} has {have} of {end} bytes"
    except Exception as error:  # whatever unreadable files make of the readers
        return f"{type(error).__name__}: {error}"
    return None


def tracked(load: Path) -> str:
    """What the tracker file says: an iteration, `release`, or something that a save left unfinished."""
    return (load / TRACKER).read_text(errors="replace").strip()


def is_iteration(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def checkpoint_to_resume(load: Path) -> tuple[int, list[str]]:
    """The iteration to go on from, and what is wrong with later ones that were passed over.

    Args:
        load: the folder that `--save` named.

    Raises:
        DMCError: where none is whole.
    """
    text = tracked(load)
    saved = {int(path.name[5:]): path for path in load.glob("iter_*") if is_iteration(path.name[5:])}
    problems = []
    if is_iteration(text):
        latest = int(text)
        saved.setdefault(latest, load / f"iter_{latest:07d}")
    else:
        problems.append(f"{load / TRACKER} holds {text!r}")
        latest = max(saved, default=0)
    for iteration in sorted((i for i in saved if i <= latest), reverse=True):
        if (problem := damage(saved[iteration])) is None:
            return iteration, problems
        problems.append(f"{saved[iteration]}: {problem}")
    raise DMCError(f"no checkpoint in {load} is whole: {'; '.join(problems)}. Begin anew, or give another --load")


def superseded(save: Path, interval: int) -> Path | None:
    """The checkpoint before the last two that are whole, unless it is at a multiple of `interval`, or a link.

    Nothing counts that the tracker does not name yet. Older ones are not looked at: as with Megatron, a run deletes one
    when it has saved one, and leaves what lay in the folder.
    """
    text = tracked(save)
    if not is_iteration(text):
        return None
    found = [(int(path.name[5:]), path) for path in save.glob("iter_*") if is_iteration(path.name[5:])]
    whole = 0
    for iteration, path in sorted(found, reverse=True):
        if iteration > int(text):
            continue
        if whole == 2:
            return path if iteration % interval and not path.is_symlink() else None
        whole += damage(path) is None
    return None


def rewrite_tracker(load: Path, iteration: int) -> None:
    """Name the iteration that is gone on from where the tracker names none: a later save reads the tracker again."""
    if not is_iteration(tracked(load)):
        (load / TRACKER).write_text(str(iteration))
