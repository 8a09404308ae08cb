"""Flags of diffusers' scripts and of sd-scripts that are more than another name of ours: value -> our flags.

A flag that only has another name here stands with that name, in the `also` of its Option.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from ...errors import UsageError
from ...run_folder import step_of

OWN_CHOICE = "the fastest attention for this machine is chosen automatically"
BY_PLAN = "recomputation follows --plan or --budget"


# Flags without a value that people have in their scripts, and why nothing needs to be done for them.
NEEDLESS = {
    "--enable-xformers-memory-efficient-attention": OWN_CHOICE,
    "--xformers": OWN_CHOICE,
    "--sdpa": OWN_CHOICE,
    "--gradient-checkpointing": BY_PLAN,
    "--cache-latents": "photos are always encoded once",
    "--use-8bit-adam": "8-bit AdamW is the default (--optimizer)",
    "--set-grads-to-none": "gradients are always freed",
    "--with-prior-preservation": "methods that use class images do so by default (--prior-weight)",
    "--allow-tf32": "the precision is --dtype",
    "--center-crop": "photos are cropped from the center by default (--crop)",
}


def mixed_precision_flags(text: str) -> list[str]:
    """no, fp16 or bf16 as our --dtype."""
    names = {"no": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
    if text not in names:
        raise UsageError(f"--mixed_precision: unknown precision {text!r}; choose from no, fp16, bf16")
    return ["--dtype", names[text]]


def photos_flags(text: str) -> list[str]:
    """A folder of photos is a word without a flag here."""
    return [text]


def instance_prompt_flags(text: str) -> list[str]:
    """'a photo of sks dog' -> the word sks, the class dog, the template 'a photo of {subject}'."""
    if "{subject}" in text or "{token}" in text:
        return ["--prompt", text]
    articles = r"(?:a|an|the|my|one)\s"
    article, word = rf"(?:{articles}+)?", rf"(?!{articles})(<[^>]+>|\w+)\s+(\w+)"
    named = re.search(rf"\bof\s+{article}{word}|^{article}{word}$", text)
    if named:
        token, kind = (group for group in named.groups() if group)
        rare = [] if token.startswith("<") else ["--identifier", "rare"]
        template = text.replace(f"{token} {kind}", "{subject}", 1)
        return ["--token", token, "--class", kind, *rare, "--prompt", template]
    alone = re.search(rf"\bof\s+{article}(\w+)$", text)
    if alone:
        return ["--class", alone[1], "--prompt", text[: alone.start(1)] + "{subject}"]
    raise UsageError(
        f"--instance_prompt: cannot tell which words of {text!r} name the subject; write 'a photo of sks dog', "
        "or give --class and --token"
    )


def class_prompt_flags(text: str) -> list[str]:
    """'a photo of dog' -> the template 'a photo of {class}', whose last word is the class."""
    if "{class}" in text:
        return ["--class-prompt", text]
    *before, last = text.split() or [""]
    if not last:
        raise UsageError("--class_prompt is empty; write a prompt such as 'a photo of a dog'")
    return ["--class-prompt", " ".join([*before, "{class}"]), "--class", last]


def resume_flags(text: str) -> list[str]:
    """latest, or a checkpoint's folder, whose run is then the output folder."""
    if text == "latest":
        return ["--resume"]
    path = Path(text)
    if step_of(path) is not None and path.is_dir():
        return ["--resume", "--out", str(path.parent)]
    raise UsageError(f"--resume_from_checkpoint: {text!r} is neither 'latest' nor a folder checkpoint-N that exists")


def report_flags(text: str) -> list[str]:
    """tensorboard, or nothing."""
    if text not in ("tensorboard", "none"):
        raise UsageError(f"--report_to: unknown tracker {text!r}; choose from tensorboard, none")
    return ["--tensorboard"] if text == "tensorboard" else []


def concepts_list_flags(text: str) -> list[str]:
    """A concepts.json: the first concept, and the further ones that are learned together with it."""
    try:
        entries = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--concepts_list: {text} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--concepts_list: {text} is invalid JSON: {error}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise UsageError(
            f"--concepts_list: {text} must hold a list of objects with instance_data_dir and instance_prompt"
        )
    if not all(e.get("instance_data_dir") and e.get("instance_prompt") for e in entries):
        raise UsageError(f"--concepts_list: each concept in {text} needs instance_data_dir and instance_prompt")
    first, *others = entries
    words = [*photos_flags(first["instance_data_dir"]), *instance_prompt_flags(first["instance_prompt"])]
    own = [entry.get("class_data_dir") for entry in entries]
    if any(own) and not all(own):
        raise UsageError(
            f"--concepts_list: some concepts in {text} have a class_data_dir and some have none; give all one, or "
            "none: the model draws each class"
        )
    for folder in dict.fromkeys(own) if len(set(own)) == 1 else own:
        words += ["--prior-folder", folder] if folder else []
    for other in others:
        said = instance_prompt_flags(other["instance_prompt"])
        if said[-1] != words[words.index("--prompt") + 1] or "--class" not in said:
            raise UsageError(
                f"--concepts_list: the instance prompts in {text} may differ only in the subject, as "
                "'a photo of <one> dog' and 'a photo of <two> cat' do"
            )
        token = f":{said[said.index('--token') + 1]}" if "--token" in said else ""
        words += ["--with", f"{other['instance_data_dir']}={said[said.index('--class') + 1]}{token}"]
    return words


Translate = Callable[[str], list[str]]
MODEL_TRANSLATE: dict[str, Translate] = {"--mixed-precision": mixed_precision_flags}
TRAIN_TRANSLATE = MODEL_TRANSLATE | {
    "--instance-data-dir": photos_flags,
    "--train-data-dir": photos_flags,
    "--instance-prompt": instance_prompt_flags,
    "--class-prompt": class_prompt_flags,
    "--concepts-list": concepts_list_flags,
    "--resume-from-checkpoint": resume_flags,
    "--report-to": report_flags,
}
