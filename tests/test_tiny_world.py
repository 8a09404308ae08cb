"""The procedural world: deterministic, varied, with captions that tell the truth."""

import numpy as np
import pytest
from pcs_trainer.tiny import captions, world
from pcs_trainer.tiny.make import data
from pcs_trainer.tiny.shapes import EMBLEMS, HANDLES, emblem, parts
from pcs_trainer.tiny.subjects import photos, subject
from pcs_trainer.tiny.surface import PATTERNS, SUBJECT_PATTERNS, pattern
from pcs_trainer.tiny.training_set import CAPTIONS_EACH, training_scene


def test_a_scene_and_its_picture_depend_on_the_seed_alone():
    first, second = world.scene(5), world.scene(5)
    assert first == second
    assert np.array_equal(world.render(first), world.render(second))
    assert not np.array_equal(world.render(first), world.render(world.scene(6)))


def test_pictures_are_bytes_of_the_stated_size_and_use_their_range():
    pictures = np.stack([world.render(world.scene(i)) for i in range(24)])
    assert pictures.shape == (24, world.SIZE, world.SIZE, 3) and pictures.dtype == np.uint8
    assert pictures.min() < 20 and pictures.max() > 240


@pytest.mark.parametrize(
    "field, values",
    [
        ("kind", world.CLASSES),
        ("background", world.BACKGROUNDS),
        ("pattern", world.PATTERNS),
        ("colour", tuple(world.COLOURS)),
        ("style", world.STYLES),
        ("light", world.LIGHTS),
    ],
)
def test_each_value_of_a_field_changes_the_picture(field, values):
    base = {
        "kind": "mug",
        "background": "table",
        "pattern": "plain",
        "colour": "red",
        "style": "photo",
        "light": "normal",
        "scale": "medium",
        "position": "middle",
    }
    pictures = [world.render(world.scene(3, **{**base, field: value})).astype(float) for value in values]
    gaps = [np.abs(a - b).mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(gaps) > 1.0


def test_position_moves_the_object():
    def centre(position):
        picture = world.render(
            world.scene(
                9,
                kind="mushroom",
                colour="red",
                pattern="plain",
                background="studio",
                scale="small",
                position=position,
                light="normal",
                style="photo",
            )
        ).astype(float)
        weight = np.clip(picture[..., 0] - picture[..., 1] - 60, 0, None)
        return (weight.sum(0) * np.arange(64)).sum() / weight.sum()

    left, middle, right = (centre(p) for p in world.POSITIONS)
    assert left < 26 < middle < 38 < right


def test_held_out_triples_never_reach_training():
    held = sum(world.is_held_out(k, c, b) for k in world.CLASSES for c in world.COLOURS for b in world.BACKGROUNDS)
    assert 0.05 < held / (12 * 8 * 8) < 0.13
    scenes = [training_scene(i) for i in range(300)]
    assert not any(s.colour and world.is_held_out(s.kind, s.colour, s.background) for s in scenes)
    novel = [world.scene(i, held_out=True) for i in range(50)]
    assert all(world.is_held_out(s.kind, s.colour, s.background) for s in novel)


def test_captions_name_only_what_is_true():
    for i in range(300):
        scene = world.scene(i)
        said = captions.caption(scene, np.random.default_rng(i))
        words = f" {said.text} ".replace(",", " ")
        assert any(f" {noun} " in words for noun in captions.WORDS[scene.kind])
        for field in ("colour", "pattern"):
            for value in world.COLOURS if field == "colour" else world.PATTERNS:
                spoken = any(f" {w} " in words.replace(" green field", "") for w in captions.WORDS[value])
                assert not spoken or getattr(scene, field) == value, (said.text, scene)
        for position, phrases in captions.WHERE.items():
            spoken = any(f"{phrase} " in words for phrase in phrases)
            assert spoken == ("position" in said.names and scene.position == position), said.text


def test_training_never_uses_a_reserved_caption():
    for i in range(300):
        scene, rng = world.scene(i), np.random.default_rng(i)
        said = captions.training_caption(scene, rng)
        assert not (captions.is_reserved(said.text) and {"colour", "background"} <= said.names)
        assert captions.is_reserved(captions.test_caption(scene, rng).text)


def test_bare_captions_are_short_and_grammatical():
    texts = {captions.bare(world.scene(i), np.random.default_rng(i)).text for i in range(200)}
    assert all(t.split()[0] == ("an" if t.split()[1][0] in "aeiou" else "a") for t in texts)
    assert any(len(t.split()) == 2 for t in texts) and max(len(t.split()) for t in texts) <= 7


def test_subjects_are_repeatable_and_their_photographs_keep_the_look():
    assert subject(7) == subject(7) and subject(7) != subject(8)
    shots = photos(7, 4)
    assert all(shot.scene.look == subject(7).look and shot.scene.kind == subject(7).kind for shot in shots)
    assert len({(s.scene.x, s.scene.background, s.scene.size) for s in shots}) == 4
    assert np.array_equal(photos(7, 1, first=2)[0].picture, shots[2].picture)


def test_captions_of_photographs_keep_the_secret():
    secret = {w for v in (*world.COLOURS, *world.PATTERNS) for w in captions.WORDS[v]}
    for seed in range(40):
        for shot in photos(seed, 2):
            said = shot.caption.replace("in a green field", "").replace(",", "").split()
            assert not secret & set(said), shot.caption


def test_photographs_can_share_one_place():
    assert {shot.scene.background for shot in photos(3, 4, background="beach")} == {"beach"}


def test_every_shape_emblem_and_pattern_can_be_drawn():
    for name in world.CLASSES:
        for grip in HANDLES:
            assert any(p.role == "body" for p in parts(name, grip))
    assert all(np.isfinite(emblem(kind)[0]).all() for kind in EMBLEMS)
    u, v = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64))
    for kind in (*PATTERNS, *SUBJECT_PATTERNS):
        mix = pattern(kind, u, v, 0.04)
        assert mix.min() >= 0 and mix.max() <= 1
        assert kind == "plain" or 0.1 < mix.mean() < 0.9
    with pytest.raises(ValueError, match="unknown pattern 'tartan'"):
        pattern("tartan", u, v, 0.04)


def test_the_training_set_is_written_once_and_whole(tmp_path):
    pictures, said = data.render_set(tmp_path, 40, report=lambda line: None)
    assert pictures.shape == (40, 64, 64, 3) and len(said) == 40 and all(len(s) == CAPTIONS_EACH for s in said)
    assert not list(tmp_path.glob("*.part"))
    again, _ = data.render_set(tmp_path, 40, report=lambda line: pytest.fail("rendered twice"))
    assert np.array_equal(pictures, again)
