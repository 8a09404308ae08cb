"""A checkpoint as one Model, whose parts load when first used: a diffusers folder, a single file, or a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import nn

from pcs_kernels import WeightRing

from ..errors import UnsupportedModel
from ..machine import device_problem
from ..unet.config import checked_config, family, reads_small_picture
from ..unet.int8 import expect_8_bits
from ..unet.streaming import ring_bytes, stream
from ..unet.unet import UNet
from .int8 import in_8_bits, load_in_8_bits
from .layout import lay_out
from .quiet import quiet
from .schedule import Schedule
from .sources import TINY, Folder, SingleFile, find_source, read_json
from .turns import Turns, is_there
from .weights import load_weights, weight_files

if TYPE_CHECKING:
    from .peers import Autoencoder, TextEncoder

Network = TypeVar("Network", bound=nn.Module)
Weights = Literal["full", "int8"]
Resident = Literal["device", "streamed"]
PARTS = ("unet", "text_encoders", "tokenizers", "vae", "schedule", "low_res_schedule")
PIPELINES = "StableDiffusion"
# Names in the attention of the first models' VAE files -> today's.
OLD_VAE_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# What diffusers' StableDiffusionPipeline makes of every scheduler file, whatever it says; SDXL's pipeline and the
# up-scalers' take theirs as it is.
SD_PIPELINE = {"steps_offset": 1, "clip_sample": False}
OTHER_FAMILIES = ("StableDiffusion3", "StableDiffusionDiffEdit", "StableDiffusionGLIGEN", "StableDiffusionControlNet")


class Model:
    """A UNet, its text encoders and tokenizers, VAE and noise schedule; each is read when first used."""

    def __init__(
        self,
        source: Folder | SingleFile,
        dtype: torch.dtype | None,
        device: str,
        weights: Weights = "full",
        resident: Resident = "device",
    ) -> None:
        self.source = source
        self.dtype = dtype
        self.device = device
        self.weights = weights
        self.resident = resident
        self.turns = Turns()
        self._parts: dict[str, Any] = {}
        self._text_pipeline: Any = None

    def _get(self, name: str) -> Any:
        if name not in self._parts:
            self._parts[name] = getattr(self, f"_load_{name}")()
        return self._parts[name]

    @property
    def unet(self) -> UNet:
        """The denoising network."""
        return self._get("unet")

    @property
    def text_encoders(self) -> list[TextEncoder]:
        """transformers' CLIP text models: one for SD1.x and SD2.x, two for SDXL."""
        return self._get("text_encoders")

    @property
    def text_encoder(self) -> TextEncoder:
        """The first text encoder."""
        return self.text_encoders[0]

    @property
    def tokenizers(self) -> list[Any]:
        """transformers' CLIP tokenizers, one per text encoder."""
        return self._get("tokenizers")

    @property
    def tokenizer(self) -> Any:
        """The first tokenizer."""
        return self.tokenizers[0]

    @property
    def vae(self) -> Autoencoder:
        """diffusers' AutoencoderKL, channels-last."""
        return self._get("vae")

    @property
    def schedule(self) -> Schedule:
        """The noise schedule the model was trained with."""
        return self._get("schedule")

    @property
    def low_res_schedule(self) -> Schedule:
        """The noise schedule of the small picture that an up-scaler reads."""
        return self._get("low_res_schedule")

    @property
    def upscales(self) -> bool:
        """Whether this is an up-scaler: its UNet reads a small picture beside the latents."""
        return reads_small_picture(self.unet.settings)

    @property
    def name(self) -> str:
        """Name of this model in messages."""
        return "the embedded model" if self.embedded else str(getattr(self.source, "name", None) or self.source.path)

    @property
    def embedded(self) -> bool:
        """Whether this is the tiny model inside the package."""
        return self.source.path == TINY

    @property
    def loaded(self) -> list[str]:
        """Names of the parts that are in memory."""
        return list(self._parts)

    def release(self, *names: str) -> None:
        """Free parts by name; they are read again when used again."""
        for name in names:
            if name not in PARTS:
                raise ValueError(f"{name!r} is not a part of a model; the parts are {', '.join(PARTS)}")
            part = self._parts.pop(name, None)
            if name == "unet" and part is not None and part.ring is not None:
                part.ring.forget()
            self.turns.forget(name)

    def hold(self, weights: Weights, resident: Resident = "device") -> None:
        """Hold the UNet's frozen weights like this from now on: a UNet that is held otherwise is read again."""
        _check_held(weights, resident, self.device)
        if (weights, resident) != (self.weights, self.resident):
            self.weights, self.resident = weights, resident
            self.release("unet")

    def offload(self, on: bool = True) -> None:
        """Let text encoders, UNet and autoencoder take turns on a GPU: who does not work waits in RAM.

        On a model that takes turns a `Trainer` goes on with them, unless its settings say otherwise.
        """
        self.turns.begin(on)
        if torch.device(self.device).type not in ("cpu", "meta"):
            for name in ("text_encoders", "vae"):
                if self.turns.waits(name) and is_there(self, name):
                    self.turns.to_host(self, name)
                elif not on and name in self._parts:
                    self.turns.to_device(self, name)

    def stay(self, name: str) -> None:
        """A part that others take turns with is on the device whenever it is nobody's turn, as the UNet is."""
        self.turns.staying.add(name)
        if self.turns.on and name in self._parts and torch.device(self.device).type not in ("cpu", "meta"):
            self.turns.to_device(self, name)

    def _settle(self, module: Network, part: str = "unet") -> Network:
        """The module frozen, on the model's device or where it waits, in the model's dtype."""
        waits = self.turns.waits(part) or (part == "unet" and self.resident == "streamed")
        place = "cpu" if self.device != "meta" and waits else self.device
        # torch's own `to`: diffusers' warns of each cast of an autoencoder, and checks what is not so here.
        module = nn.Module.to(module, device=place, dtype=self.dtype).requires_grad_(False).eval()
        half = self.dtype is None and any(p.dtype == torch.float16 for p in module.parameters())
        # CPUs have no fast float16 arithmetic: the files' half precision is for their size alone
        return module.float() if half and self.device == "cpu" else module

    def _load_unet(self) -> UNet:
        if isinstance(self.source, SingleFile):
            from diffusers import UNet2DConditionModel

            peer = self.source.converted(UNet2DConditionModel, "unet")
            unet = UNet.from_config(dict(peer.config), device="meta")
            unet.load_state_dict(peer.state_dict(), strict=True, assign=True)
            del peer
            return self._placed(in_8_bits(unet) if self.weights == "int8" else unet)
        folder = self.source.part("unet")
        unet = _unet_of(folder / "config.json")
        if self.device == "meta":
            if self.weights == "int8":
                expect_8_bits(unet)
            return self._settle(unet)
        files = weight_files(folder, "diffusion_pytorch_model", self.dtype)
        load = load_in_8_bits if self.weights == "int8" else load_weights
        load(unet, files, self.dtype, "cpu" if self.resident == "streamed" else self.device)
        return self._placed(unet)

    def _placed(self, unet: UNet) -> UNet:
        """A UNet that has its weights, each where it stays."""
        unet = lay_out(self._settle(unet), self.device)
        if self.resident == "streamed":
            stream(unet, WeightRing(self.device, ring_bytes(unet)))
        return unet

    @quiet("diffusers", "transformers")
    def _pipeline(self, source: SingleFile) -> Any:
        """diffusers' pipeline of a single file, for its text side alone."""
        if self._text_pipeline is None:
            from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

            kind = StableDiffusionXLPipeline if self.unet.add_embedding is not None else StableDiffusionPipeline
            self._text_pipeline = source.converted(kind, None)
        return self._text_pipeline

    @quiet("transformers")
    def _load_text_encoders(self) -> list[TextEncoder]:
        if isinstance(self.source, SingleFile):
            pipeline = self._pipeline(self.source)
            parts = [getattr(pipeline, n, None) for n in ("text_encoder", "text_encoder_2")]
            return [self._settle(part, "text_encoders") for part in parts if part is not None]
        folders = _text_parts(self.source, "text_encoder")
        return [self._settle(self._text_encoder(folder), "text_encoders") for folder in folders]

    def _text_encoder(self, folder: Path) -> TextEncoder:
        import transformers

        config = read_json(folder / "config.json")
        name = (config.get("architectures") or ["CLIPTextModel"])[0]
        if name not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            raise UnsupportedModel(f"{folder / 'config.json'}: a text encoder of the kind {name} is not supported")
        kind = getattr(transformers, name)
        if self.device == "meta":
            with torch.device("meta"):
                return kind(kind.config_class(**config))
        files = weight_files(folder, "model", self.dtype)
        variant = {"variant": "fp16"} if ".fp16." in files[0].name else {}
        options = {"dtype": self.dtype or "auto", "local_files_only": True, "output_loading_info": True} | variant
        encoder, info = _through_peer(folder, kind, options)
        for what, key in (("lacks the tensor", "missing_keys"), ("has a misshapen tensor", "mismatched_keys")):
            if info[key]:
                raise UnsupportedModel(f"{files[0]} {what} {min(info[key])!r}")
        return encoder

    @quiet("transformers")
    def _load_tokenizers(self) -> list[Any]:
        if isinstance(self.source, SingleFile):
            pipeline = self._pipeline(self.source)
            parts = [getattr(pipeline, n, None) for n in ("tokenizer", "tokenizer_2")]
            return [part for part in parts if part is not None]
        from transformers import CLIPTokenizer

        folders = _text_parts(self.source, "tokenizer")
        return [_through_peer(folder, CLIPTokenizer, {"local_files_only": True}) for folder in folders]

    @quiet("diffusers", "transformers")
    def _load_vae(self) -> Autoencoder:
        from diffusers import AutoencoderKL

        if isinstance(self.source, SingleFile):
            vae: Any = self.source.converted(AutoencoderKL, "vae")
        else:
            folder = self.source.part("vae")
            with torch.device("meta"):
                vae = AutoencoderKL.from_config(read_json(folder / "config.json"))
            if self.device != "meta":
                files = weight_files(folder, "diffusion_pytorch_model", self.dtype)
                place = "cpu" if self.turns.waits("vae") else self.device
                load_weights(vae, files, self.dtype, place, OLD_VAE_NAMES)
        settled: Any = _upcast(self._settle(vae, "vae"))
        return settled.to(memory_format=torch.channels_last)  # convolutions read it as the UNet's do

    def _load_schedule(self) -> Schedule:
        if isinstance(self.source, SingleFile):
            return Schedule.from_config(dict(self._pipeline(self.source).scheduler.config))
        config = read_json(self.source.part("scheduler") / "scheduler_config.json")
        settings = _settings_of(self.source.part("unet") / "config.json")
        as_it_is = family(settings) == "sdxl" or reads_small_picture(settings)
        return Schedule.from_config(config if as_it_is else config | SD_PIPELINE)

    def _load_low_res_schedule(self) -> Schedule:
        if isinstance(self.source, SingleFile):
            raise UnsupportedModel(
                f"{self.source.file} says nothing of the noise on an up-scaler's small picture. Fix: give the model as "
                "a diffusers folder or a hub name"
            )
        return Schedule.from_config(read_json(self.source.part("low_res_scheduler") / "scheduler_config.json"))


