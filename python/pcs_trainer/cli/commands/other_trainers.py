"""What the well-known flags of diffusers' scripts and of sd-scripts mean here, where it is not just another name."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ...errors import UsageError

OWN_CHOICE = "the fastest attention for this machine is chosen by itself"
BY_PLAN = "what a step keeps is the memory plan's business (--plan, --budget)"


def needless_flags() -> dict[str, str]:
    """Flags without a value that people have in their scripts, and why nothing needs to be done for them."""
    return {
        "--enable-xformers-memory-efficient-attention": OWN_CHOICE,
        "--xformers": OWN_CHOICE,
        "--sdpa": OWN_CHOICE,
        "--gradient-checkpointing": BY_PLAN,
        "--cache-latents": "the photos are encoded once in any case",
        "--use-8bit-adam": "it is the default (--optimizer)",
        "--set-grads-to-none": "gradients are freed in any case",
        "--with-prior-preservation": "the methods that want it have it (--prior-weight)",
        "--allow-tf32": "the precision is --dtype",
        "--center-crop": "photos are scaled and cut from the middle in any case",
    }


def photos(text: str) -> list[str]:
    return [text]


def instance_prompt(text: str) -> list[str]:
    """'a photo of sks dog' -> the word sks, the class dog, the template 'a photo of {subject}'."""
    if "{subject}" in text:
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
        f"--instance_prompt: {text!r} does not show which words name the subject; write 'a photo of sks dog', "
        "or give --class and --token"
    )


def class_prompt(text: str) -> list[str]:
    """'a photo of dog' -> the template 'a photo of {class}', whose last word is the class."""
    if "{class}" in text:
        return ["--class-prompt", text]
    *before, last = text.split() or [""]
    if not last:
        raise UsageError("--class_prompt is empty; write such as 'a photo of a dog'")
    return ["--class-prompt", " ".join([*before, "{class}"]), "--class", last]


def resume_from(text: str) -> list[str]:
    """latest, or a checkpoint's folder, whose run is then the output folder."""
    if text == "latest":
        return ["--resume"]
    path = Path(text)
    if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir():
        return ["--resume", "--out", str(path.parent)]
    raise UsageError(f"--resume_from_checkpoint: {text!r} is neither 'latest' nor a folder checkpoint-N that exists")


def report_to(text: str) -> list[str]:
    if text not in ("tensorboard", "none"):
        raise UsageError(f"--report_to: {text!r} is not supported; there are tensorboard and none")
    return ["--tensorboard"] if text == "tensorboard" else []


def concepts_list(text: str) -> list[str]:
    """A concepts.json: the first concept, and the further ones that are learned together with it."""
    try:
        entries = json.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--concepts_list: {text} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"--concepts_list: {text} is no JSON: {error}") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(e, dict) for e in entries):
        raise UsageError(
            f"--concepts_list: {text} must hold a list of objects with instance_data_dir and instance_prompt"
        )
    if not all(e.get("instance_data_dir") and e.get("instance_prompt") for e in entries):
        raise UsageError(f"--concepts_list: each concept in {text} needs instance_data_dir and instance_prompt")
    first, *others = entries
    words = [*photos(first["instance_data_dir"]), *instance_prompt(first["instance_prompt"])]
    if first.get("class_data_dir"):
        words += ["--prior-folder", first["class_data_dir"]]
    for other in others:
        if other.get("class_data_dir") != first.get("class_data_dir"):
            raise UsageError(
                f"--concepts_list: the concepts in {text} have several class_data_dir; give all the same one, or none: "
                "the model draws the pictures of each class"
            )
        said = instance_prompt(other["instance_prompt"])
        if said[-1] != words[words.index("--prompt") + 1] or "--class" not in said:
            raise UsageError(
                f"--concepts_list: the instance prompts in {text} must be the same but for the subject's words, as "
                "'a photo of <one> dog' and 'a photo of <two> cat' are"
            )
        token = f":{said[said.index('--token') + 1]}" if "--token" in said else ""
        words += ["--with", f"{other['instance_data_dir']}={said[said.index('--class') + 1]}{token}"]
    return words
