from .op import Int8Weight as Int8Weight
from .op import check_int8 as check_int8
from .op import expand_weight as expand_weight
from .op import lent_weight as lent_weight
from .op import quantize_weight as quantize_weight
