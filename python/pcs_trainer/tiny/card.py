"""Writes the model card, weights/README.md, from results.json and training.json, so that no number is typed by hand."""

import json

from .common import WEIGHTS

PAGE = """# pcs-tiny

A small real text-to-image model of the Stable Diffusion 1.x kind, made from nothing, that ships inside the package: it
draws 64x64 pictures of a procedural world (12 kinds of objects, 8 colours, 4 patterns, 8 places, 3 positions, photo and
painting, three kinds of light). It is there so that personalization can be tried, tested and *measured* anywhere,
without a download. It knows nothing outside that world.

![48 captions never used in training: drawn above, real renderings below](../contact_sheet.png)

    from pcs_trainer import load_model
    model = load_model("tiny")

    from diffusers import StableDiffusionPipeline           # the same folder, the same pictures
    StableDiffusionPipeline.from_pretrained("python/pcs_trainer/tiny/weights")

## What it is

| part | shape | parameters |
|---|---|---|
| UNet | widths 64/96/128, one layer a level, 4 heads, 16 groups, text width 128, conv projections; cross-attention on maps of 16x16 (up path), 8x8 and 4x4; velocity prediction | 5.81 M |
| text encoder | CLIP, width 128, 3 layers, 40 tokens, a byte-pair vocabulary of 948 learned from the captions | 0.62 M |
| autoencoder | AutoencoderKL, widths 16/48/96, factor 4, **8 latent channels**, scaling_factor 1, latents decorrelated | 1.44 M |
| schedule | DDPM, scaled-linear betas 0.00085 to 0.02 (almost pure noise at the end), trailing timesteps | |

All weights are fp16; the folder has {size:.2f} MB. Words: see `captions.py`; 32 meaningless three-letter words (`sks`, `zxq`, ...)
are single tokens for identifiers. In training they, and "patterned", "decorated" and "fancy", went with objects whose
look has no name, so the model knows that such objects exist; the subjects of the tests have other seeds.

## How it was made

{made}

`python -m pcs_trainer.tiny.train --cache FOLDER` makes it again, from nothing, and resumes where it was stopped.

## Numbers

Measured by `python -m pcs_trainer.tiny.evaluate` on {captions} captions never used in training, DDIM, {steps} steps,
guidance {guidance}, read by the judge of `judge.py` (trained apart, on other pictures). Per cent right:

| | class | colour | background | all three | pattern, where named | position, where named |
|---|---|---|---|---|---|---|
{rows}

Bare captions ("a mug", "a small blue fish"), what was named: class {bare[kind]}, colour {bare[colour]}, pattern {bare[pattern]},
size {bare[scale]}.

| Frechet distance in the judge's features to real pictures | |
|---|---|
| drawn | {f[drawn]:.2f} |
| other real pictures (the floor) | {f[other_real]:.2f} |
| the training picture whose caption is nearest | {f[nearest_training_picture_by_caption]:.2f} |
| each drawn picture replaced by its mean colour | {f[mean_colour]:.2f} |

Memorisation: over {m[training_pictures_searched]} training pictures, the nearest one (8x8 thumbnails, root mean square) is
{m[nearest_distance_of_drawn_median]:.4f} away from a drawn picture and {m[nearest_distance_of_unseen_real_median]:.4f} from an unseen real one, in the median;
{near} % of the drawn pictures are nearer than the nearest 1 % of the real ones.

Autoencoder: {psnr:.1f} dB. Judge: the same subject in another place is found first among {r[subjects]} subjects of unseen seeds
{rank} % of the time. Four pictures, 25 steps: {speed[four_pictures_25_steps_seconds]:.2f} s, loading {speed[load_seconds]:.2f} s on {speed[threads]} CPU threads.
diffusers' own pipeline differs by at most {diff}/255 from the same noise in fp32.

## Limits

{limits}

## Licence

The world, the pictures, the captions and the weights were made for this package and carry its licence; no outside data was used.
"""


def percent(value):
    return "-" if value != value else f"{100 * value:.1f}"


def card(results, training, size):
    """The page as text."""
    columns = ("kind", "colour", "background", "triple", "pattern", "position")
    rows = [f"| {name} | " + " | ".join(percent(results[key][c]) for c in columns) + " |"
            for name, key in (("drawn", "drawn"), ("drawn, class x colour x background never seen together", "novel_triples"),
                              ("real renderings", "real"), ("through the autoencoder", "reconstructed"))]
    memory = results["memorisation"]
    return PAGE.format(
        size=size / 1e6, made=training["made"], limits="\n".join(f"- {line}" for line in training["limits"]),
        captions=results["settings"]["captions"], steps=results["settings"]["steps"], guidance=results["settings"]["guidance"],
        rows="\n".join(rows), bare={k: percent(v) for k, v in results["bare_captions"].items()}, f=results["frechet"], m=memory,
        near=percent(memory["share_of_drawn_nearer_than_the_nearest_1_percent_of_real"]), psnr=results["reconstruction_psnr"],
        r=results["subject_retrieval"], rank=percent(results["subject_retrieval"]["rank_1"]), speed=results["speed"],
        diff=results["diffusers_max_difference"])


def write_card(folder=WEIGHTS):
    """Beside the weights; results.json and training.json lie one folder above."""
    results = json.loads((folder.parent / "results.json").read_text())
    training = json.loads((folder.parent / "training.json").read_text())
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and f.name != "README.md")
    (folder / "README.md").write_text(card(results, training, size))


if __name__ == "__main__":
    write_card()
