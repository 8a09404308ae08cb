from .op import step_8bit as step_8bit
from .op import step_32bit as step_32bit
