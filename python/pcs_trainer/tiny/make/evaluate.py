"""Measure the tiny model:  python -m pcs_trainer.tiny.make.evaluate [--weights FOLDER] [--count 1000]

Writes results.json and contact_sheet.png beside the weights. Captions are ones that training never used,
but for the bare ones ("a mug").
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...files import written_text
from .. import captions, world
from ..common import WEIGHTS, to_pictures, to_tensor
from ..judge import Judge, agreement, frechet, load_judge
from ..subjects import photos
from ..training_set import TEST_SEEDS, training_captions, training_scene
from .folder import GUIDANCE, STEPS, Parts

Pictures: TypeAlias = NDArray[np.uint8]  # [N, H, W, 3]
Names: TypeAlias = list[frozenset[str]]  # the fields of a scene that its caption names

# Seeds apart from each other, from TEST_SEEDS on.
NOVEL_OFFSET, BARE_OFFSET, SHEET_OFFSET = 10_000_000, 20_000_000, 30_000_000
SUBJECT_OFFSET, REAL_OFFSET = 40_000_000, 50_000_000


def test_set(
    count: int, offset: int = 0, held_out: bool = False, bare: bool = False
) -> tuple[list[world.Scene], list[str], Names]:
    """Scenes with captions that training never used.

    Args:
        count: number of scenes.
        offset: first seed, from TEST_SEEDS on.
        held_out: take triples of class, colour and background that training never saw either.
        bare: give them the shortest captions, which training may have used.

    Returns:
        Scenes, captions, and what each caption names.
    """
    pairs = []
    for i in range(count):
        scene = world.scene(TEST_SEEDS + offset + i, held_out=held_out)
        rng = np.random.default_rng([TEST_SEEDS, offset, i])
        pairs.append((scene, captions.bare(scene, rng) if bare else captions.test_caption(scene, rng)))
    return [s for s, _ in pairs], [c.text for _, c in pairs], [c.names for _, c in pairs]


def draw_all(parts: Parts, texts: Sequence[str], block: int = 50, first_seed: int = 0) -> Pictures:
    """A picture of every caption, `block` of them at once."""
    starts = range(0, len(texts), block)
    blocks = [parts.draw(texts[i : i + block], seed=first_seed + i, bf16=True) for i in starts]
    return np.concatenate(blocks)


@torch.no_grad()
def reconstruct(vae: Any, pictures: Pictures) -> Pictures:
    """The pictures through the autoencoder and back."""
    return np.concatenate(
        [
            to_pictures(vae.decode(vae.encode(to_tensor(pictures[i : i + 100])).latent_dist.mean).sample)
            for i in range(0, len(pictures), 100)
        ]
    )


def psnr(a: Pictures, b: Pictures) -> float:
    """Mean over pictures of the peak signal-to-noise ratio, in dB."""
    error = ((a.astype(np.float32) - b.astype(np.float32)) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / error)).mean())


def ceilings(
    parts: Parts, judge: Judge, scenes: Sequence[world.Scene], names: Names
) -> tuple[Pictures, dict[str, Any]]:
    """Real renderings of the scenes, and what the judge reads in them and in their reconstructions."""
    real = np.stack([world.render(s) for s in scenes])
    again = reconstruct(parts.vae, real)
    return real, {
        "real": agreement(judge.read(real), scenes, names),
        "reconstructed": agreement(judge.read(again), scenes, names),
        "reconstruction_psnr": psnr(real, again),
    }


def thumbnails(pictures: Pictures) -> Tensor:
    """8x8 colour thumbnails as rows [N, 192], for distances between pictures."""
    p = np.asarray(pictures, np.float32)
    return torch.from_numpy(p.reshape(len(p), 8, 8, 8, 8, 3).mean((2, 4)).reshape(len(p), -1)) / 255


def nearest(rows: Tensor, others: Tensor, block: int = 200) -> tuple[Tensor, Tensor]:
    """Distance from each row to its nearest other, root mean square per entry, and which one it is."""
    found = [torch.cdist(rows[i : i + block], others).min(1) for i in range(0, len(rows), block)]
    return torch.cat([f.values for f in found]) / rows.shape[1] ** 0.5, torch.cat([f.indices for f in found])


def distances(
    judge: Judge, texts: Sequence[str], drawn: Pictures, real: Pictures, count: int
) -> dict[str, dict[str, float]]:
    """Frechet distances in the judge's features, the memorisation check, and cosines of pictures and captions.

    Args:
        judge: what compares pictures.
        texts: captions of the pictures.
        drawn: by the model.
        real: renderings of the captions' scenes.
        count: number of fresh renderings to compare with; ten times as many training pictures are searched.
    """
    fresh = np.stack([world.render(world.scene(TEST_SEEDS + REAL_OFFSET + i, held_out=False)) for i in range(count)])
    target = judge.features(fresh)
    flat = np.broadcast_to(drawn.mean((1, 2), keepdims=True).astype(np.uint8), drawn.shape).copy()
    scenes = [training_scene(i) for i in range(10 * count)]
    train = np.stack([world.render(s) for s in scenes])
    said = [training_captions(i, s)[0] for i, s in enumerate(scenes)]
    best = (judge.text_embedding(texts) @ judge.text_embedding(said).T).argmax(1)
    book = thumbnails(train)
    to_drawn, to_real = nearest(thumbnails(drawn), book)[0], nearest(thumbnails(real), book)[0]
    return {
        "frechet": {
            "drawn": frechet(judge.features(drawn), target),
            "other_real": frechet(judge.features(real), target),
            "mean_colour": frechet(judge.features(flat), target),
            "nearest_training_picture_by_caption": frechet(judge.features(train[best.numpy()]), target),
        },
        "memorisation": {
            "training_pictures_searched": len(train),
            "nearest_distance_of_drawn_median": float(to_drawn.median()),
            "nearest_distance_of_unseen_real_median": float(to_real.median()),
            "share_of_drawn_nearer_than_the_nearest_1_percent_of_real": float(
                (to_drawn < to_real.quantile(0.01)).float().mean()
            ),
        },
        "text_image_cosine": {
            "drawn": float((judge.image_embedding(drawn) * judge.text_embedding(texts)).sum(1).mean()),
            "real": float((judge.image_embedding(real) * judge.text_embedding(texts)).sum(1).mean()),
        },
    }


def retrieval(judge: Judge, count: int = 200) -> dict[str, float]:
    """Rank-1 retrieval of subjects of unseen seeds, photographed in two different places."""
    pairs = [
        (
            photos(TEST_SEEDS + SUBJECT_OFFSET + i, 1, background=a)[0],
            photos(TEST_SEEDS + SUBJECT_OFFSET + i, 1, background=b, first=1)[0],
        )
        for i in range(count)
        for a, b in [np.random.default_rng([TEST_SEEDS, i]).choice(world.BACKGROUNDS, 2, replace=False)]
    ]
    one = judge.subject_embedding(np.stack([p.picture for p, _ in pairs]))
    two = judge.subject_embedding(np.stack([p.picture for _, p in pairs]))
    scores = one @ two.T
    kinds = np.array([p.scene.kind for p, _ in pairs])
    others = torch.from_numpy((kinds[:, None] == kinds[None]) & ~np.eye(count, dtype=bool))
    return {
        "subjects": count,
        "rank_1": float((scores.argmax(1) == torch.arange(count)).float().mean()),
        "cosine_same_subject": float(scores.diagonal().mean()),
        "cosine_other_subject_of_the_class": float(scores[others].mean()),
    }


def speed(folder: str | Path) -> dict[str, float]:
    """Seconds to load and to draw four pictures, on the threads that torch uses here."""
    started = time.perf_counter()
    parts = Parts.load(folder)
    loaded = time.perf_counter() - started
    texts = test_set(4)[1]
    parts.draw(texts, bf16=True)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        parts.draw(texts, bf16=True)
        times.append(time.perf_counter() - started)
    return {
        "threads": torch.get_num_threads(),
        "load_seconds": loaded,
        "four_pictures_25_steps_seconds": sorted(times)[1],
    }


def diffusers_difference(folder: str | Path, count: int = 24) -> dict[str, float]:
    """Differences in grey levels to diffusers' own pipeline, same noise, fp32: the largest, and the share above 2."""
    from diffusers import StableDiffusionPipeline

    from ...model.model import load_model
    from ...sampling.drawing import sample

    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    model, texts = load_model(folder, dtype=torch.float32), test_set(count)[1]
    channels, size = model.unet.config["in_channels"], model.unet.config["sample_size"]
    noise = torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        texts, latents=noise.clone(), guidance_scale=GUIDANCE, num_inference_steps=STEPS, output_type="np"
    ).images
    drawn = sample(model, texts, latents=noise, guidance=GUIDANCE, steps=STEPS)
    ours = np.stack([np.asarray(image) for image in drawn])
    difference = np.abs(np.rint(theirs * 255).astype(int) - ours.astype(int))
    return {"pictures": count, "largest": int(difference.max()), "share_above_2": float((difference > 2).mean())}


