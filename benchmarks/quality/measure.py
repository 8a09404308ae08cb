"""The methods side by side on the embedded model: python -m benchmarks.quality [--section main ...] [--minutes 40]

Every method learns unseen subjects of the small world from four photos; the judge that ships with the model measures
what is drawn (pcs_trainer/evaluation/scores.py says what each number is). One row a subject and setting goes into
results/quality.csv as soon as it is measured; rows that are there for this very model are not measured again.
--docs makes docs/quality.md and its figures from the rows.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fcntl
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import timing

from . import variants

RESULTS = timing.RESULTS / "quality.csv"
SUBJECTS = tuple(range(101, 151))  # seeds that no preset was chosen on
METHODS = ("dreambooth", "dreambooth_lora", "custom_diffusion", "personalized_residuals", "textboost")
PLACES = ("studio", "table", "meadow", "beach", "snow", "night", "brick", "underwater")
HELD_OUT = dict(n=8, first=100)  # the photos that subjects are compared with; none of them is learned from
DRAWN = dict(sampler="dpmpp_2m", steps=15, batch=10)
KEY = ("model", "section", "setting", "subject")
FACTS = (*KEY, "method", "class", "photos", "train_seconds", "train_cpu_seconds", "steps")
MEASURES = (
    "gap_closed", "subject_similarity", "subject_similarity_base", "subject_similarity_real", "prompted_similarity",
    "prompt_kept", "prompt_accuracy", "prompt_accuracy_base", "text_similarity", "text_similarity_base",
    "image_similarity", "kid", "drift_to_subject", "drift_distance", "class_accuracy", "class_accuracy_base",
    "diversity", "parameters", "accuracy_background", "accuracy_background_base", "accuracy_position",
    "accuracy_position_base", "accuracy_size", "accuracy_size_base", "accuracy_painting", "accuracy_painting_base",
    "accuracy_light", "accuracy_light_base", "same_place", "seconds",
)  # fmt: skip
COLUMNS = (*FACTS, *MEASURES, "date", "commit", "device", "threads", "torch")
SHOWN = ("a photo of a {} on the beach", "a photo of a {} in the snow", "a photo of a {} at night")


@dataclass(frozen=True)
class Job:
    """One training and what is measured of it."""

    section: str
    setting: str
    method: str
    subject: int
    overrides: dict[str, Any] = field(default_factory=dict, hash=False)
    photos: int = 4
    background: str = ""  # all photos in this one place
    lag: bool = False  # measured a second time, drawn with LAG
    variant: str = ""  # a change that no setting makes, by its name in variants.py
    partner: int = 0  # a second subject, learned together with the first

    @property
    def settings(self) -> list[str]:
        """The rows it makes."""
        if self.partner:
            return ["joint", "merged"]
        return [self.setting, *([f"{self.setting} + LAG"] if self.lag else [])]


def sections(count: int) -> dict[str, list[Job]]:
    """Every section's jobs: the table on `count` subjects, the ablations on the first of them."""
    subjects = SUBJECTS[:count]
    few, fewer = subjects[:6], subjects[:4]
    pr, tb, cd = "personalized_residuals", "textboost", "custom_diffusion"
    one = dict(photos=1)
    without = {
        "one photo": {}, "augmentation": dict(augment=True),
        "augmentation without words": dict(augment=True, variant="untold"),
        "knowledge preservation": dict(preservation_weight=0.1), "uniform timesteps": dict(timesteps="uniform"),
    }  # fmt: skip
    return {
        "main": [Job("main", m, m, s, lag=m == pr) for s in subjects for m in METHODS],
        "entangled": [
            Job("entangled", pr, pr, s, background=PLACES[i % len(PLACES)], lag=True) for i, s in enumerate(few)
        ],
        "prior": [
            Job("prior", f"{m}, no prior loss", m, s, dict(prior_weight=0.0))
            for s in fewer for m in ("dreambooth", "dreambooth_lora")
        ],
        "custom": [
            Job("custom", what, cd, s, overrides)
            for s in fewer
            for what, overrides in (("no regularization", dict(prior_weight=0.0)), ("augmentation", dict(augment=True)))
        ],
        "place": [Job("place", "low-rank keys and values", pr, s, variant="keys_and_values") for s in fewer],
        "rank": [Job("rank", f"rank {r}", pr, s, dict(rank=r)) for s in fewer for r in (1, 24)],
        "textboost": [
            Job("textboost", name, tb, s, {k: v for k, v in o.items() if k != "variant"}, **one,
                variant=o.get("variant", ""))
            for s in fewer for name, o in without.items()
        ],
        "joint": [
            Job("joint", "joint", cd, a, dict(steps=0), partner=b) for a, b in zip(fewer[::2], fewer[1::2], strict=True)
        ],
    }  # fmt: skip


