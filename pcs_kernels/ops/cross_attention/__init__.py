from .op import cross_attention as cross_attention
