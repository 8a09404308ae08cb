"""What each phase of a run holds, from loading to the report: bytes on the device, and bytes of the machine's memory.

Weights are those of the configurations, activations are counted as a step's are. On the CPU both are one figure, with
the interpreter and its libraries in it; mapped files count, as they do in the process's resident memory.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..methods import method_named
from ..model.autoencoder import at_once
from ..model.weights import GROUP, stored_dtype
from ..training.proof import PROOF_SIDE
from ..unet.int8 import own_parameters
from ..unet.streaming import ring_bytes, waiting_blocks
from .autoencoder import Autoencoder, autoencoder, autoencoder_dtypes
from .blank import text_encoder, weights
from .counts import Counted, counted_once, packed_bytes
from .rehearsal import CODED

# Resident after importing torch, transformers, diffusers and the trainer (torch 2.13, CPU build): 0.49 GB, and 0.04 GB
# of tokenizers and configurations. A CUDA build's libraries are larger; how much was not measured.
LIBRARIES = 550_000_000
DRAWN = 8  # images drawn together at most
REPORT = 4  # images in one column of the report
# What malloc's heap holds unused between a step's blocks, of its kept activations. SD1.5's shapes, 256 pixels: 0.26 GB
# beside 0.39 of DreamBooth, 0.30 beside 0.43 of Personalized Residuals (glibc 2.36, resident less what was in use).
GAPS = 0.65
# And of blocks that come and go while weights are packed: SD1.5 took 0.12 to 0.32 GB more in a step,
# 0.12 to 0.48 in the check before it; those that pack nothing, whose large blocks leave the process, took none.
HEAP = 320_000_000  # at most, and of small networks a fifth of their bytes
PROOF_LATENTS = 16  # a side, of the predictions that prove the file


@dataclass(frozen=True)
class Phase:
    """One phase of a run: its bytes by component, and the bytes of the machine's memory."""

    name: str
    parts: dict[str, int]
    ram: int

    @property
    def bytes(self) -> int:
        """Bytes on the device; on the CPU they are `ram` too."""
        return sum(self.parts.values())


