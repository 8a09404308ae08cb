"""What a retrieval of class images is asked for, checked before anything is loaded: no torch is needed.

`retrieve()` and `pcs retrieve` say the same, so each sentence has the argument and the flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .pictures import LONGEST_CAPTION


def check_request(
    pictures: Sequence[str | Path], prompt: str, out: str | Path, clip: str | Path | None, judge: bool
) -> None:
    """Raise ValueError, one sentence, for what is wrong with the arguments of `retrieve`, which see."""
    for source in pictures:
        if not Path(source).expanduser().exists():
            raise ValueError(f"{source} does not exist; give a folder of pictures")
    if not prompt.strip():
        raise ValueError("the class prompt (--prompt) is blank; give one such as 'photo of a cat'")
    if len(prompt) > LONGEST_CAPTION:
        raise ValueError(
            f"the class prompt (--prompt) has {len(prompt):,} characters; give one such as 'photo of a cat'"
        )
    if judge == bool(clip):
        raise ValueError(
            "name a CLIP model on this machine, clip=FOLDER (--clip FOLDER), or the judge for pictures of the embedded "
            "model's world, judge=True (--judge); one of the two"
        )
    if clip and not Path(clip).expanduser().exists():
        raise ValueError(f"clip={str(clip)!r} (--clip) does not exist; give the folder of a CLIP model")
    folder = Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{out} (--out) is there already; name a new folder for the list of class images")
