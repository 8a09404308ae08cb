from .op import trained_conv2d as trained_conv2d
