"""Compile a train step with one implementation of the language head.

    JAX_PLATFORMS=cpu PYTHONPATH=.venv/aot:. python tests/compile_unfused.py dense …

The arguments after the implementation are those of `realjax.cli.compile`. Used by
`gpu_kernels_test.py`.
"""

import runpy
import sys

from pallas_kernels import _dispatch


def main(implementation: str) -> None:
    choose = _dispatch.choose

    def choose_head(operation, implementations, request, *, name=None):
        wanted = {one.name: one for one in implementations}.get(implementation)
        is_head = operation == "linear_logprob" and wanted is not None
        # Shapes alone are also worked out for the devices that are there.
        if is_head and wanted.unsupported(request) is None:
            name = implementation
        return choose(operation, implementations, request, name=name)

    _dispatch.choose = choose_head
    runpy.run_module("realjax.cli.compile", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv.pop(1))
