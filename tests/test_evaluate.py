"""Measuring: the arithmetic on known answers, the judge on drawn concepts, CLIP and DINO from local folders."""

import sys
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from encoder_cases import write_clip
from pcs_trainer import load_model
from pcs_trainer.cli import entry as cli
from pcs_trainer.cli.commands.evaluate import photos_of
from pcs_trainer.concept.concept import Concept
from pcs_trainer.errors import UsageError
from pcs_trainer.evaluation.comparisons import accuracy, similarities
from pcs_trainer.evaluation.image_encoders import ClipDinoEncoder, JudgeEncoder, kid
from pcs_trainer.evaluation.prompts import ASKS, Ask, filled
from pcs_trainer.evaluation.scores import base_of, evaluate, evaluate_folder
from pcs_trainer.model.fingerprint import fingerprint
from pcs_trainer.tiny import world
from pcs_trainer.tiny.captions import PLACES, WHERE
from pcs_trainer.tiny.judge import FIELDS
from pcs_trainer.tiny.subjects import photos


@pytest.fixture(scope="module")
def eyes():
    return JudgeEncoder()


def pictures_of(seed, n, first=0, **options):
    return [p.picture for p in photos(seed, n, first=first, **options)]


def rendered(ask, seed, kind="mug"):
    """The world's own rendering of what a prompt asks for."""
    return world.render(world.scene(seed, kind=kind, **({"style": "photo", "light": "normal"} | dict(ask.shows))))


# ---- the prompts


def test_the_twenty_prompts_ask_for_what_the_judge_can_read():
    assert len(ASKS) == 20 and len({a.prompt for a in ASKS}) == 20
    for ask in ASKS:
        assert ask.shows and all(value in FIELDS[what] for what, value in ask.shows)
    assert {v for a in ASKS for what, v in a.shows if what == "background"} == set(world.BACKGROUNDS)


def test_each_prompt_says_what_it_is_counted_for():
    said = PLACES | WHERE
    for ask in ASKS:
        for what, value in ask.shows:
            if what in ("background", "position"):
                assert any(words in ask.prompt for words in said[value]), ask


def test_articles_follow_the_word():
    assert filled("a photo of a {} at night", "umbrella") == "a photo of an umbrella at night"
    assert filled("a photo of a {} at night", "<x> umbrella") == "a photo of a <x> umbrella at night"


def test_true_pictures_are_read_as_right_and_pictures_of_other_prompts_are_not(eyes):
    right = accuracy(eyes, ASKS, [rendered(a, i) for i, a in enumerate(ASKS)])
    other = accuracy(eyes, ASKS, [rendered(a, i) for i, a in enumerate([*ASKS[7:], *ASKS[:7]])])
    assert right["all"] >= 0.9 and right["background"] >= 0.9
    assert other["all"] <= 0.4


# ---- the arithmetic


