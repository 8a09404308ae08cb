"""The flags of pcs train, and the settings that they are values of."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

from ...errors import UsageError
from ...settings import MOST, Settings, literal_choices
from ...unet import PLAN_NAMES
from ..options import Option, byte_size, grouped, integer, number, one_of
from ..setting_values import as_kind
from .common import HOLDING, METHOD, MODEL_FLAGS, RAM, RESOLUTION, STATES, say


def further_subject(text: str) -> str:
    """A check of a flag's text: a further subject's FOLDER=WORD[:TOKEN]."""
    folder, _, words = text.rpartition("=")
    if not folder or not words.split(":")[0].strip():
        raise argparse.ArgumentTypeError(f"expected FOLDER=WORD, such as my-cat=cat or my-cat=cat:<tom>, got {text!r}")
    if not Path(folder).expanduser().exists():
        raise argparse.ArgumentTypeError(f"{folder} does not exist; give a folder of photos")
    return text


OWN = "the method's"
IDENTIFIERS, SCHEDULES, OPTIMIZERS, PRIORS, CROPS = (
    literal_choices(get_type_hints(Settings)[n]) for n in ("identifier", "lr_schedule", "optimizer", "prior", "crop")
)

# fmt: off
OPTIONS = (
    *grouped(
        "words",
        Option("photos", "a folder of photos, or single photos", metavar="PHOTOS", many=True),
    ),
    *grouped(
        "what to learn",
        Option("--class", "what the subject is, in a word or two: mug, dog, old house", metavar="WORD",
               also=("--class_word", "--initializer_token"), dest="class_word", setting="class_word"),
        METHOD,
        Option("--token", "word that names the subject", metavar="WORD", otherwise="chosen by the method",
               also=("--modifier_token", "--placeholder_token"), setting="token"),
        Option("--with", "another subject, learned together with the first; TOKEN is optional; may be repeated",
               further_subject, metavar="FOLDER=WORD[:TOKEN]", many=True, dest="with_subjects"),
        Option("--identifier", f"kind of word that names the subject: {', '.join(IDENTIFIERS)}",
               one_of("identifier", IDENTIFIERS), metavar="KIND", otherwise=OWN, setting="identifier"),
        Option("--prompt", "prompt of a photo, with {subject} for the subject's token and class, or {token} for the "
               "token alone: 'a photo of a {subject}'", metavar="TEXT", otherwise=OWN, setting="template"),
        Option("--class-prompt", "prompt of a class image, with {class}: 'a {class}'", metavar="TEXT", otherwise=OWN,
               setting="class_template"),
    ),
    *MODEL_FLAGS,
    *grouped(
        "training",
        Option("--preset", "values that a method's authors give together: faces (Custom Diffusion)", metavar="NAME"),
        Option("--steps", "training steps", integer(1, "150", MOST["steps"]), metavar="N", also=("--max_train_steps",),
               otherwise=OWN, setting="steps"),
        Option("--batch", "images per step", integer(1, "4", MOST["batch"]), metavar="N", also=("--train_batch_size",),
               otherwise=OWN, setting="batch"),
        Option("--accumulate", "gradient accumulation steps", integer(1, "1", MOST["accumulate"]), metavar="N",
               also=("--gradient_accumulation_steps",), otherwise=str(Settings.accumulate), setting="accumulate"),
        Option("--lr", "learning rate", number(0, 1, "1e-3"), metavar="X", also=("--learning_rate", "--unet_lr"),
               wins=("--unet_lr",), otherwise=OWN, setting="learning_rate"),
        Option("--token-lr", "learning rate of the subject's token embeddings", number(0, 1, "1e-3"), metavar="X",
               otherwise=OWN, setting="token_learning_rate"),
        Option("--text-encoder-lr", "learning rate of the text encoder, with --train-text-encoder",
               number(0, 1, "2e-6"), metavar="X", also=("--text_encoder_lr",), otherwise=OWN,
               setting="text_encoder_learning_rate"),
        Option("--lr-schedule", ", ".join(SCHEDULES), one_of("schedule", SCHEDULES), metavar="NAME",
               also=("--lr_scheduler",), otherwise=Settings.lr_schedule, setting="lr_schedule"),
        Option("--warmup", "warmup steps of the learning rate", integer(0, "0"), metavar="N",
               also=("--lr_warmup_steps",), otherwise=str(Settings.warmup), setting="warmup"),
        Option("--rank", "rank of low-rank updates", integer(1, "4", MOST["rank"]), metavar="N",
               also=("--network_dim", "--lora_rank"), otherwise=OWN, setting="rank"),
        Option("--prior-weight", "weight of the prior-preservation loss on class images; 0: off",
               number(0, example="1"), metavar="X", also=("--prior_loss_weight",), otherwise=OWN,
               setting="prior_weight"),
        Option("--prior", "what the prior-preservation loss compares with: class images (drawn), or the frozen "
               "model's own prediction for the class prompt (own)", one_of("prior", PRIORS), metavar="KIND",
               otherwise=str(Settings.prior), setting="prior"),
        Option("--prior-images", "number of class images to generate", integer(1, "100", MOST["prior_images"]),
               metavar="N", also=("--num_class_images",), otherwise=OWN, setting="prior_images"),
        Option("--prior-folder", "real class images, captioned, instead of generated ones; repeat it for each subject",
               metavar="FOLDER", also=("--class_data_dir", "--reg_data_dir"), many=True, setting="prior_folder"),
        Option("--flip", "mirror half of the photos and class images", None, False, also=("--hflip",), setting="flip"),
        Option("--crop", "square of a photo that is none: center, or random", one_of("crop", CROPS), metavar="KIND",
               otherwise=str(Settings.crop), setting="crop"),
        Option("--snr-gamma", "gamma of the min-SNR loss weighting; 0: off", number(0, example="5"), metavar="X",
               also=("--min_snr_gamma",), otherwise="off", setting="snr_gamma"),
        Option("--clip-norm", "maximum gradient norm; 0: no clipping", number(0, example="1"), metavar="X",
               also=("--max_grad_norm",), otherwise=OWN, setting="clip_norm"),
        Option("--weight-decay", "weight decay of the optimizer", number(0, 1, "0.01"), metavar="X",
               also=("--adam_weight_decay",), otherwise=OWN, setting="weight_decay"),
        Option("--train-text-encoder", "also train the text encoder (DreamBooth, DreamBooth-LoRA)", None, False,
               also=("--train_text_encoder",), setting="train_text_encoder"),
        Option("--seed", "random seed", integer(0, "0"), metavar="N", otherwise=str(Settings.seed), setting="seed"),
        Option("--set", "any other setting, e.g. --set augment=false; may be repeated", metavar="NAME=VALUE",
               many=True),
    ),
    *grouped(
        "memory",
        Option("--budget", "memory limit, e.g. 6GB; picks the fastest recomputation plan that fits", byte_size,
               metavar="SIZE", otherwise="no limit"),
        RAM,
        Option("--plan", "recomputation plan, from most memory to least: " +
               ", ".join(f"{long} ({short})" for short, long in PLAN_NAMES.items()),
               one_of("recomputation plan", (*PLAN_NAMES.values(), *PLAN_NAMES)), metavar="PLAN",
               otherwise=str(Settings.plan), setting="plan"),
        *(replace(option, setting=option.name.removeprefix("--")) for option in (*HOLDING, STATES)),
        replace(RESOLUTION, setting="resolution"),
        Option("--optimizer", ", ".join(OPTIMIZERS), one_of("optimizer", OPTIMIZERS), metavar="NAME",
               otherwise=Settings.optimizer, setting="optimizer"),
    ),
    *grouped(
        "output",
        Option("--out", "folder for the concept, checkpoints, log and report", metavar="FOLDER", also=("--output_dir",),
               otherwise="out/CLASS"),
        Option("--resume", "continue from the last checkpoint in the folder", None, False),
        Option("--overwrite", "replace an existing concept", None, False),
        Option("--checkpoint-every", "checkpoint interval in steps; 0: at the end only", integer(0, "500"), metavar="N",
               also=("--checkpointing_steps", "--save_every_n_steps", "--save_steps"),
               otherwise=str(Settings.checkpoint_every), setting="checkpoint_every"),
        Option("--keep", "number of checkpoints to keep", integer(1, "2"), metavar="N",
               also=("--checkpoints_total_limit",), otherwise=str(Settings.keep), setting="keep"),
        Option("--preview", "prompt of a preview image, with {} for the subject; may be repeated", metavar="TEXT",
               many=True, also=("--validation_prompt", "--validation_prompts"), setting="preview_prompts"),
        Option("--preview-every", "preview interval in steps", integer(1, "50"), metavar="N",
               also=("--validation_steps", "--sample_every_n_steps"), otherwise="a quarter of --steps",
               setting="preview_every"),
        Option("--probe-every", "validation interval in steps; 0: off", integer(0, "50"), metavar="N",
               otherwise=str(Settings.probe_every), setting="probe_every"),
        Option("--tensorboard", "log the losses to TensorBoard, in FOLDER/logs", None, False),
        Option("--no-report", "do not write report.html", None, False),
        Option("--quiet", "print only the result", None, False),
    ),
)
# fmt: on


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that were asked for, by the flags and by --set; what is left out is the method's choice."""
    from ...methods import method_named, why_unknown

    kinds = get_type_hints(method_named(options.method).settings)
    chosen: dict[str, Any] = {"preset": options.preset} if options.preset else {}
    for option in OPTIONS:
        value = getattr(options, option.attribute)
        if not option.setting or value is None or value is False or value == []:
            continue
        if option.setting not in kinds and option.attribute in options.from_config:
            say(f"{options.config} sets {option.key}, which {options.method} does not use")
            continue
        if option.setting not in kinds:
            raise UsageError(f"{option.name}: {why_unknown(options.method, option.setting)}")
        chosen[option.setting] = tuple(value) if isinstance(value, list) else value
    folders = chosen.pop("prior_folder", ())
    if len(folders) == 1:  # several are each of one subject
        chosen["prior_folder"] = folders[0]
    if options.preview:
        chosen["preview_prompts"] = tuple(p.replace("{}", "{subject}") for p in options.preview)
        chosen.setdefault("preview_every", max(1, (options.steps or 200) // 4))
    for pair in options.set or ():
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"--set: {pair!r} has no '='; write NAME=VALUE, such as --set augment=false")
        if name == "method":
            raise UsageError("--set: the method is chosen by --method")
        if name not in kinds:
            raise UsageError(f"--set: {why_unknown(options.method, name)}")
        chosen[name] = as_kind(name, text.strip(), kinds[name])
    return chosen