class Store:
    """The rows of results/quality.csv; several processes may add to it."""

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.model = path, model
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if row["model"] == self.model]

    def done(self) -> set[tuple[str, str, str]]:
        return {(r["section"], r["setting"], r["subject"]) for r in self.rows()}

    def add(self, row: dict[str, Any]) -> None:
        shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items() if k in COLUMNS}
        with self.path.open("a", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            writer = csv.DictWriter(file, COLUMNS, restval="")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(shown)
            file.flush()


class Bench:
    """What one process measures with: the model, the judge, and what the base model draws of each class, once."""

    def __init__(self, work: Path) -> None:
        from pcs_trainer import load_model
        from pcs_trainer.evaluation.image_encoders import JudgeEyes

        self.model, self.eyes, self.work = load_model("tiny"), JudgeEyes(), work
        self.bases: dict[str, Any] = {}
        self.folder = work / model_name()
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)

    def run(self, job: Job) -> Iterator[dict[str, Any]]:
        """The rows of a job."""
        if job.partner:
            yield from self.together(job)
            return
        concept, facts = self.train(job)
        for setting in job.settings:
            yield facts | {"setting": setting} | self.measure(job, concept, setting, lag=setting.endswith("+ LAG"))

    def train(self, job: Job) -> tuple[Any, dict[str, Any]]:
        from pcs_trainer import Trainer
        from pcs_trainer.tiny.subjects import photos, subject

        pictures = [p.picture for p in photos(job.subject, job.photos, background=job.background or None)]
        kind = subject(job.subject).kind
        started, cpu = time.perf_counter(), time.process_time()
        with variants.VARIANTS[job.variant]():
            concept = Trainer(
                self.model, job.method, pictures, kind, check_backend=False, seed=0, **job.overrides
            ).train()
        if concept.meta["finished"] != "1":
            raise SystemExit("stopped; what was being learned is not measured")
        facts = {
            "section": job.section, "subject": job.subject, "method": job.method, "class": kind,
            "photos": job.photos, "steps": concept.meta["steps"],
            "train_seconds": time.perf_counter() - started, "train_cpu_seconds": time.process_time() - cpu,
        }  # fmt: skip
        concept.save(self.concept_file(job))
        return concept, facts

    def concept_file(self, job: Job) -> Path:
        return self.folder / f"{job.section}-{job.setting.replace(' ', '-')}-{job.subject}.safetensors"

    def measure(self, job: Job, concept: Any, setting: str, lag: bool = False, seed: int = 0) -> dict[str, Any]:
        """evaluate on this subject; pictures of some prompts are kept for the contact sheet."""
        from pcs_trainer.evaluation.scores import base_of, evaluate
        from pcs_trainer.tiny.subjects import photos

        seen: dict[str, np.ndarray] = {}
        kind = concept.class_word
        if kind not in self.bases:
            self.bases[kind] = base_of(self.model, kind, draw=self.drawer({}))
        real = [p.picture for p in photos(seed or job.subject, **HELD_OUT)]
        found = evaluate(
            self.model, concept, real, lag=lag, base=self.bases[kind], eyes=self.eyes, draw=self.drawer(seen)
        )
        if job.background:
            found["same_place"] = self.same_place(seen, job.background)
        self.keep(job, concept, setting, seen)
        return found

    def same_place(self, seen: dict[str, np.ndarray], place: str) -> float:
        """How often a picture shows the photos' place though its prompt asks for another."""
        from pcs_trainer.evaluation.scores import ASKS

        wanted = {a.prompt.split("{}")[1]: dict(a.shows).get("background") for a in ASKS}
        others = [
            picture for prompt, picture in seen.items()
            if any(end and prompt.endswith(end) and name not in (None, place) for end, name in wanted.items())
        ]  # fmt: skip
        return float(np.mean([name == place for name in self.eyes.read(others)["background"]]))

    def drawer(self, seen: dict[str, np.ndarray]) -> Callable[..., list[np.ndarray]]:
        from pcs_trainer import sample

        def draw(prompts: list[str], concepts: list[Any], **options: Any) -> list[np.ndarray]:
            drawn = [np.asarray(image) for image in sample(self.model, prompts, concepts, **DRAWN, **options)]
            if concepts:
                seen.update(zip(prompts, drawn, strict=True))
            return drawn

        return draw

    def keep(self, job: Job, concept: Any, setting: str, seen: dict[str, np.ndarray]) -> None:
        from PIL import Image

        if job.section not in ("main", "entangled"):
            return
        name = " ".join((concept.token, concept.class_word))
        pictures = [seen[p] for p in (concept.instance_prompt, *(s.replace("{}", name) for s in SHOWN))]
        path = self.folder / "pictures" / f"{job.section}-{setting.replace(' ', '')}-{job.subject}.png"
        Image.fromarray(np.concatenate(pictures, axis=1)).save(path)

    def together(self, job: Job) -> Iterator[dict[str, Any]]:
        """Two subjects by Custom Diffusion: learned together, and learned alone and merged."""
        from pcs_trainer import Trainer, load_concept
        from pcs_trainer.concept.merging import merge
        from pcs_trainer.settings import EMBEDDED
        from pcs_trainer.tiny.subjects import photos, subject

        pair, steps = (job.subject, job.partner), 2 * EMBEDDED["custom_diffusion"]["steps"]
        given = [
            dict(images=[p.picture for p in photos(s, job.photos)], class_word=subject(s).kind, token=f"<{s}>")
            for s in pair
        ]
        started, cpu = time.perf_counter(), time.process_time()
        joint = Trainer(self.model, job.method, concepts=given, check_backend=False, steps=steps).train()
        took = {"train_seconds": time.perf_counter() - started, "train_cpu_seconds": time.process_time() - cpu}
        alone = []
        for s in pair:
            own = Job("main", job.method, job.method, s)
            file = self.concept_file(own)
            concept = load_concept(file) if file.exists() else self.train(own)[0]
            alone.append(concept.renamed(f"<{s}>"))
        merged = merge(alone, self.model)
        for setting, concept, seconds in (("joint", joint, took), ("merged", merged, {})):
            for s in pair:
                kind = subject(s).kind
                named = {"token": f"<{s}>", "class_word": kind, "instance_prompt": f"photo of a <{s}> {kind}"}
                shown = replace(concept, meta=concept.meta | named)
                facts = {"section": job.section, "setting": setting, "subject": s, "method": job.method, "class": kind}
                yield facts | {"photos": job.photos} | seconds | self.measure(job, shown, setting, seed=s)