def test_kid_is_the_sum_written_out():
    a, b = torch.randn(5, 3), torch.randn(4, 3)

    def k(x, y):
        return float((x.double() @ y.double() / 3 + 1) ** 3)

    expected = (
        sum(k(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
        + sum(k(b[i], b[j]) for i in range(4) for j in range(4) if i != j) / 12
        - 2 * sum(k(x, y) for x in a for y in b) / 20
    )
    assert kid(a, b) == pytest.approx(expected, rel=1e-9)


def test_other_photos_of_the_subject_close_the_gap_and_its_class_does_not(eyes):
    real, same = pictures_of(21, 6, first=100), pictures_of(21, 6)
    kind = photos(21, 1)[0].scene.kind
    base, others = (
        [p for seed in seeds for p in pictures_of(seed, 1, kind=kind)] for seeds in (range(30, 54), range(60, 84))
    )
    assert similarities(eyes, same, real, base)["gap_closed"] > 0.9
    assert abs(similarities(eyes, others, real, base)["gap_closed"]) < 0.35
    assert similarities(eyes, base, real, base)["gap_closed"] == pytest.approx(0)


# ---- concepts


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


def nothing_learned(model, word="mug"):
    """A concept whose word starts from the class word and that changes nothing else."""
    from pcs_trainer.data.prompts import first_rows

    meta = {"token": "<mug>", "class_word": word, "instance_prompt": f"a photo of a <mug> {word}"}
    return Concept("textual_inversion", {}, {"<mug>": first_rows(model, word)}, meta, fingerprint(model))


@pytest.mark.slow
def test_a_concept_that_learned_nothing_closes_no_gap_and_keeps_the_class(tiny):
    asks = ASKS[:3]
    found = evaluate(tiny, nothing_learned(tiny), pictures_of(21, 4, kind="mug"), prompts=asks, count=3, steps=3)
    assert abs(found["gap_closed"]) < 0.4
    assert found["drift_to_subject"] == 0  # the class prompt does not hold the word: the same pictures
    assert found["class_accuracy"] == found["class_accuracy_base"]
    assert 0 < found["diversity"] < 1 and found["parameters"] == 128
    assert found["prompt_kept"] == pytest.approx(found["prompt_accuracy"] / found["prompt_accuracy_base"])


def test_the_measures_follow_the_pictures(tiny):
    """Drawing is replaced by the world's own pictures: what is measured is then known."""
    real = pictures_of(21, 6, first=100, kind="mug")

    def draw(prompts, concepts, **options):
        if len(prompts) == len(ASKS):
            return [rendered(a, i) for i, a in enumerate(ASKS)]
        if concepts and "<mug>" in prompts[0]:
            return pictures_of(21, len(prompts), kind="mug")
        return [rendered(Ask("", ""), 50 + i) for i in range(len(prompts))]

    base = base_of(tiny, "mug", draw=draw)
    found = evaluate(tiny, nothing_learned(tiny), real, base=base, draw=draw)
    assert found["gap_closed"] > 0.85 and found["prompt_kept"] == 1 and found["drift_to_subject"] == 0
    assert found["prompt_accuracy"] >= 0.9 and found["class_accuracy"] == 1


def test_each_subject_of_a_concept_is_measured_by_its_own_photos(tiny):
    concept = nothing_learned(tiny)
    both = {"subjects": '[["<mug>", "mug"], ["<car>", "car"]]'}
    joint = Concept(concept.method, {}, concept.words, concept.meta | both, concept.base)
    kinds, asked = {"<mug>": "mug", "<car>": "car"}, []

    def draw(prompts, concepts, **options):
        asked.extend(prompts if concepts else [])
        word = next((w for w in kinds if w in prompts[0]), None)
        return pictures_of(21 if word == "<mug>" else 22, len(prompts), kind=kinds.get(word, "fish"))

    photos = {"<mug>": pictures_of(21, 3, first=100, kind="mug"), "<car>": pictures_of(23, 3, first=100, kind="car")}
    found = evaluate(tiny, joint, photos, prompts=["a {} at night"], count=3, draw=draw)
    assert found["<mug>/gap_closed"] > 0.8 > found["<car>/gap_closed"]
    assert found["gap_closed"] == pytest.approx((found["<mug>/gap_closed"] + found["<car>/gap_closed"]) / 2)
    assert {"a photo of a <mug> mug", "a photo of a <car> car", "a <car> car at night"} <= set(asked)
    alone = evaluate(tiny, joint, {"<mug>": photos["<mug>"]}, prompts=["a {} at night"], count=3, draw=draw)
    assert alone["gap_closed"] == pytest.approx(found["<mug>/gap_closed"]) and not any("/" in name for name in alone)
    with pytest.raises(ValueError, match="has the subjects '<mug>', '<car>': give the photos of each"):
        evaluate(tiny, joint, photos["<mug>"], draw=draw)
    with pytest.raises(ValueError, match="photos of '<cat>', and the subjects"):
        evaluate(tiny, joint, {"<cat>": photos["<mug>"]}, draw=draw)


def test_the_command_is_told_whose_photos_they_are(tmp_path):
    both = Concept("x", {}, {}, {"token": "<a>", "class_word": "mug", "subjects": '[["<a>", "mug"], ["<b>", "cat"]]'})
    one = Concept("x", {}, {}, {"token": "<a>", "class_word": "mug"})
    folder = str(tmp_path)
    assert photos_of([folder], one) == folder and photos_of([f"<a>={folder}"], one) == {"<a>": folder}
    assert photos_of([f"<b>={folder}", "<a>=x"], both) == {"<b>": folder, "<a>": "x"}
    for wrong in ([folder], [f"<c>={folder}"], ["<a>=x", "<a>=y"], ["<a>"]):
        with pytest.raises(
            UsageError, match=r"say once for each subject .* --photos '<a>=FOLDER' --photos '<b>=FOLDER'"
        ):
            photos_of(wrong, both)


def test_a_prompt_without_a_place_for_the_subject_is_one_sentence(tiny):
    with pytest.raises(ValueError, match=r"must hold \{\}"):
        evaluate(tiny, nothing_learned(tiny), pictures_of(21, 2), prompts=["a photo of a dog"])


def test_pres_is_the_class_compared_with_the_subject_and_div_the_mean_distance_of_pairs(tiny, eyes, monkeypatch):
    """DreamBooth's table 3, by pictures that are known and an LPIPS that counts brightness."""
    real = pictures_of(21, 3, first=100, kind="mug")
    kept, before = pictures_of(22, 3, kind="mug"), pictures_of(23, 3, kind="mug")
    shades = [np.full((64, 64, 3), level, np.uint8) for level in (0, 51, 255)]

    class LPIPS:
        def __init__(self, net, verbose):
            assert net == "alex" and not verbose

        def __call__(self, a, b):
            assert a.shape == b.shape == (1, 3, 64, 64) and float(a.min()) >= -1 and float(a.max()) <= 1
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    def draw(prompts, concepts, **options):
        if "<mug>" in prompts[0]:
            return shades[: len(prompts)]
        return (kept if concepts else before)[: len(prompts)]

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=LPIPS))
    options = dict(prompts=["a {} at night"], count=3, draw=draw)
    found = evaluate(tiny, nothing_learned(tiny), real, lpips=True, **options)
    assert found["pres"] == pytest.approx(float((eyes.subject(kept) @ eyes.subject(real).T).mean()))
    assert found["pres_base"] == pytest.approx(float((eyes.subject(before) @ eyes.subject(real).T).mean()))
    assert found["div"] == pytest.approx((0.4 + 2 + 1.6) / 3) and 0 < found["div_class"] != found["div_class_base"] > 0
    plain = evaluate(tiny, nothing_learned(tiny), real, **options)
    assert plain["pres"] == found["pres"] and not any(name.startswith("div_") or name == "div" for name in plain)


