"""Learn a subject from four photos and sample it in new places:  python examples/train_and_sample.py [STEPS]"""

import sys
from pathlib import Path

from pcs_trainer import Trainer, load_model, sample

photos = Path(__file__).parent / "photos"
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 300

model = load_model("tiny")  # or a diffusers folder, a checkpoint file, a hub name
trainer = Trainer(model, "personalized_residuals", photos, class_word="mug", out="out/example", steps=steps)
concept = trainer.train(on_event=print)  # also saved, as out/example/concept.safetensors

prompts = [f"a {concept.subject_words} {place}" for place in ("on the beach", "in the snow", "at night")]
for prompt, image in zip(prompts, sample(model, prompts, [concept], lag=True, seed=7), strict=True):
    path = Path("out/example") / f"{prompt.split()[-1]}.png"
    image.save(path)
    print(path, "shows", prompt)
