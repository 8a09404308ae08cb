from .op import frozen_conv2d as frozen_conv2d
from .op import frozen_linear as frozen_linear