def test_a_class_that_became_the_subject_has_a_higher_pres(tiny):
    """By the judge: with pictures of the subject in place of the class's."""
    real = pictures_of(21, 4, first=100, kind="mug")

    def drawn(of_class):
        return lambda prompts, concepts, **_: pictures_of(of_class if concepts else 40, len(prompts), kind="mug")

    low, high = (
        evaluate(tiny, nothing_learned(tiny), real, prompts=["a {}"], count=4, draw=drawn(seed)) for seed in (40, 21)
    )
    assert low["pres"] == low["pres_base"] == high["pres_base"] < high["pres"] - 0.2


def test_what_div_lacks_is_one_sentence_before_anything_is_drawn(tiny, monkeypatch, tmp_path, capsys):
    def broken(**_):
        raise URLError("no network")

    def draw(*_, **__):
        raise AssertionError("nothing is to be drawn")

    def of_another_torch(**_):
        raise RuntimeError("operator torchvision::nms does not exist")

    for module, says in (
        (None, "pip install lpips"),
        (SimpleNamespace(LPIPS=of_another_torch), "cannot be imported .*nms does not exist"),
        (SimpleNamespace(LPIPS=broken), "could not be fetched .*no network"),
    ):
        monkeypatch.setitem(sys.modules, "lpips", module)
        with pytest.raises(ValueError, match=says) as error:
            evaluate(tiny, nothing_learned(tiny), pictures_of(21, 2), lpips=True, draw=draw)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "lpips", None)
    assert cli.main(["evaluate", str(tmp_path), "--photos", str(tmp_path), "--lpips"]) == 2
    assert "--lpips: the package lpips is not installed. Fix: pip install lpips" in capsys.readouterr().err


# ---- folders, by the judge


