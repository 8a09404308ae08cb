"""Supported options of diffusers' UNet2DConditionModel; unsupported ones raise by name."""

from __future__ import annotations

from typing import Any, Literal

from ..errors import UnsupportedModel

Family = Literal["sd1", "sd2", "sdxl"]

# diffusers' defaults of the values that shape the network.
READ: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "time_embedding_dim": None,
    "projection_class_embeddings_input_dim": None,
}
# Values that would change the arithmetic, with the only ones that are supported.
ONLY: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0.0,),
    "act_fn": ("silu", "swish"),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}
# Kept in the file, without influence: fp32 softmax is what our kernels do anyway.
IGNORED = ("sample_size", "upcast_attention", "addition_embed_type_num_heads", "decay")
COLOURS = 3  # input channels of an up-scaler for the small picture that it enlarges
BLOCK_TYPES = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def _refuse(key: str, value: object, supported: str) -> None:
    raise UnsupportedModel(f"UNet configuration: {key} = {value!r} is not supported; supported: {supported}")


def _per_level(key: str, value: Any, levels: int) -> list[int]:
    values = [value] * levels if isinstance(value, int) else value
    if not isinstance(values, (list, tuple)) or len(values) != levels or not all(isinstance(v, int) for v in values):
        _refuse(key, value, f"an integer, or a list of {levels} integers (one per block)")
    if min(values) < 1:
        _refuse(key, value, "integers of at least 1")
    return list(values)


def _flags(key: str, value: Any, levels: int) -> list[bool]:
    values = [value] * levels if isinstance(value, bool) else value
    if not isinstance(values, (list, tuple)) or len(values) != levels or not all(isinstance(v, bool) for v in values):
        _refuse(key, value, f"true, false, or a list of {levels} of them (one per block)")
    return list(values)


def checked_config(config: dict[str, Any]) -> dict[str, Any]:
    """The values the UNet is built from, with diffusers' defaults and one value per level where levels differ.

    Raises:
        UnsupportedModel: one sentence naming the key, its value and what is supported.
    """
    class_name = config.get("_class_name", "UNet2DConditionModel")
    if class_name != "UNet2DConditionModel":
        _refuse("_class_name", class_name, "UNet2DConditionModel (SD1.x, SD2.x, SDXL)")
    for key, value in config.items():
        if key.startswith("_") or key in READ or key in IGNORED:
            continue
        if key not in ONLY:
            if value not in (None, False):
                _refuse(key, value, "an option of this name is unknown; leave it out")
            continue
        flat = value[0] if isinstance(value, (list, tuple)) and value and len(set(value)) == 1 else value
        if flat not in ONLY[key]:
            _refuse(key, value, " or ".join(repr(v) for v in ONLY[key]))
    c = {key: config.get(key, default) for key, default in READ.items()}
    for key, types in BLOCK_TYPES.items():
        for name in c[key]:
            if name not in types:
                _refuse(key, name, " and ".join(types))
    levels = len(c["down_block_types"])
    if len(c["up_block_types"]) != levels:
        _refuse("up_block_types", c["up_block_types"], f"as many blocks as down_block_types has ({levels})")
    if c["mid_block_type"] not in ("UNetMidBlock2DCrossAttn", None):
        _refuse("mid_block_type", c["mid_block_type"], "'UNetMidBlock2DCrossAttn' or None")
    if c["addition_embed_type"] not in (None, "text_time"):
        _refuse("addition_embed_type", c["addition_embed_type"], "None or 'text_time'")
    for key in ("block_out_channels", "layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
        c[key] = _per_level(key, c[key], levels)
    c["only_cross_attention"] = _flags("only_cross_attention", c["only_cross_attention"], levels)
    widths = set(_per_level("cross_attention_dim", c["cross_attention_dim"], levels))
    if len(widths) != 1:
        _refuse("cross_attention_dim", c["cross_attention_dim"], "one width for all blocks")
    c["cross_attention_dim"] = widths.pop()
    for channels, heads in zip(c["block_out_channels"], c["attention_head_dim"], strict=True):
        if channels % c["norm_num_groups"]:
            _refuse("norm_num_groups", c["norm_num_groups"], f"a divisor of block_out_channels ({channels})")
        if channels % heads:
            _refuse("attention_head_dim", heads, f"a divisor of block_out_channels ({channels}): it counts heads")
    if c["time_embedding_dim"] is None:
        c["time_embedding_dim"] = 4 * c["block_out_channels"][0]
    return c


def family(settings: dict[str, Any]) -> Family:
    """The model family of a UNet's configuration: "sd1", "sd2" or "sdxl"."""
    if settings.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if settings.get("use_linear_projection") else "sd1"


def reads_small_picture(settings: dict[str, Any]) -> bool:
    """Whether a UNet is an up-scaler's: it has input channels for the colours of a small picture beside its latents."""
    return bool(settings["in_channels"] == settings["out_channels"] + COLOURS)
