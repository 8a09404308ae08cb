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
    ("the class drifts less towards the subject", "drift_to_subject", "less"),
    ("the class's pictures change less", "drift_distance", "less"),
    ("prompts are kept better", "prompt_kept", "more"),
)
TEXTBOOST = (
    ("augmentation that names itself against none", AUGMENTED, ONE_PHOTO),
    ("augmentation with words for it against without", AUGMENTED, ("textboost", "augmentation without words")),
    ("knowledge preservation against none", ("textboost", "knowledge preservation"), ONE_PHOTO),
    ("SNR timesteps against uniform ones", ONE_PHOTO, ("textboost", "uniform timesteps")),
)
BOTH_AIMS = (("closer to the subject", "gap_closed"), ("prompts kept better", "prompt_kept"))


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
    alone = "a merged subject keeps 85 % of its similarity alone"
    return {
        "Custom Diffusion: regularization and augmentation": [
            Claim("regularization pictures hold back drift", CUSTOM, plain, "drift_to_subject", "less"),
            Claim("regularization pictures keep prompts", CUSTOM, plain, "prompt_kept", "more"),
            Claim("augmentation brings the subject closer", augmented, CUSTOM, "gap_closed", "more"),
        ],
        "Custom Diffusion: two subjects": [
            Claim("learned together they are closer than merged", joint, merged, "gap_closed", "more"),
            Claim(alone, merged, CUSTOM, "subject_similarity", "more", 0.85),
        ],
    }


def of_personalized_residuals() -> dict[str, list[Claim]]:
    closer = "on proj_out they are closer than on keys and values of as many parameters"
    kept = "on proj_out prompts are kept better than on keys and values"
    subject = "LAG keeps 95 % of the subject"
    return {
        "Personalized Residuals: where and how much": [
            Claim(closer, RESIDUALS, ON_TEXT, "gap_closed", "more"),
            Claim(kept, RESIDUALS, ON_TEXT, "prompt_kept", "more"),
            *(
                Claim(f"rank 8 is closer than rank {r}", RESIDUALS, ("rank", f"rank {r}"), "gap_closed", "more")
                for r in (1, 24)
            ),
        ],
        "LAG, by what the prompt asks for": [
            *(
                Claim(f"LAG keeps {kind} prompts better", WITH_LAG, RESIDUALS, f"accuracy_{kind}", "more")
                for kind in KINDS
            ),
            Claim(subject, WITH_LAG, RESIDUALS, "subject_similarity", "more", 0.95),
        ],
        "LAG where all photos share one place": [
            Claim("LAG raises background accuracy", *ONE_PLACE, "accuracy_background", "more"),
            Claim("LAG draws the photos' place less often in other prompts", *ONE_PLACE, "same_place", "less"),
            Claim(subject, *ONE_PLACE, "subject_similarity", "more", 0.95),
        ],
    }
