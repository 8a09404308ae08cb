from .op import trained_conv2d as trained_conv2d
from .op import trained_linear as trained_linear
