from .op import self_attention as self_attention