def _upcast(vae: Any) -> Any:
    """An autoencoder in float32 where its configuration says that float16 is too small for it, as SDXL's does."""
    return vae.float() if vae.config.force_upcast and vae.dtype == torch.float16 else vae


def _text_parts(source: Folder, name: str) -> list[Path]:
    """The folders of a part of the text side: one, and SDXL's second."""
    return [source.part(n) for n in (name, f"{name}_2") if n == name or source.has(n)]


def _unet_of(file: Path) -> UNet:
    """The UNet of a configuration file, without weights."""
    _settings_of(file)  # says what is wrong, and in which file
    return UNet.from_config(read_json(file), device="meta")


def _settings_of(file: Path) -> dict[str, Any]:
    """What a UNet's configuration file says, checked."""
    try:
        return checked_config(read_json(file))
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{file}: {error}") from None


def _through_peer(folder: Path, kind: Any, options: dict[str, Any]) -> Any:
    """What a class of transformers reads from a folder."""
    try:
        return kind.from_pretrained(str(folder), **options)
    except Exception as error:  # transformers raises many kinds
        reason = " ".join(str(error).split())
        raise UnsupportedModel(f"{folder} cannot be read as a {kind.__name__}: {reason}") from error


def refuse_on_the_cpu(device: str, **settings: str | None) -> None:
    """ValueError where a setting brings something from RAM to a GPU, and there is none."""
    for name in (n for n, value in settings.items() if value == "streamed" and torch.device(device).type == "cpu"):
        raise ValueError(
            f"{name}='streamed' brings what waits in RAM to a GPU; on the CPU all is in RAM. Fix: {name}='device'"
        )


