"""Make the tiny model from nothing:  python -m pcs_trainer.tiny.make.train --cache FOLDER [stages]

Stages: pictures (render the training set), vae, judge, unet, folder (write the diffusers folder). Every stage resumes
where it stopped; a finished stage is not repeated. Minutes count over all runs of a stage.

To train the model that ships further:  train --cache FOLDER pictures continue unet folder
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STAGES = ("pictures", "vae", "judge", "unet", "folder")
EXTRA_STAGES = ("continue",)
say = partial(print, flush=True)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace; `stages` is every stage where none is named."""
    parser = argparse.ArgumentParser(
        prog="python -m pcs_trainer.tiny.make.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "stages", nargs="*", help=f"which stages to run, in order (default: all of {', '.join(STAGES)})"
    )
    parser.add_argument(
        "--cache", required=True, type=Path, help="folder for pictures, latents and checkpoints (about 2 GB)"
    )
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the finished model (default: the package's own)"
    )
    parser.add_argument("--pictures", type=int, default=100_000, help="size of the training set (default: 100000)")
    parser.add_argument("--vae-minutes", type=float, default=20, help="training time of the autoencoder (default: 20)")
    parser.add_argument("--judge-minutes", type=float, default=22, help="training time of the judge (default: 22)")
    parser.add_argument(
        "--unet-minutes", type=float, default=90, help="training time of UNet and text encoder (default: 90)"
    )
    parser.add_argument("--batch", type=int, default=64, help="samples a step of the UNet stage (default: 64)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the UNet stage (default: 0.001)")
    parser.add_argument("--workers", type=int, default=2, help="processes that share the UNet stage (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process (default: 1)")
    options = parser.parse_args(argv)
    unknown = [s for s in options.stages if s not in STAGES + EXTRA_STAGES]
    if unknown:
        parser.error(f"unknown stage {unknown[0]!r}; choose from {', '.join(STAGES + EXTRA_STAGES)}")
    options.stages = options.stages or list(STAGES)
    return options


def _every_ten_thousand(line: str) -> None:
    if line.split()[1].endswith("0000"):
        say(line)


def pictures_stage(o: argparse.Namespace) -> tuple[NDArray[np.uint8], list[list[str]]]:
    """Render the training set."""
    from .data import render_set

    return render_set(o.cache, o.pictures, o.workers * o.threads, report=_every_ten_thousand)


def vae_stage(o: argparse.Namespace) -> None:
    """Train the autoencoder, and encode the training set with it."""
    import torch

    from .train_vae import encode_set, train_vae

    torch.set_num_threads(o.workers * o.threads)
    pictures, _ = pictures_stage(o)
    vae = train_vae(pictures, o.cache, o.vae_minutes, report=say)
    vae.save_pretrained(o.cache / "vae")
    encode_set(vae, pictures, o.cache / f"latents-{o.pictures}.npy", report=say)


def continue_stage(o: argparse.Namespace) -> None:
    """Fill the cache from a finished folder: autoencoder, tokenizer, text encoder, UNet, and a fresh optimizer."""
    import shutil

    import torch

    from ..common import WEIGHTS
    from .budget import save_checkpoint
    from .networks import loaded_parts
    from .train_unet import in_order
    from .train_vae import encode_set

    source = o.out or WEIGHTS
    torch.set_num_threads(o.workers * o.threads)
    pictures, _ = pictures_stage(o)
    shutil.copytree(source / "tokenizer", o.cache / "tokenizer", dirs_exist_ok=True)
    text, unet, vae = loaded_parts(source)
    vae.save_pretrained(o.cache / "vae")
    encode_set(vae, pictures, o.cache / f"latents-{o.pictures}.npy", report=say)
    average = [p.detach().clone() for p in in_order(text, unet)]
    state = {"text": text.state_dict(), "unet": unet.state_dict(), "average": average, "optimizer": None}
    save_checkpoint({**state, "step": 0, "spent": 0.0, "seen": 0}, o.cache / "unet.ckpt")


def judge_stage(o: argparse.Namespace) -> None:
    """Train the judge."""
    import torch

    from ..judge import save_judge
    from .train_judge import train_judge

    torch.set_num_threads(max(1, o.workers * o.threads - 1))  # one process renders its pictures
    save_judge(train_judge(o.cache, o.judge_minutes, report=say), notes={"minutes": o.judge_minutes})


def unet_stage(o: argparse.Namespace) -> None:
    """Train UNet and text encoder."""
    from ..tokenizer import write_tokenizer
    from .train_unet import train_unet

    captions = o.cache / f"captions-{o.pictures}.json"
    if not (o.cache / "tokenizer" / "vocab.json").exists():
        write_tokenizer([text for said in json.loads(captions.read_text()) for text in said], o.cache / "tokenizer")
    train_unet(
        o.cache,
        o.cache / "tokenizer",
        captions,
        o.cache / f"latents-{o.pictures}.npy",
        o.unet_minutes,
        o.batch,
        o.workers,
        o.threads,
        o.lr,
    )


def folder_stage(o: argparse.Namespace) -> None:
    """Write the finished model."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    from ..common import WEIGHTS
    from .folder import write_folder
    from .train_unet import trained_parts

    tokenizer = CLIPTokenizer.from_pretrained(o.cache / "tokenizer")
    text, unet, how_far = trained_parts(o.cache, tokenizer)
    out = o.out or WEIGHTS
    write_folder(out, AutoencoderKL.from_pretrained(o.cache / "vae"), text, tokenizer, unet, o.cache / "tokenizer")
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    minutes = how_far["spent"] / 60
    say(f"wrote {out}: {size / 1e6:.2f} MB after {how_far['step']} steps, {how_far['seen']} samples, {minutes:.0f} min")


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    run: dict[str, Callable[[argparse.Namespace], object]] = {
        "pictures": pictures_stage,
        "vae": vae_stage,
        "judge": judge_stage,
        "continue": continue_stage,
        "unet": unet_stage,
        "folder": folder_stage,
    }
    for stage in options.stages:
        run[stage](options)


if __name__ == "__main__":
    main()