def contact_sheet(parts: Parts, path: Path, count: int = 48, columns: int = 12) -> None:
    """Drawn pictures above real renderings of the same captions, in pairs of rows, with the captions under them."""
    from PIL import Image, ImageDraw

    scenes, texts, _ = test_set(count, SHEET_OFFSET)
    drawn, real = draw_all(parts, texts), np.stack([world.render(s) for s in scenes])
    side, cell, label = 96, 100, 46
    sheet = Image.new("RGB", (columns * cell, (count // columns) * (2 * cell + label)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for i, text in enumerate(texts):
        x, y = (i % columns) * cell, (i // columns) * (2 * cell + label)
        for row, picture in enumerate((drawn[i], real[i])):
            shown = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(shown, (x + 2, y + 2 + row * cell))
        lines = textwrap.wrap(text, 19)[:5]
        pen.multiline_text((x + 3, y + 2 * cell - 1), "\n".join(lines), fill=(40, 40, 40), spacing=0, font_size=9)
    sheet.save(path, optimize=True)


def measure(folder: Path = WEIGHTS, count: int = 1000, report: Callable[[str], object] = print) -> dict[str, Any]:
    """Every number of the model card.

    Args:
        folder: the model.
        count: number of captions.
        report: told of the first results.
    """
    parts, judge = Parts.load(folder), load_judge()
    scenes, texts, names = test_set(count)
    results: dict[str, Any]
    real, results = ceilings(parts, judge, scenes, names)
    report(json.dumps(results))
    drawn = draw_all(parts, texts)
    results["drawn"] = agreement(judge.read(drawn), scenes, names)
    report(json.dumps(results["drawn"]))
    n_scenes, n_texts, n_names = test_set(max(50, count * 3 // 10), NOVEL_OFFSET, held_out=True)
    results["novel_triples"] = agreement(judge.read(draw_all(parts, n_texts, first_seed=5000)), n_scenes, n_names)
    b_scenes, b_texts, b_names = test_set(max(40, count // 5), BARE_OFFSET, bare=True)
    bare = agreement(judge.read(draw_all(parts, b_texts, first_seed=9000)), b_scenes, b_names)
    results["bare_captions"] = {k: bare[k] for k in ("kind", "colour", "pattern", "scale")}
    report(json.dumps({k: results[k] for k in ("novel_triples", "bare_captions")}))
    results.update(distances(judge, texts, drawn, real, count))
    results["subject_retrieval"] = retrieval(judge)
    results["speed"] = speed(folder)
    results["diffusers_difference"] = diffusers_difference(folder)
    results["settings"] = {"captions": count, "guidance": GUIDANCE, "steps": STEPS, "sampler": "ddim"}
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m pcs_trainer.tiny.make.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the model's folder (default: the package's own)")
    parser.add_argument("--out", type=Path, help="where the results go (default: beside the weights folder)")
    parser.add_argument("--count", type=int, default=1000, help="number of held-out captions (default: 1000)")
    o = parser.parse_args(argv)
    out = o.out or o.weights.parent
    results = measure(o.weights, o.count)
    written_text(out / "results.json", json.dumps(results, indent=1))
    contact_sheet(Parts.load(o.weights), out / "contact_sheet.png")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