def _check_held(weights: str, resident: str, device: str) -> None:
    refuse_on_the_cpu(device, resident=resident)
    for name, value, known in (("weights", weights, Weights), ("resident", resident, Resident)):
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, not {value!r}")


def _check_family(source: Folder | SingleFile) -> None:
    name = source.class_name() if isinstance(source, Folder) else None
    if name is not None and (not name.startswith(PIPELINES) or name.startswith(OTHER_FAMILIES)):
        raise UnsupportedModel(f"{source.path} holds a {name}; supported are Stable Diffusion 1.x, 2.x and XL")


def load_model(
    where: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    config: str | Path | None = None,
    weights: Weights = "full",
    resident: Resident = "device",
) -> Model:
    """Open a model; its parts are read when first used.

    Args:
        where: a diffusers folder, a checkpoint file, a hub name, or "tiny" (the embedded model).
        dtype: of the networks; default: the files' own (float16 becomes float32 on a CPU and stays float16 elsewhere).
            Training in float16 scales its loss, and says so where another dtype suits the device better: bfloat16 on
            GPUs since compute capability 8.0, which `pcs train` takes by itself.
        device: where the networks go: "cpu", "cuda", "cuda:1", and untested "xpu" and "mps", which have no kernels of
            ours; "meta" builds them without weights.
        config: for a checkpoint file, the folder or hub name of the configuration files diffusers converts it by.
        weights: "int8" holds the UNet's frozen weights in 8 bits, with a scale for every 64 of them: half the memory
            of 16 bits. Each is expanded for the time of one product. What a method trains keeps its own precision,
            and is learned for the weights as they are held; it draws on the 16-bit model too.
        resident: "streamed" keeps the UNet's frozen weights in the machine's memory, from where each is copied to the
            device ahead of its use: the values are the same, bit for bit.

    Raises:
        UnsupportedModel: one sentence naming the file and what is wrong with it, here or when a part is first used.
        ValueError: where torch does not see the device.
    """
    problem = device_problem(device)
    if problem is not None:
        raise ValueError(f"device {str(device)!r}: {problem}")
    source = find_source(where, config, fp16=dtype in (torch.float16, torch.bfloat16))
    _check_family(source)
    _check_held(weights, resident, str(device))
    return Model(source, dtype, str(device), weights, resident)