class Phases:
    """The phases of one run, counted for a step's plan.

    Args:
        step: the step's count: networks, settings, dtype, device.
        assignment: the recomputation plan that was chosen for it.
        size: pixels a side of the photos.
        context: what the driver takes beside everything, or the libraries on the CPU.
        report: whether the run ends with a report.
    """

    def __init__(self, step: Counted, assignment: str | dict[str, str], size: int, context: int, report: bool) -> None:
        self.step, self.assignment, self.size, self.context, self.report = step, assignment, size, context, report
        request = step.request
        self.request, self.networks, self.s = request, request.networks, request.settings
        self.cpu = request.device == "cpu"
        unet = step.rehearsal.unet
        own = list(unet.parameters())
        self.unet = as_read(own, request.dtype)
        self.streamed = 0
        if self.s.resident == "streamed":
            blocks = waiting_blocks(unet)
            waiting = [p for block in blocks for p in block]
            self.unet += ring_bytes(unet) - as_read(waiting, request.dtype) * (not self.cpu)
            self.streamed = sum(pinned(as_read(block, request.dtype)) for block in blocks)
        # Mapped weights are in memory from the first prediction on; those that are made of the file's, from loading on.
        mapped = self.cpu and self.s.weights == "full"
        mapped = mapped and stored_dtype(self.networks.folder, request.dtype) == request.dtype
        self.unread = self.unet * mapped
        self.trains_unet = any(p.requires_grad for p in own)
        self.floats = sum(p.numel() for p in own if p.is_floating_point()) * request.dtype.itemsize
        self.text = sum(text_weights(json.dumps(config)) for config in self.networks.text) * request.dtype.itemsize
        encodes, decodes = autoencoder_dtypes(self.networks.vae, request.dtype, unet.add_embedding is not None)
        self.encoder = autoencoder(json.dumps(self.networks.vae), encodes)
        self.decoder = autoencoder(json.dumps(self.networks.vae), decodes)
        lasting = step.lasting()
        self.packed = lasting.pop("packed copies of weights", 0)
        self.kernels = lasting.pop("kernels for upsampling", 0) + self._joined()
        lasting.pop("gradients", None)
        self.lasting = lasting  # what is there from the method's setup on to the last step
        self.whole = step.rehearsal.learner.trains_whole_network
        self.concept = sum(p.nbytes for p in (*step.rehearsal.trained, *step.rehearsal.learner.fixed.values()))
        originals = step.rehearsal.learner.originals  # on the CPU they are among what lasts
        self.host = 0 if self.cpu else sum(t.nbytes for t in originals)
        # A step's activations are freed into malloc's heap, which keeps their pages for the next step.
        parts = step.count(assignment).parts
        self.gaps = int(GAPS * parts.get("kept activations", 0)) if self.cpu else 0
        # By what the frozen network packs: drawing does where a training of the whole network does not.
        frozen = step.prediction(1, PROOF_LATENTS, self.whole) if self.cpu else None
        packs = frozen is not None and packed_bytes(frozen, self.s.packing) > self.unet // 2
        self.heap = {"left in malloc's heap": min(HEAP, self.unet // 5)} if packs else {}
        self.freed = self.gaps + sum(parts.get(n, 0) for n in FREED) if self.cpu else 0
        turns = self.s.offload and not self.cpu
        self.offload = turns and not step.rehearsal.uses_text
        # What takes turns keeps its values in RAM while it works; encoders that train do so only once they had to wait.
        self.waiting = (self.unet + self.text + self._vae()) * turns
        coded = [p.numel() for p in step.rehearsal.trained if p.numel() >= CODED]
        away = sum(pinned(n) + pinned(4 * -(-n // 256)) for n in coded)  # codes, and a scale for each block
        self.kept = (self.unet + self.text * step.rehearsal.uses_text) * turns
        self.away = 2 * away * (self.s.states == "streamed")  # in RAM from the first step on
        self.pictures = 3 * size * size * self._images()  # as uint8

    def _joined(self) -> int:
        """Matrices of which frozen weights become views, beside the mapped pages that they were read from."""
        frozen = [
            s
            for s in self.step.rehearsal.unet.stacks()
            if not any(p.requires_grad for layer in s.layers for p in layer.parameters())
        ]
        return sum(layer.weight.nbytes for s in frozen for layer in s.layers) if self.cpu else 0

    def _images(self) -> int:
        augmentation = method_named(self.s.method).augment(self.s)
        return (augmentation.count if augmentation else 8) + (self.s.prior_images if self._has_class_images() else 0)

    def all(self) -> list[Phase]:
        """Those that the settings ask for, in their order."""
        s = self.s
        found = [self.loading(), self.photos()]
        if self._draws_class_images():
            found.append(self.class_images())
        if not self.step.rehearsal.uses_text:
            found.append(self.text_states())
        if s.check_backend:
            found.append(self.gradient_check())
        found.append(self.training_step())
        if s.probe_every:
            found.append(self.probe())
        if s.preview_every and s.preview_prompts:
            found.append(self.preview())
        return [*found, self.checkpoint(), self.finish(), *([self.run_report()] if self.report else [])]

    def without_the_step(self) -> list[Phase]:
        """Those that take what they take, whatever plan the step follows."""
        found = [self.loading(), self.photos()] + [self.class_images()] * self._draws_class_images()
        return found + [self.run_report()] * self.report

    def _phase(self, name: str, parts: dict[str, int], ram: int = 0) -> Phase:
        parts = {part: size for part, size in parts.items() if size}
        where = "interpreter and libraries" if self.cpu else "CUDA context"
        parts |= {where: self.context}
        return Phase(name, parts, sum(parts.values()) if self.cpu else LIBRARIES + self.host + self.streamed + ram)

    def _drawn(self, name: str, images: int, beside: dict[str, int], ram: int = 0, frozen: bool = False) -> Phase:
        """Texts read, images predicted with guidance and decoded: with all three networks there, or by turns.

        Args:
            name: of the phase.
            images: how many prompts there are.
            beside: what else is there, the UNet among it.
            ram: what of it is in the machine's memory.
            frozen: before or after a training of the whole network.
        """
        images = max(1, min(images, at_once(self.size * self.size // 2, DRAWN)))
        count = self.step.prediction(2 * images, self.size // self.networks.pixels, frozen and self.whole)
        decoded = self.decoder.decoding(at_once(self.size * self.size, images), self.size)
        if self.cpu:
            beside = beside | {"packed copies of weights": packed_bytes(count, self.s.packing)}
            beside |= {"kernels for upsampling": self.kernels} | self.heap
        text, vae = {"text encoder weights": self.text}, {"autoencoder weights": self._vae()}
        ram += self.waiting
        if not self.offload:
            return self._phase(name, beside | text | vae | {"working memory": max(count.peak, decoded)}, ram)
        others = {part: size for part, size in beside.items() if part != "UNet weights"}
        turns = others | text, beside | {"working memory": count.peak}, others | vae | {"working memory": decoded}
        return max((self._phase(name, turn, ram) for turn in turns), key=lambda phase: phase.bytes)

    def loading(self) -> Phase:
        """The UNet, the part of its file that is open, and of a weight in 8 bits what it is made of, on a GPU."""
        itemsize = self.request.dtype.itemsize
        sizes = [p.numel() * itemsize for _, p in sorted(own_parameters(self.step.rehearsal.unet))]
        groups = [sum(sizes[i : i + GROUP]) for i in range(0, len(sizes), GROUP)]
        opened = 0 if self.cpu else max(groups)
        coded = [p.numel() for p in self.step.rehearsal.unet.parameters() if p.dtype == torch.int8]
        made = 0 if self.cpu else (itemsize + 2) * max(coded, default=0)  # as it is read, and its codes twice
        parts = {"UNet weights": self.unet - self.unread, "a weight of the file": made}
        if self.cpu:  # it is loaded at once there
            parts["autoencoder weights"] = self._vae(self.encoder)
        return self._phase("loading", parts, opened)

    def photos(self) -> Phase:
        """Photos to latents, the UNet loaded; a GPU's waits in RAM."""
        images = at_once(self.size * self.size, DRAWN)
        parts = {"UNet weights": self._before_predictions() * self.cpu, "autoencoder weights": self._vae(self.encoder)}
        parts |= {"working memory": self.encoder.encoding(images, self.size)}
        if self._draws_class_images() and not self.offload:  # with encoders that drew them still there
            parts |= {"text encoder weights": self.text}
        ram = self.pictures + max(self.unet, self.waiting)
        return self._phase("photos to latents", parts | self._host(self.pictures), ram)

    def _before_predictions(self) -> int:
        """Of the UNet's weights in a phase before the training, when nothing but drawing class images has read them."""
        return self.unet - self.unread * (not self._draws_class_images())

    def _vae(self, network: Autoencoder | None = None) -> int:
        """On the CPU its convolutions are copies, channels-last, beside the mapped file."""
        return (network or self.decoder).bytes * (2 if self.cpu else 1)

    def _has_class_images(self) -> bool:
        return bool(self.s.prior_weight) and self.s.prior == "drawn"

    def _draws_class_images(self) -> bool:
        return self._has_class_images() and not self.s.prior_folder

    def _host(self, size: int) -> dict[str, int]:
        return {"images": size} if self.cpu else {}

    def class_images(self) -> Phase:
        """Class images drawn by the frozen model."""
        parts = {"UNet weights": self.unet} | self._host(2 * self.pictures)
        return self._drawn("class images", self.s.prior_images, parts, 2 * self.pictures, frozen=True)

    def text_states(self) -> Phase:
        """Frozen prompts encoded, one by one; then the encoders leave memory."""
        set_up = {name: size for name, size in self.lasting.items() if name not in LATER}
        if self.cpu and self._draws_class_images():  # made by drawing, and still used in the steps
            set_up = set_up | {"kernels for upsampling": self.kernels}
        if not self.trains_unet:  # weights that train are copies, made before
            set_up["UNet weights"] -= self.unet - self._before_predictions()
        ram = self.unet * self.offload
        if self.offload:
            set_up.pop("UNet weights")
        return self._phase("text states", set_up | {"text encoder weights": self.text}, ram)

    def gradient_check(self) -> Phase:
        """The gradients of both backends on a crop, beside what was packed for it; of float16 in float32."""
        latent = min(PROOF_SIDE, self.request.size[1])
        images = 2 if self.s.prior_weight else 1
        small = self.request.resized((images, latent))
        float16 = small.dtype is torch.float16
        counted = counted_once(replace(small, dtype=torch.float32) if float16 else small)
        made = counted.comparison(self.assignment)
        if self.cpu:
            made += int(GAPS * counted.count(self.assignment).parts.get("kept activations", 0))
        set_up = {name: size for name, size in self.lasting.items() if name not in LATER}
        parts = set_up | {"packed copies of weights": self.packed, "kernels for upsampling": self.kernels}
        parts |= {"both gradients, working memory": made} | self.heap
        if not float16:
            return self._phase("gradient check", parts, self.kept)
        halves = self.floats + self.text * self.step.rehearsal.uses_text
        parts |= {
            "weights in float32": 2 * halves if self.cpu else halves
        }  # on a GPU they take the place of the 16 bits
        return self._phase("gradient check", parts, halves + self.kept)

    def training_step(self) -> Phase:
        """What the planner counts of a step."""
        parts = self.step.components(self.assignment)
        parts |= {"kernels for upsampling": self.kernels, "gaps between blocks": self.gaps} if self.cpu else {}
        return self._phase("training step", parts | self.heap, self.kept + self.away)

    def _standing(self) -> dict[str, int]:
        """What is there between two steps."""
        return self.lasting | {"kernels for upsampling": self.kernels, "packed copies of weights": self.packed}

    def probe(self) -> Phase:
        """Predictions on held-out noise, between two steps."""
        count = self.step.prediction(self.s.batch, self.request.size[1])
        parts = self._standing() | {"working memory": max(count.peak, self.freed)} | self.heap
        return self._phase("validation", parts, self.kept + self.away)

    def preview(self) -> Phase:
        """What the last step left, then images drawn between two steps."""
        standing = self._standing() | self.heap
        left = self._phase("preview", standing | {"freed by the last step": self.freed}, self.waiting + self.away)
        parts = self._standing()
        del parts["packed copies of weights"]  # a drawing packs for its own shapes
        drawn = self._drawn("preview", len(self.s.preview_prompts), parts, self.away)
        return max(left, drawn, key=lambda phase: phase.bytes)

    def checkpoint(self) -> Phase:
        """Everything that trains written to disk, a tensor at a time."""
        largest = max(p.nbytes for p in self.step.rehearsal.trained)
        parts = self._standing() | {"freed by the last step": self.freed} | self._host(largest)
        return self._phase("checkpoint", parts, largest + self.kept + self.away)

    def finish(self) -> Phase:
        """What the last step left, then the concept off the model, its file proven by what the model predicted."""
        standing = self._standing() | {"freed by the last step": self.freed}
        left = self._phase("finish", standing, self.waiting + self.away)
        return max(left, self._proof(), key=lambda phase: phase.bytes)

    def _proof(self) -> Phase:
        count = self.step.prediction(1, PROOF_LATENTS, self.whole)
        parts = {"UNet weights": self.unet, "working memory": count.peak, "kernels for upsampling": self.kernels}
        if self.offload:
            parts |= {"working memory": max(count.peak, self.text - self.unet)}
        else:
            parts |= {"text encoder weights": self.text}
        if self.whole:  # the base's UNet, then the file's in its place
            return self._phase("finish", parts, self.concept + self.waiting)
        own = {n: b for n, b in self.lasting.items() if n in ("trained in float32", "kept beside what trains")}
        return self._phase("finish", parts | own | self._host(2 * self.concept), 2 * self.concept + self.waiting)

    def run_report(self) -> Phase:
        """Images of the base model and of the concept, at the training's size."""
        beside = self.cpu or not self.whole  # a GPU holds one network, the CPU the pages of both files
        parts = {"UNet weights": self.unet, "concept": self.concept * beside}
        return self._drawn("report", REPORT, parts, self.concept, frozen=True)


def as_read(parameters: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Bytes of parameters before a method has made any of them wider."""
    return sum(p.numel() * min(p.itemsize, dtype.itemsize) for p in parameters)


def pinned(size: int) -> int:
    """Bytes that torch's pinned memory takes for so many: it comes in powers of two."""
    return 1 << (size - 1).bit_length() if size else 0


FREED = ("kept activations", "gradients", "working memory")  # at the end of a step
LATER = ("optimizer state", "copy of the last good state")  # made by the first steps


@functools.lru_cache(maxsize=4)
def text_weights(config: str) -> int:
    """The number of a text encoder's parameters, by its configuration in JSON."""
    return weights(text_encoder(json.loads(config)))
