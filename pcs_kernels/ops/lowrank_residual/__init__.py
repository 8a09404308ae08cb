from .op import lowrank_residual as lowrank_residual
