"""Shared memory of a kernel as Triton's compiler allots it, without the slow rest of a compilation.

The compiler decides it before LLVM and ptxas run: this is a twentieth of a compilation, and the same number.
"""

from __future__ import annotations

from typing import Any

from pcs_kernels._launch import AotCase


def allotted(case: AotCase, arch: int) -> int:
    """Bytes of shared memory of one block of a recorded launch, compiled for `arch`."""
    from triton._C.libtriton import ir, nvidia, passes
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    source = ASTSource(case.fn, case.signature, case.constexprs, case.attrs)
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(case.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, functions, backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    for name in ("ttir", "ttgir"):
        module = stages[name](module, metadata)
    # as the backend's make_llir begins
    manager = ir.pass_manager(module.context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager, False)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, arch, 88)
    manager.run(module, "allocate_shared_memory")
    shared: int = module.get_int_attr("ttg.shared")
    return shared
