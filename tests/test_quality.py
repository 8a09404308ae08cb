"""The quality benchmark's own arithmetic: what counts as done, intervals, verdicts, the page from rows."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import torch
from pcs_trainer import load_model
from pcs_trainer.methods import method_named
from pcs_trainer.training.trainer import trainable
from quality import claims, jobs, page, statistics, variants
from quality import pictures as sheets


def row(job, setting, subject, **values):
    facts = {"model": "m", "section": job.section, "setting": setting, "subject": str(subject), "date": "d"}
    return dict.fromkeys(jobs.COLUMNS, "") | facts | {"device": "cpu"} | {k: str(v) for k, v in values.items()}


def every_job():
    return [job for section in jobs.sections(12).values() for job in section]


def test_every_claim_compares_rows_that_the_runs_make():
    made = {(job.section, setting) for job in every_job() for setting in job.settings}
    for group in claims.claims().values():
        for claim in group:
            assert {claim.first, claim.second} <= made and claim.measure in jobs.MEASURES
            assert claim.better in ("more", "less")


def test_the_table_has_twelve_subjects_of_every_method():
    table = jobs.sections(12)["main"]
    assert {(j.method, j.subject) for j in table} == {(m, s) for m in jobs.METHODS for s in range(101, 113)}


def test_a_job_is_done_when_all_its_rows_are_there(tmp_path):
    store = jobs.Store(tmp_path / "quality.csv", "m")
    every = jobs.sections(12)
    residuals, pair = next(j for j in every["main"] if j.lag), every["joint"][0]
    store.add(row(residuals, residuals.setting, residuals.subject))
    assert residuals in jobs.pending([residuals], store.done())
    store.add(row(residuals, f"{residuals.setting} + LAG", residuals.subject))
    assert not jobs.pending([residuals], store.done())
    for setting in ("joint", "merged"):
        store.add(row(pair, setting, pair.subject))
    assert jobs.pending([pair], store.done())
    for setting in ("joint", "merged"):
        store.add(row(pair, setting, pair.partner))
    assert not jobs.pending([pair], store.done())
    assert not jobs.Store(tmp_path / "quality.csv", "other weights").done()


def test_the_interval_is_students():
    mean, half = statistics.interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and half == pytest.approx(3.18 * (5 / 3) ** 0.5 / 2)


@pytest.mark.parametrize(
    ("differences", "better", "says"),
    [
        ([0.2, 0.3, 0.25], "more", "holds"),
        ([0.2, 0.3, 0.25], "less", "reverse"),
        ([-0.2, -0.3, -0.25], "less", "holds"),
        ([-0.2, 0.3, 0.05], "more", "undecided"),
        ([0.2], "more", "not measured"),
    ],
)
def test_a_verdict_follows_the_interval(differences, better, says):
    assert says in statistics.verdict(differences, better)


def test_differences_are_of_the_same_subjects_and_less_the_named_share():
    a, b = ("main", "x"), ("main", "y")
    job = jobs.Job("main", "x", "textboost", 1)
    rows = [row(job, s, n, gap_closed=v) for s, n, v in (("x", 1, 0.9), ("x", 2, 0.8), ("y", 2, 0.5), ("y", 3, 0.1))]
    claim = claims.Claim("", a, b, "gap_closed", "more", 0.5)
    assert statistics.paired(rows, claim) == ([0.8], [0.5])


def test_the_page_shows_what_the_rows_say(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "DOCS", tmp_path)
    monkeypatch.setattr(page.sheets, "figures", lambda *given: None)
    random.seed(1)
    rows = []
    for job in every_job():
        for setting in job.settings:
            level = 0.4 if setting == "textboost" else 0.9
            values = {m: round(random.gauss(level, 0.01), 4) for m in jobs.MEASURES}
            for subject in [job.subject, *([job.partner] if job.partner else [])]:
                rows.append(row(job, setting, subject, train_cpu_seconds=20, **values))
    page.write(rows, tmp_path)
    text = (tmp_path / "quality.md").read_text()
    assert "12 subjects" in text and "not measured" not in text and "nan" not in text
    reached = [line for line in text.splitlines() if line.startswith("| TextBoost") and "not met" in line]
    assert len(reached) == 1 and reached[0].count("**not met**") == 2


def test_residuals_on_keys_and_values_have_as_many_parameters_as_on_proj_out():
    model = load_model("tiny")
    rank = method_named("personalized_residuals").tiny["rank"]
    ours = sum(p.numel() for p in trainable(model, "personalized_residuals", "mug", rank=rank).values())
    with variants.keys_and_values():
        theirs = trainable(model, "personalized_residuals", "mug", rank=rank)
    assert abs(sum(p.numel() for p in theirs.values()) / ours - 1) < 0.05
    assert all("attn2.to_k" in n or "attn2.to_v" in n for n in theirs)
    assert all("proj_out" in n for n in trainable(model, "personalized_residuals", "mug"))


def test_untold_augmentation_changes_pictures_and_names_nothing():
    from pcs_trainer.data.augment import Shown
    from pcs_trainer.data.batches import seeded
    from pcs_trainer.methods import settings_for
    from pcs_trainer.tiny.subjects import photos

    pixels, s = photos(21, 1)[0].picture, settings_for(None, "textboost", class_word="mug")
    change = method_named("textboost").augment(s).change
    told = [change(Shown(pixels), 64, 16, seeded(i)) for i in range(8)]
    with variants.untold():
        silent = [change(Shown(pixels), 64, 16, seeded(i)) for i in range(8)]
    assert any(a.prefix for a in told) and not any(a.prefix for a in silent)
    assert all(torch.equal(torch.from_numpy(a.pixels), torch.from_numpy(b.pixels)) for a, b in zip(told, silent))


def test_a_sheet_whose_pictures_are_elsewhere_stays(tmp_path, capsys):
    kept = tmp_path / "sheet.png"
    kept.write_bytes(b"drawn before")
    sheets.sheet("main", ["101"], ["dreambooth"], kept, tmp_path, {"dreambooth": "DreamBooth"})
    assert kept.read_bytes() == b"drawn before" and "1 of its strips" in capsys.readouterr().out
