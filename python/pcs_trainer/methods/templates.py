"""Lists of subject prompts, for methods that train on many: what differs between them is not learned as the subject."""

from __future__ import annotations

# In the manner of the ImageNet prompts of CLIP's authors, from which the code of Textual Inversion and the experiments
# of TextBoost draw theirs. The first is the one that a concept is shown and tested with.
PHOTOS = (
    "a photo of {token}",
    "a photo of a {token}",
    "a photo of one {token}",
    "a photo of my {token}",
    "a photo of the {token}",
    "a picture of a {token}",
    "a snapshot of the {token}",
    "a close up of a {token}",
    "a close up photo of the {token}",
    "a photo of a small {token}",
    "a photo of a large {token}",
    "a photo of a nice {token}",
    "a photo of a clean {token}",
    "a bright photo of a {token}",
    "a dark photo of the {token}",
    "a sharp photo of a {token}",
    "a blurry photo of a {token}",
    "a cropped photo of the {token}",
    "a good photo of a {token}",
    "a rendering of a {token}",
    "a view of the {token}",
)
