"""One process of the quality benchmark: train, sample, let the judge measure, write the rows."""

from __future__ import annotations

import argparse
import datetime
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timing

from .jobs import Job, Store, model_name, pending
from .variants import VARIANTS

HELD_OUT: dict[str, Any] = {"n": 8, "first": 100}  # photos that images are compared with; no training uses them
DRAWN: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 15, "batch": 10}
SHOWN = ("a photo of a {} on the beach", "a photo of a {} in the snow", "a photo of a {} at night")


class Bench:
    """What one process measures with: the model, the judge, and the base model's measures of each class, made once."""

    def __init__(self, work: Path) -> None:
        from pcs_trainer import load_model
        from pcs_trainer.evaluation.image_encoders import JudgeEncoder

        self.model, self.judge, self.work = load_model("tiny"), JudgeEncoder(), work
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
        with VARIANTS[job.variant]():
            concept = Trainer(
                self.model, job.method, pictures, kind, check_backend=False, seed=0, **job.overrides
            ).train()
        if concept.meta["finished"] != "1":
            raise SystemExit("training was stopped; the unfinished concept is not measured")
        facts = {
            "section": job.section,
            "subject": job.subject,
            "method": job.method,
            "class": kind,
            "photos": job.photos,
            "steps": concept.meta["steps"],
            "train_seconds": time.perf_counter() - started,
            "train_cpu_seconds": time.process_time() - cpu,
        }
        concept.save(self.concept_file(job))
        return concept, facts

    def concept_file(self, job: Job) -> Path:
        return self.folder / f"{job.section}-{job.setting.replace(' ', '-')}-{job.subject}.safetensors"

    def measure(self, job: Job, concept: Any, setting: str, lag: bool = False, seed: int = 0) -> dict[str, Any]:
        """Scores of a concept on its subject; the images of some prompts are kept for the contact sheet."""
        from pcs_trainer.evaluation.scores import base_of, evaluate
        from pcs_trainer.tiny.subjects import photos

        seen: dict[str, np.ndarray] = {}
        kind = concept.class_word
        if kind not in self.bases:
            self.bases[kind] = base_of(self.model, kind, draw=self.drawer({}))
        real = [p.picture for p in photos(seed or job.subject, **HELD_OUT)]
        found = evaluate(
            self.model, concept, real, lag=lag, base=self.bases[kind], eyes=self.judge, draw=self.drawer(seen)
        )
        if job.background:
            found["same_place"] = self.same_place(seen, job.background)
        self.keep(job, concept, setting, seen)
        return found

    def same_place(self, seen: dict[str, np.ndarray], place: str) -> float:
        """How often an image shows the photos' place although its prompt asks for another."""
        from pcs_trainer.evaluation.prompts import ASKS

        wanted = {a.prompt.split("{}")[1]: dict(a.shows).get("background") for a in ASKS}
        others = [
            picture
            for prompt, picture in seen.items()
            if any(end and prompt.endswith(end) and name not in (None, place) for end, name in wanted.items())
        ]
        return float(np.mean([name == place for name in self.judge.read(others)["background"]]))

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
        name = concept.subject_words
        pictures = [seen[p] for p in (concept.instance_prompt, *(s.replace("{}", name) for s in SHOWN))]
        path = self.folder / "pictures" / f"{job.section}-{setting.replace(' ', '')}-{job.subject}.png"
        Image.fromarray(np.concatenate(pictures, axis=1)).save(path)

    def together(self, job: Job) -> Iterator[dict[str, Any]]:
        """Two subjects by Custom Diffusion: trained jointly, and trained separately and merged."""
        from pcs_trainer import Trainer, load_concept
        from pcs_trainer.concept.merging import merge
        from pcs_trainer.methods import method_named
        from pcs_trainer.tiny.subjects import photos, subject

        pair, steps = (job.subject, job.partner), 2 * method_named("custom_diffusion").tiny["steps"]
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
            for number, s in enumerate(pair):
                kind, own = subject(s).kind, concept.of_subject(number)
                shown = replace(own, meta=own.meta | {"instance_prompt": f"photo of a <{s}> {kind}"})
                facts = {"section": job.section, "setting": setting, "subject": s, "method": job.method, "class": kind}
                yield facts | {"photos": job.photos} | seconds | self.measure(job, shown, setting, seed=s)


def measure_share(jobs: list[Job], options: argparse.Namespace, until: float) -> None:
    """Run every n-th pending job until the time is over."""
    import torch

    torch.set_num_threads(1)
    store, bench = Store(options.results, model_name()), Bench(options.work)
    share, world = (int(x) for x in options.share.split("/"))
    facts = timing.circumstances() | {"date": datetime.date.today().isoformat()}
    mine = pending(jobs, store.done())[share::world]
    for number, job in enumerate(mine, 1):
        if time.time() > until:
            print(f"[{share}] time is over; {len(mine) - number + 1} training runs are left", flush=True)
            return
        for row in bench.run(job):
            store.add({"model": store.model} | row | facts)
            say = f"subject fidelity {row['gap_closed']:.2f}, prompt fidelity {row['prompt_kept']:.2f}"
            print(
                f"[{share}] {number}/{len(mine)} {job.section}: {row['setting']} of {row['subject']}: {say}", flush=True
            )
