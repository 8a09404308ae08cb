"""What the papers claim, each sentence as a comparison of two settings that could come out the other way."""

from __future__ import annotations

from dataclasses import dataclass

from .jobs import KINDS, LAG, NAMES, PR

Place = tuple[str, str]  # (section, setting)
CUSTOM, RESIDUALS, WITH_LAG = ("main", "custom_diffusion"), ("main", PR), ("main", LAG)
ON_TEXT = ("place", "low-rank keys and values")
ONE_PLACE = (("entangled", LAG), ("entangled", PR))
ONE_PHOTO, AUGMENTED = ("textboost", "one photo"), ("textboost", "augmentation")


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper as a comparison that could come out the other way.

    `first` and `second` are (section, setting); `better` is "more" or "less" of `measure` in the first than `share` of
    it in the second.
    """

    says: str
    first: Place
    second: Place
    measure: str
    better: str
    share: float = 1.0


PRIOR = (
    ("class drift towards the subject is smaller", "drift_to_subject", "less"),
    ("class images change less", "drift_distance", "less"),
    ("prompt fidelity is higher", "prompt_kept", "more"),
)
TEXTBOOST = (
    ("augmentation with words for it, compared with no augmentation", AUGMENTED, ONE_PHOTO),
    (
        "augmentation with words for it, compared with augmentation without them",
        AUGMENTED,
        ("textboost", "augmentation without words"),
    ),
    ("knowledge preservation, compared with none", ("textboost", "knowledge preservation"), ONE_PHOTO),
    ("SNR timesteps, compared with uniform ones", ONE_PHOTO, ("textboost", "uniform timesteps")),
)
BOTH_AIMS = (("subject fidelity is higher", "gap_closed"), ("prompt fidelity is higher", "prompt_kept"))


def claims() -> dict[str, list[Claim]]:
    """Heading of docs/quality.md -> its claims."""
    return {
        "DreamBooth: the prior loss": [
            Claim(
                f"{NAMES[m]}: with the prior loss {says}", ("main", m), ("prior", f"{m}, no prior loss"), what, better
            )
            for m in ("dreambooth", "dreambooth_lora")
            for says, what, better in PRIOR
        ],
        **of_custom_diffusion(),
        **of_personalized_residuals(),
        "TextBoost from a single photo": [
            Claim(f"{part}: {says}", first, second, measure, "more")
            for part, first, second in TEXTBOOST
            for says, measure in BOTH_AIMS
        ],
    }


def of_custom_diffusion() -> dict[str, list[Claim]]:
    plain, augmented = ("custom", "no regularization"), ("custom", "augmentation")
    joint, merged = ("joint", "joint"), ("joint", "merged")
    alone = "merging keeps 85 % of the subject similarity of separate training"
    return {
        "Custom Diffusion: regularization and augmentation": [
            Claim("regularization images reduce class drift", CUSTOM, plain, "drift_to_subject", "less"),
            Claim("regularization images raise prompt fidelity", CUSTOM, plain, "prompt_kept", "more"),
            Claim("augmentation raises subject fidelity", augmented, CUSTOM, "gap_closed", "more"),
        ],
        "Custom Diffusion: two subjects": [
            Claim("joint training has higher subject fidelity than merging", joint, merged, "gap_closed", "more"),
            Claim(alone, merged, CUSTOM, "subject_similarity", "more", 0.85),
        ],
    }


def of_personalized_residuals() -> dict[str, list[Claim]]:
    closer = "residuals on proj_out have higher subject fidelity than on keys and values, same parameter count"
    kept = "residuals on proj_out have higher prompt fidelity than on keys and values"
    subject = "LAG keeps 95 % of the subject similarity"
    return {
        "Personalized Residuals: where and how much": [
            Claim(closer, RESIDUALS, ON_TEXT, "gap_closed", "more"),
            Claim(kept, RESIDUALS, ON_TEXT, "prompt_kept", "more"),
            *(
                Claim(
                    f"rank 8 has higher subject fidelity than rank {r}",
                    RESIDUALS,
                    ("rank", f"rank {r}"),
                    "gap_closed",
                    "more",
                )
                for r in (1, 24)
            ),
        ],
        "LAG, by what the prompt asks for": [
            *(Claim(f"LAG raises {kind} accuracy", WITH_LAG, RESIDUALS, f"accuracy_{kind}", "more") for kind in KINDS),
            Claim(subject, WITH_LAG, RESIDUALS, "subject_similarity", "more", 0.95),
        ],
        "LAG where all photos share one place": [
            Claim("LAG raises background accuracy", *ONE_PLACE, "accuracy_background", "more"),
            Claim("LAG shows the photos' place less often in other prompts", *ONE_PLACE, "same_place", "less"),
            Claim(subject, *ONE_PLACE, "subject_similarity", "more", 0.95),
        ],
    }