def model_name() -> str:
    """A short name of the embedded weights: another one when they change."""
    from pcs_trainer.tiny.common import WEIGHTS

    content = hashlib.sha256()
    for file in sorted(WEIGHTS.rglob("*.safetensors")):
        content.update(file.read_bytes())
    return content.hexdigest()[:10]


def pending(jobs: list[Job], done: set[tuple[str, str, str]]) -> list[Job]:
    def is_done(job: Job) -> bool:
        who = [job.subject, *([job.partner] if job.partner else [])]
        return all((job.section, setting, str(s)) in done for setting in job.settings for s in who)

    return [job for job in jobs if not is_done(job)]


def measure_share(jobs: list[Job], options: argparse.Namespace, until: float) -> None:
    """Every n-th pending job, until the time is over."""
    import torch

    torch.set_num_threads(1)
    store, bench = Store(options.results, model_name()), Bench(options.work)
    share, world = (int(x) for x in options.share.split("/"))
    facts = timing.circumstances() | {"date": datetime.date.today().isoformat()}
    mine = pending(jobs, store.done())[share::world]
    for number, job in enumerate(mine, 1):
        if time.time() > until:
            print(f"[{share}] the time is over; {len(mine) - number + 1} trainings are left", flush=True)
            return
        for row in bench.run(job):
            store.add({"model": store.model} | row | facts)
            say = f"gap closed {row['gap_closed']:.2f}, prompts kept {row['prompt_kept']:.2f}"
            print(
                f"[{share}] {number}/{len(mine)} {job.section}: {row['setting']} of {row['subject']}: {say}", flush=True
            )


def spawn(options: argparse.Namespace, until: float) -> int:
    """One process a core; each takes its share."""
    command = [sys.executable, str(Path(__file__).parent), "--until", str(until), "--subjects", str(options.subjects)]
    command += ["--results", str(options.results), "--work", str(options.work), "--section", *options.section]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, "--share", f"{i}/{options.processes}"], env=environment)
        for i in range(options.processes)
    ]
    return max(worker.wait() for worker in workers)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(sections(2))
    parser.add_argument("--section", nargs="+", choices=names, default=names, help="which of them (default: all)")
    parser.add_argument("--subjects", type=int, default=12, help="subjects of the main table (default 12)")
    parser.add_argument("--minutes", type=float, default=600, help="start no further training after this long")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("out/quality"), help="concepts and pictures")
    parser.add_argument("--docs", action="store_true", help="only make docs/quality.md from the results")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.docs:
        from . import page

        page.write(Store(options.results, model_name()).rows(), options.work / model_name())
        return 0
    until = options.until or time.time() + 60 * options.minutes
    if not options.share:
        return spawn(options, until)
    measure_share([job for name in options.section for job in sections(options.subjects)[name]], options, until)
    return 0