def test_a_folder_of_the_subjects_pictures_is_measured_by_the_judge(tmp_path):
    from PIL import Image

    for i, photo in enumerate(photos(21, 4)):
        Image.fromarray(photo.picture).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(photo.caption)
    found = evaluate_folder(tmp_path, photos=pictures_of(21, 4, first=100), judge=True)
    strangers = evaluate_folder(pictures_of(22, 4), photos=pictures_of(21, 4, first=100), judge=True)
    assert found["pictures"] == 4 and found["subject_similarity"] > strangers["subject_similarity"] + 0.2
    assert "text_similarity" in found and "text_similarity" not in strangers
    wrong = evaluate_folder(tmp_path, prompts=[photos(22, 1, kind="rocket")[0].caption] * 4, judge=True)
    assert wrong["text_similarity"] < found["text_similarity"]


# ---- CLIP and DINO from folders


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(4)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    ViTModel(ViTConfig(image_size=48, patch_size=8, **sizes)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"size": {"height": 48, "width": 48}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    return folder


def test_clip_is_asked_as_transformers_asks_it(clip_folder):
    from PIL import Image
    from transformers import CLIPModel, CLIPTokenizer

    pictures, prompts = pictures_of(21, 2), ["a red mug", "a mug in the snow"]
    eyes = ClipDinoEncoder(clip=clip_folder)
    net, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    shown = np.stack([np.asarray(Image.fromarray(p).resize((32, 32), Image.Resampling.BICUBIC)) for p in pictures])
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.from_numpy((shown / 255 - mean) / std).float().permute(0, 3, 1, 2)
    said = tokenizer(prompts, padding="max_length", max_length=20, return_tensors="pt")
    with torch.no_grad():
        out = net(input_ids=said["input_ids"], attention_mask=said["attention_mask"], pixel_values=pixels)
    torch.testing.assert_close(eyes.image(pictures), out.image_embeds, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(eyes.text(prompts), out.text_embeds, atol=1e-5, rtol=1e-4)
    found = evaluate_folder(pictures, prompts=prompts, clip=clip_folder)
    assert found["text_similarity"] == pytest.approx(
        float((out.image_embeds * out.text_embeds).sum(1).mean()), abs=1e-5
    )


def test_dino_is_the_first_token_and_measures_subjects(dino_folder, clip_folder):
    from transformers import ViTModel

    pictures, real = pictures_of(21, 3), pictures_of(21, 3, first=100)
    net = ViTModel.from_pretrained(dino_folder).eval()
    eyes = ClipDinoEncoder(dino=dino_folder)
    with torch.no_grad():
        rows = net(eyes.dino.preprocess(pictures)).last_hidden_state[:, 0]
    torch.testing.assert_close(eyes.subject(pictures), torch.nn.functional.normalize(rows, dim=1))
    found = evaluate_folder(pictures, photos=real, clip=clip_folder, dino=dino_folder)
    expected = float((eyes.subject(pictures) @ eyes.subject(real).T).mean())
    assert found["subject_similarity"] == pytest.approx(expected, abs=1e-6)
    assert {"image_similarity", "subject_similarity_real", "kid"} <= set(found)


def test_pictures_of_any_shape_are_cut_to_their_middle(dino_folder):
    wide = np.zeros((30, 90, 3), np.uint8)
    wide[:, 30:60] = 255
    prepared = ClipDinoEncoder(dino=dino_folder).dino.preprocess([wide])
    assert prepared.shape == (1, 3, 48, 48)
    assert float(prepared[..., 2:-2].min()) == pytest.approx(1.0)  # white, less (0.5, 0.5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: evaluate_folder(p, photos=p), "name a CLIP or DINO model on this machine"),
        (
            lambda p: evaluate_folder(p, photos=p, clip="nowhere/clip"),
            "no CLIP model in nowhere/clip.*clip-vit-base-patch32",
        ),
        (lambda p: evaluate_folder(p, photos=p, dino="nowhere/dino"), "there is no DINO model in nowhere/dino"),
        (lambda p: evaluate_folder(p, judge=True), "nothing to measure against"),
        (lambda p: evaluate_folder(p, prompts=["one"], judge=True), "2 pictures and 1 prompts"),
    ],
)
def test_what_is_missing_is_one_sentence(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call(pictures_of(21, 2))
    assert "\n" not in str(error.value)


def test_a_folder_that_is_no_model_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a CLIP model") as error:
        ClipDinoEncoder(clip=tmp_path)
    assert "\n" not in str(error.value)
